"""Imagen's loop, written out in plain PyTorch from its paper and RePaint's (Saharia et al. 2022, Lugmayr et al. 2022).

The schedules are those of Kingma et al. 2021, in float32, and an ancestral step is their equation 33. Noise is drawn
in the order of RePaint's algorithm 1: the step's, that of the known part, that of the way back.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def log_snr(name: str, t: Tensor) -> Tensor:
    if name == "linear":
        return -torch.log(torch.expm1(1e-4 + 10 * (t**2)))
    return -torch.log((torch.cos((t + 0.008) / (1 + 0.008) * math.pi * 0.5) ** -2 - 1).clamp(min=1e-5))


def alpha_sigma(ratio: Tensor) -> tuple[Tensor, Tensor]:
    return ratio.sigmoid().sqrt(), (-ratio).sigmoid().sqrt()


def q_sample(name: str, x0: Tensor, t: float, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x0 noised to the time t, and the log signal-to-noise ratio there."""
    ratio = log_snr(name, torch.tensor(t))
    alpha, sigma = alpha_sigma(ratio)
    return alpha * x0 + sigma * noise, ratio


def dynamic_threshold(x0: Tensor, percentile: float) -> Tensor:
    s = torch.quantile(x0.flatten(1).abs(), percentile, dim=-1).clamp(min=1.0)[:, None, None, None]
    return x0.clamp(-s, s) / s


def sample_loop(
    epsilon: Callable[[Tensor, Tensor], Tensor],
    name: str,
    steps: int,
    shape: tuple[int, ...],
    percentile: float,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    resample: int = 1,
) -> Tensor:
    """Images from a function of the state and the log signal-to-noise ratios of its samples, guidance included."""
    x = torch.randn(shape)
    times = torch.linspace(1.0, 0.0, steps + 1)
    for i in range(steps):
        last = i + 1 == steps
        now, then = log_snr(name, times[i]), log_snr(name, times[i + 1])
        (alpha, sigma), (alpha_next, sigma_next) = alpha_sigma(now), alpha_sigma(then)
        repetitions = 1 if last or known is None else resample
        for u in range(repetitions):
            x0 = (x - sigma * epsilon(x, now.expand(len(x)))) / alpha.clamp(min=1e-8)
            x0 = dynamic_threshold(x0, percentile)
            c = -torch.expm1(now - then)
            x = alpha_next * (x * (1 - c) / alpha + c * x0)
            if not last:
                log_variance = torch.log((sigma_next**2 * c).clamp(min=1e-20))
                x = x + (0.5 * log_variance).exp() * torch.randn(shape)
            if known is not None and mask is not None:
                noised = known if last else alpha_next * known + sigma_next * torch.randn(shape)
                x = noised * mask + (1 - mask) * x
            if u + 1 < repetitions:
                kept = alpha / alpha_next
                x = kept * x + (1 - kept**2).sqrt() * torch.randn(shape)
    return x
