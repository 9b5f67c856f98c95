"""How far a network's output is from its target, whose noise is drawn again instead of kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.reference import target_loss as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

_ARGUMENTS = (
    "Tensor output, Tensor x0, Tensor t, Tensor coefficients, Tensor? noise, Tensor? seed, Tensor? sample_ids, "
    "Tensor step, int stream, int distance, "
)
TARGET_LOSS = Operator("target_loss", _ARGUMENTS + "Tensor(a!) out", reference.target_loss, on=("reference", "cpu"))
TARGET_LOSS_BACKWARD = Operator(
    "target_loss_backward",
    "Tensor grad_losses, " + _ARGUMENTS + "Tensor(a!) grad_output",
    reference.target_loss_backward,
    on=("reference", "cpu"),
)

_DISTANCES = {name: number for number, name in enumerate(reference.DISTANCES)}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _TargetLoss(torch.autograd.Function):
    """The two operators tied together; kept for the backward pass are the inputs alone."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *arguments: Any) -> Tensor:
        *inputs, backend = arguments
        out = _empty_losses(output, inputs[0])
        TARGET_LOSS[backend](output, *inputs, out)
        *tensors, stream, distance = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.numbers, ctx.backend = (stream, distance), backend
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _check.first_derivative_only("target_loss")
        output, *tensors = ctx.saved_tensors
        grad_output = torch.empty_like(output)
        if not _check.is_dense(grad_output):
            grad_output = torch.empty_like(output, memory_format=torch.contiguous_format)
        TARGET_LOSS_BACKWARD[ctx.backend](grads[0].contiguous(), output, *tensors, *ctx.numbers, grad_output)
        return grad_output, *(None,) * 10


def _empty_losses(output: Tensor, x0: Tensor) -> Tensor:
    dtype = torch.float64 if torch.float64 in (output.dtype, x0.dtype) else torch.float32
    return torch.empty(output.shape[:1], dtype=dtype, device=output.device)


def _check_like(tensor: Any, name: str, dtypes: tuple[torch.dtype, ...], output: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.shape != output.shape or tensor.dtype not in dtypes or tensor.device != output.device:
        raise ValueError(
            f"{name} must have the output's shape {tuple(output.shape)}, one of the dtypes "
            f"{[str(d) for d in dtypes]} and device {output.device}, "
            f"not {tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
        )


def target_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor | None = None,
    *,
    distance: str = "mse",
    seed: int | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    step: int | Tensor = 0,
) -> Tensor:
    """The mean over each sample of `d(output - target)`, with `target = noise_factor * noise + x0_factor * x0`.

    Every target of a diffusion network is such a sum (`ddpm_fast.training.loss`). With a seed the noise is that which
    `q_sample` drew for the same seed, samples and step, to the bit: it is drawn again on the way, in the backward
    pass once more, and never stored.

    Args:
        output: (N, C, *) float32, float16, bfloat16, or float64 on the reference backend; any layout.
        x0: (N, C, *), floating point, or uint8 images, which become `x0 / 127.5 - 1`.
        t: int64 (N,), the row of the table.
        coefficients: (T, 2) float32: noise_factor and x0_factor.
        noise: (N, C, *) floating point; drawn from `seed` unless given.
        distance: "mse" (d = u^2), "l1" (|u|) or "huber" (u^2 / 2 below 1, |u| - 1/2 above).
        seed, sample_ids, step: as for `q_sample`.

    Returns:
        (N,) float32, or float64 where output or x0 is. Differentiable in output, once.

    Raises:
        TypeError, ValueError: for anything outside the shapes, dtypes, devices, ranges and names above, and unless
            exactly one of noise and seed is given.
    """
    if distance not in _DISTANCES:
        raise ValueError(f"distance must be one of {list(_DISTANCES)}, not {distance!r}")
    if not isinstance(output, Tensor):
        raise TypeError(f"output must be a tensor, not {type(output).__name__}")
    if output.dtype not in _FLOATS or output.dim() < 2:
        raise ValueError(f"output must be floating-point (N, C, *), not {output.dtype} of shape {tuple(output.shape)}")
    device, samples = output.device, output.shape[0]
    _check_like(x0, "x0", (*_FLOATS, torch.uint8), output)
    if noise is not None:
        _check_like(noise, "noise", _FLOATS, output)
    if (noise is None) == (seed is None):
        raise ValueError("give either the noise or the seed it is drawn from")
    if t.dtype != torch.int64 or t.shape != (samples,) or t.device != device:
        raise ValueError(
            f"t must be int64 of shape ({samples},) on {device}, not {t.dtype} of shape {tuple(t.shape)} on {t.device}"
        )
    if coefficients.shape[1:] != (2,) or coefficients.dtype != torch.float32:
        raise ValueError(
            f"coefficients must be float32 of shape (T, 2), "
            f"not {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    _check.rows_in_range(t, coefficients.shape[0], "t")
    backend = TARGET_LOSS.choose(output, x0, noise)
    output, x0 = _check.one_pixel_stride(output), x0 if _check.is_dense(x0) else x0.contiguous()
    inputs = (
        x0,
        t,
        coefficients,
        None if noise is None else _check.one_pixel_stride(noise),
        None if seed is None else _check.seed_tensor(seed, device),
        _check.sample_id_tensor(sample_ids, samples, device),
        _check.counter_tensor(step, "step", samples, device),
        _check.STREAMS["training"],
        _DISTANCES[distance],
    )
    if _check.needs_grad(output):
        return _TargetLoss.apply(output, *inputs, backend)  # type: ignore[no-any-return,no-untyped-call]
    out = _empty_losses(output, x0)
    TARGET_LOSS[backend](output, *inputs, out)
    return out
