"""One step of p(x_{t-1} | x_t), in the order and rounding of guided-diffusion's p_sample (Ho et al. 2020, algorithm 2;
Nichol and Dhariwal 2021 for the learned variances; Ho and Salimans 2022 for guidance)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.reference.random import normal

PREDICTIONS = ("epsilon", "x0", "v", "x_prev")
VARIANCES = ("fixed", "learned", "learned_range")


class _ExpPoly(torch.autograd.Function):
    """exp in float32, clamped to [-87, 88], within 1 ulp: docs/noise.md has the polynomial. Its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clamp(-87.0, 88.0)
        t = x * float.fromhex("0x1.715476p+0") + 12582912.0
        n = t - 12582912.0
        r = (x - n * float.fromhex("0x1.62e4p-1")) - n * float.fromhex("0x1.7f7d1cp-20")
        p = r * float.fromhex("0x1.6a2430p-10") + float.fromhex("0x1.1239e4p-7")
        for coefficient in ("0x1.5558f2p-5", "0x1.555492p-3", "0x1.fffffcp-2"):
            p = p * r + float.fromhex(coefficient)
        p = ((p * r) * r + r) + 1.0
        y: Tensor = (p.view(torch.int32) + (t.view(torch.int32) << 23)).view(torch.float32)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        grad: Tensor = grads[0] * y
        return grad


def exp_poly(x: Tensor) -> Tensor:
    """The exponential of a learned variance; float64 has no need of a portable one."""
    if x.dtype == torch.float64:
        return x.exp()
    y: Tensor = _ExpPoly.apply(x)  # type: ignore[no-untyped-call]
    return y


def step(
    x_t: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    prediction: str,
    variance: str,
    clip: tuple[float, float] | None,
    threshold: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x_{t-1} and the x0 it was made from; differentiable. Argument meanings: `ddpm_fast.ops.denoise`."""
    per_sample = (-1, *[1] * (x_t.dim() - 1))
    (
        x0_from_x,
        x0_from_output,
        mean_from_x0,
        mean_from_x,
        sigma,
        log_min,
        log_max,
        guidance_scale,
    ) = (column.reshape(per_sample) for column in coefficients.to(x_t.dtype)[index].unbind(-1))

    channels = x_t.shape[1]
    output = model_output.to(x_t.dtype)
    e = output[:, :channels]
    if unconditional is not None:
        u = unconditional.to(x_t.dtype)[:, :channels]
        e = u + guidance_scale * (e - u)

    if prediction == "x0":
        x0 = e
    elif prediction == "x_prev":
        x0 = (e - mean_from_x * x_t) / mean_from_x0
    else:
        x0 = x0_from_x * x_t - x0_from_output * e
    if clip is not None:
        x0 = x0.clamp(*clip)
    if threshold is not None:
        s = threshold.to(x_t.dtype).reshape(per_sample)
        x0 = torch.minimum(torch.maximum(x0, -s), s) / s
    mean = e if prediction == "x_prev" else mean_from_x0 * x0 + mean_from_x * x_t

    if noise is None:
        return mean, x0
    if variance != "fixed":
        log_variance = output[:, channels:]
        if variance == "learned_range":
            fraction = (log_variance + 1) / 2
            log_variance = fraction * log_max + (1 - fraction) * log_min
        sigma = sigma * exp_poly(0.5 * log_variance)
    return mean + sigma * noise.to(x_t.dtype), x0


def draw(
    x_t: Tensor, coefficients: Tensor, index: Tensor, seed: Tensor, sample_ids: Tensor | None, stream: int
) -> Tensor:
    """The step's own noise, zero where the table's sigma is: the last step draws none, and -0 leaves a mean of -0."""
    noise = torch.empty_like(x_t)
    normal(noise, seed, sample_ids, index, stream)
    silent = coefficients[index, 4].reshape(-1, *[1] * (x_t.dim() - 1)) == 0
    return noise.masked_fill_(silent, -0.0)


def denoise(
    x_t: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    prediction: int,
    variance: int,
    clip_low: float | None,
    clip_high: float | None,
    threshold: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    out: Tensor,
    x0_out: Tensor | None,
) -> None:
    if seed is not None:
        noise = draw(x_t, coefficients, index, seed, sample_ids, stream)
    clip = None if clip_low is None or clip_high is None else (clip_low, clip_high)
    x_prev, x0 = step(
        x_t,
        model_output,
        unconditional,
        coefficients,
        index,
        PREDICTIONS[prediction],
        VARIANCES[variance],
        clip,
        threshold,
        noise,
    )
    out.copy_(x_prev)
    if x0_out is not None:
        x0_out.copy_(x0)
