"""q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod): Ho et al. 2020, equation 4."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.backends.reference.random import normal


def as_image(x0: Tensor) -> Tensor:
    """Bytes become float32 in [-1, 1]; anything else stays as it is."""
    return x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0


def q_sample(x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor) -> Tensor:
    """x_t, computed in float32 (in float64 for a float64 x0) and rounded to x0's dtype at the end; differentiable."""
    x0 = as_image(x0)
    compute = torch.promote_types(x0.dtype, torch.float32)
    signal, sigma = coefficients.to(compute)[t].reshape(-1, 2, *[1] * (x0.dim() - 1)).unbind(1)
    return (signal * x0.to(compute) + sigma * noise.to(compute)).to(x0.dtype)


def noising(x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor, out: Tensor) -> None:
    out.copy_(q_sample(x0, t, coefficients, noise))


def noising_random(
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    step: Tensor,
    stream: int,
    out: Tensor,
    noise: Tensor,
) -> None:
    normal(noise, seed, sample_ids, step, stream)
    noising(x0, t, coefficients, noise, out)


def noising_drawn(
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    step: Tensor,
    stream: int,
    out: Tensor,
) -> None:
    noising_random(x0, t, coefficients, seed, sample_ids, step, stream, out, torch.empty_like(out))
