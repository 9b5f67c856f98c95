"""What solvers of second order add to a step that is DDIM's: Heun's correction and DPM-Solver++'s history."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule


def heun_weights(schedule: NoiseSchedule) -> Tensor:
    """float64 ``(S, 3)``, noisiest step first: of x_t, of the Euler step's end and of the x0 found there.

    Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models" (2022),
    algorithm 1, with sigma = sqrt(1 / abar - 1) and the state divided by sqrt(abar). The last step, to sigma 0, is
    Euler's.
    """
    abar = schedule.alphas_cumprod
    sigma = torch.sqrt((1.0 - abar) / abar)
    root, root_next = abar.sqrt(), schedule.alphas_cumprod_prev.sqrt()
    sigma_next = torch.cat([torch.zeros(1, dtype=torch.float64), sigma[:-1]])
    half = 0.5 * (sigma_next - sigma) / sigma_next
    weights = torch.stack([0.5 * root_next / root, 0.5 + half, -half * root_next], dim=1)
    weights[0] = torch.tensor([0.0, 1.0, 0.0])
    return weights.flip(0)


def multistep_weights(schedule: NoiseSchedule) -> Tensor:
    """float64 ``(S,)``, noisiest step first: the factor of x0 minus the last step's x0 that DPM-Solver++(2M) adds.

    Lu, Zhou, Bao, Chen, Li, Zhu, "DPM-Solver++" (2022), algorithm 2, whose first order is DDIM. The first step has
    no history and the last one, to an infinite log signal-to-noise ratio, makes no use of it.
    """
    abar = schedule.alphas_cumprod.flip(0)
    lam = 0.5 * (abar.log() - torch.log1p(-abar))
    h = lam[1:] - lam[:-1]  # of every step but the last
    weights = torch.zeros_like(abar)
    if len(abar) > 2:
        ratio = h[:-1] / h[1:]
        weights[1:-1] = -torch.expm1(-h[1:]) * abar[2:].sqrt() / (2.0 * ratio)
    return weights
