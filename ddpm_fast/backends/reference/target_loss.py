"""The distance of a network's output from its target, and its derivative.

    target = noise_factor * noise + x0_factor * x0        loss = mean over a sample of d(output - target)

with d(u) = u^2 ("mse"), |u| ("l1"), or u^2 / 2 below 1 and |u| - 1/2 above ("huber"). The noise is given, or drawn
again from the seed that x_t was made with: nobody has to keep it while the network runs. In float64, and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.backends.reference.noising import as_image
from ddpm_fast.backends.reference.random import normal

DISTANCES = ("mse", "l1", "huber")


def difference(output: Tensor, x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor) -> Tensor:
    """output - target, in float64; differentiable."""
    noise_factor, x0_factor = coefficients.double()[t].reshape(-1, 2, *[1] * (output.dim() - 1)).unbind(1)
    return output.double() - (noise_factor * noise.double() + x0_factor * as_image(x0).double())


def losses(u: Tensor, distance: str) -> Tensor:
    """(N,), of differences (N, *); differentiable."""
    if distance == "mse":
        values = u * u
    elif distance == "l1":
        values = u.abs()
    else:
        values = torch.where(u.abs() < 1, 0.5 * u * u, u.abs() - 0.5)
    return values.flatten(1).mean(1)


def _drawn(
    x0: Tensor, noise: Tensor | None, seed: Tensor | None, sample_ids: Tensor | None, step: Tensor, stream: int
) -> Tensor:
    if noise is None:
        assert seed is not None
        noise = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
        normal(noise, seed, sample_ids, step, stream)
    return noise


def target_loss(
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    step: Tensor,
    stream: int,
    distance: int,
    out: Tensor,
) -> None:
    """Writes the losses (N,)."""
    noise = _drawn(x0, noise, seed, sample_ids, step, stream)
    out.copy_(losses(difference(output, x0, t, coefficients, noise), DISTANCES[distance]))


def target_loss_backward(
    grad_losses: Tensor,
    output: Tensor,
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    step: Tensor,
    stream: int,
    distance: int,
    grad_output: Tensor,
) -> None:
    """Writes the gradient like output."""
    noise = _drawn(x0, noise, seed, sample_ids, step, stream)
    u = difference(output, x0, t, coefficients, noise)
    slope = {"mse": 2 * u, "l1": u.sign(), "huber": u.clamp(-1, 1)}[DISTANCES[distance]]
    scale = grad_losses.double() / (u.numel() // max(len(u), 1))
    grad_output.copy_(scale.reshape(-1, *[1] * (u.dim() - 1)) * slope)
