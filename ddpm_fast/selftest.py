"""Whether the ops compute what they should, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_fast.backends.reference.random import philox
from ddpm_fast.ops import (
    abs_quantile,
    bound_terms,
    conv3x3,
    denoise,
    group_norm_silu,
    linear_attention,
    projected_linear_attention,
    q_sample,
    randn,
    rms_norm_silu,
    target_loss,
)
from ddpm_fast.ops.bound import COLUMNS
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import ddpm_table

_SHAPE = (3, 6, 9, 7)

_Test = Callable[[torch.device], float]
"""The largest difference from float64 of an op on a device."""


@dataclass(frozen=True)
class Result:
    """One op.

    Attributes:
        op: its name.
        error: the largest difference from float64, NaN where the op raised an exception.
        allowed: the largest that is right.
        problem: the exception's message.
    """

    op: str
    error: float
    allowed: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def results(backend: str, device: torch.device) -> list[Result]:
    """Runs the ops that a backend has on tensors of a device, where the backend has to be the one that is chosen.

    About a second, and on a GPU what its first calls take.
    """
    found = []
    for name, (op, test, allowed) in _TESTS.items():
        if not hasattr(getattr(torch.ops.ddpm_fast, op), backend):
            continue
        try:
            found.append(Result(name, test(device), allowed))
        except Exception as error:  # a broken kernel is what this is there to find
            found.append(Result(name, math.nan, allowed, " ".join(str(error).split())))
    return found


def _largest(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact.to(result.device)).abs().max().item()


def _random(device: torch.device) -> float:
    """Against Box and Muller's transform of the same words in float64."""
    seed = torch.tensor([0x0123456789ABCDEF])
    blocks = torch.arange((math.prod(_SHAPE[1:]) + 3) // 4)
    counter = (torch.arange(_SHAPE[0])[:, None], blocks, torch.tensor([[5]]), torch.tensor([[1]]))
    r0, r1, r2, r3 = philox(counter, seed)
    values = torch.stack([*_box_muller(r0, r1), *_box_muller(r2, r3)], dim=-1)
    exact = values.reshape(_SHAPE[0], -1)[:, : math.prod(_SHAPE[1:])].reshape(_SHAPE)
    return _largest(randn(_SHAPE, seed=seed.to(device), step=5, device=device), exact)


def _box_muller(r0: Tensor, r1: Tensor) -> tuple[Tensor, Tensor]:
    """Words 0 .. 2^32 - 1 as docs/noise.md reads them: a radius and sign from the first, an angle from the second."""
    signed = torch.where(r0 >= 1 << 31, r0 - (1 << 32), r0).double()
    radius = (-2 * (signed.abs() * 2.0**-31).clamp(min=2.0**-33).log()).sqrt()
    half = (r1 << 1) & 0xFFFFFFFF
    angle = torch.where(half >= 1 << 31, half - (1 << 32), half).double() * (2 * math.pi * 2.0**-34)
    cosine, sine = torch.where(signed < 0, -angle.cos(), angle.cos()) * radius, angle.sin() * radius
    swap = r1 >= 1 << 31
    return torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)


def _noise(number: int, device: torch.device, channels: int = _SHAPE[1]) -> Tensor:
    return randn((_SHAPE[0], channels, *_SHAPE[2:]), seed=1, step=number, device=device)


def _noising(device: torch.device) -> float:
    schedule, t = NoiseSchedule.linear(1000), torch.tensor([0, 500, 999])
    x0 = _noise(0, device).clamp(-1, 1)
    x_t, noise = q_sample(x0, t.to(device), schedule, seed=1)
    signal, sigma = (
        table[t].reshape(-1, 1, 1, 1).to(device)
        for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    return _largest(x_t, signal * x0.double() + sigma * noise.double())


def _target_loss(device: torch.device) -> float:
    x0, noise = _noise(0, device).clamp(-1, 1), randn(_SHAPE, seed=1, stream="training", device=device)
    table, t = (
        torch.tensor([[1.0, 0.0], [0.8, -0.6]], dtype=torch.float32, device=device),
        torch.tensor([0, 1, 1], device=device),
    )
    output = _noise(2, device).requires_grad_()
    losses = target_loss(output, x0, t, table, seed=1)
    (gradient,) = torch.autograd.grad(losses.sum(), output)
    noise_factor, x0_factor = table.double()[t].reshape(-1, 2, 1, 1, 1).unbind(1)
    difference = output.detach().double() - (noise_factor * noise.double() + x0_factor * x0.double())
    exact = difference.square().flatten(1).mean(1)
    return max(_largest(losses.detach(), exact), _largest(gradient * math.prod(_SHAPE[1:]), 2 * difference))


def _bound(device: torch.device) -> float:
    """Divergences, as torch.distributions has them, for a posterior of variance 1."""
    x0, x_t = _noise(0, device).clamp(-1, 1), _noise(1, device)
    output = _noise(2, device, 2 * _SHAPE[1]).clamp(-1, 1)
    table, t = torch.zeros(2, len(COLUMNS), dtype=torch.float32, device=device), torch.tensor([1, 1, 1], device=device)
    from_x0, from_x = 0.5, 0.25
    table[1, COLUMNS.index("mean_from_x0")], table[1, COLUMNS.index("mean_from_x")] = from_x0, from_x
    terms, _ = bound_terms(x0, x_t, output, t, table, prediction="x0", variance="learned")
    mean, log_variance = output.double().chunk(2, dim=1)
    posterior = Normal(from_x0 * x0.double() + from_x * x_t.double(), 1.0)
    step = Normal(from_x0 * mean + from_x * x_t.double(), (0.5 * log_variance).exp())
    return _largest(terms, kl_divergence(posterior, step).flatten(1).mean(1) / math.log(2))


def _denoise(variance: str) -> _Test:
    def test(device: torch.device) -> float:
        learned = variance != "fixed"
        schedule = NoiseSchedule.linear(1000)
        table = ddpm_table(schedule, variance="learned_range" if learned else "fixed_small", guidance_scale=1.5)
        x_t, z = _noise(0, device), _noise(1, device)
        output, unconditional = (_noise(n, device, _SHAPE[1] * (2 if learned else 1)).clamp(-1, 1) for n in (2, 3))
        index = torch.tensor([400, 700, 990])
        x_prev = denoise(
            x_t,
            output,
            table.rows.to(device),
            index.to(device),
            variance=variance,
            clip=(-1, 1),
            unconditional=unconditional,
            noise=z,
        )
        rows = [column.reshape(-1, 1, 1, 1).to(device) for column in table.rows64[index].unbind(1)]
        x0_from_x, x0_from_e, mean_from_x0, mean_from_x, sigma, log_min, log_max, scale = rows
        c, u = output.double()[:, : _SHAPE[1]], unconditional.double()[:, : _SHAPE[1]]
        x0 = (x0_from_x * x_t.double() - x0_from_e * (u + scale * (c - u))).clamp(-1, 1)
        if learned:
            fraction = (output.double()[:, _SHAPE[1] :] + 1) / 2
            sigma = sigma * (0.5 * (fraction * log_max + (1 - fraction) * log_min)).exp()
        return _largest(x_prev, mean_from_x0 * x0 + mean_from_x * x_t.double() + sigma * z.double())

    return test


def _quantile(device: torch.device) -> float:
    x = _noise(6, device)
    return _largest(abs_quantile(x, 0.95), torch.quantile(x.double().flatten(1).abs(), 0.95, dim=1))


def _conv(device: torch.device) -> float:
    x, weight = randn((2, 32, 9, 7), seed=4, device=device), randn((24, 32, 3, 3), seed=5, device=device) / 17
    return _largest(conv3x3(x, weight), F.conv2d(x.double(), weight.double(), padding=1))


def _linear_attention(device: torch.device) -> float:
    qkv = _noise(7, device)
    q, k, v = qkv.double().flatten(2).chunk(3, dim=1)
    context = k.softmax(dim=2) @ v.mT
    exact = context.mT @ (q.softmax(dim=1) * q.shape[1] ** -0.5)
    return _largest(linear_attention(qkv, 1), exact.unflatten(2, qkv.shape[2:]))


def _projected_linear_attention(device: torch.device) -> float:
    x = _noise(7, device)
    qkv_weight = randn((48, x.shape[1], 1, 1), seed=8, device=device)
    out_weight = randn((5, 16, 1, 1), seed=9, device=device)
    q, k, v = F.conv2d(x.double(), qkv_weight.double()).flatten(2).chunk(3, dim=1)
    context = k.softmax(dim=2) @ v.mT
    attended = context.mT @ (q.softmax(dim=1) * 16**-0.5)
    exact = F.conv2d(attended.unflatten(2, x.shape[2:]), out_weight.double())
    return _largest(projected_linear_attention(x, qkv_weight, out_weight, heads=1), exact)


def _norm_inputs(dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    rows = randn((_SHAPE[0], 3 * _SHAPE[1]), seed=2, device=device).to(dtype)
    weight, bias = randn((2, _SHAPE[1]), seed=3, device=device).to(dtype)
    scale, shift, embedding = rows.chunk(3, dim=1)
    inputs = {"x": _noise(4, device).to(dtype), "weight": weight, "bias": bias, "scale": scale, "shift": shift}
    return {name: tensor.clone().requires_grad_() for name, tensor in (inputs | {"embedding": embedding}).items()}


def _norm(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return group_norm_silu(
        x,
        2,
        inputs["weight"],
        inputs["bias"],
        scale=inputs["scale"],
        shift=inputs["shift"],
        embedding=inputs["embedding"],
    )


def _norm_exact(inputs: dict[str, Tensor]) -> Tensor:
    scale, shift, embedding = (inputs[name][:, :, None, None] for name in ("scale", "shift", "embedding"))
    y = F.group_norm(inputs["x"] + embedding, 2, inputs["weight"], inputs["bias"])
    return F.silu(y * (1 + scale) + shift)


def _rms_norm(x: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return rms_norm_silu(x, inputs["weight"], scale=inputs["scale"], shift=inputs["shift"])


def _rms_norm_exact(inputs: dict[str, Tensor]) -> Tensor:
    weight, scale, shift = (inputs[name][..., None, None] for name in ("weight", "scale", "shift"))
    return F.silu(F.normalize(inputs["x"], dim=1) * math.sqrt(_SHAPE[1]) * weight * (1 + scale) + shift)


def _values(
    norm: Callable[[Tensor, dict[str, Tensor]], Tensor],
    exactly: Callable[[dict[str, Tensor]], Tensor],
    memory_format: torch.memory_format = torch.contiguous_format,
) -> _Test:
    def test(device: torch.device) -> float:
        inputs, exact = _norm_inputs(torch.float32, device), exactly(_norm_inputs(torch.float64, device))
        x = inputs["x"].contiguous(memory_format=memory_format)
        with torch.no_grad():
            return _largest(norm(x, inputs), exact.detach())

    return test


def _gradients(
    norm: Callable[[Tensor, dict[str, Tensor]], Tensor], exactly: Callable[[dict[str, Tensor]], Tensor]
) -> _Test:
    def test(device: torch.device) -> float:
        inputs, exact = _norm_inputs(torch.float32, device), _norm_inputs(torch.float64, device)
        grad = _noise(5, device)
        found = torch.autograd.grad(norm(inputs["x"], inputs), list(inputs.values()), grad, materialize_grads=True)
        expected = torch.autograd.grad(exactly(exact), list(exact.values()), grad.double(), materialize_grads=True)
        return max(_largest(g, e) for g, e in zip(found, expected, strict=True))

    return test


# The op, the test, and what is allowed: a few units in the last place of the largest values that come up, which are
# about 10, and 50 for the gradients.
_TESTS: dict[str, tuple[str, _Test, float]] = {
    "random": ("normal", _random, 2e-6),
    "noising": ("noising", _noising, 2e-6),
    "denoise": ("denoise", _denoise("fixed"), 5e-6),
    "denoise learned": ("denoise", _denoise("learned_range"), 5e-6),
    "target_loss": ("target_loss", _target_loss, 5e-6),
    "bound": ("bound_terms", _bound, 2e-6),
    "norm_act": ("norm_act", _values(_norm, _norm_exact), 5e-6),
    "norm_act channels_last": ("norm_act", _values(_norm, _norm_exact, torch.channels_last), 5e-6),
    "norm_act backward": ("norm_act_backward", _gradients(_norm, _norm_exact), 2e-5),
    "abs_quantile": ("abs_quantile", _quantile, 2e-6),
    "conv": ("conv3x3", _conv, 5e-6),
    "linear_attention": ("linear_attention", _linear_attention, 2e-6),
    "projected_linear_attention": ("projected_linear_attention", _projected_linear_attention, 1e-5),
    "rms_norm_act": ("rms_norm_act", _values(_rms_norm, _rms_norm_exact), 5e-6),
    "rms_norm_act backward": ("rms_norm_act_backward", _gradients(_rms_norm, _rms_norm_exact), 2e-5),
}
