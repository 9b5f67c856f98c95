"""The annotated article's loop and schedules, written out from Ho et al. 2020, algorithm 2, in float32 throughout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def betas(name: str, timesteps: int) -> Tensor:
    low, high = 0.0001, 0.02
    if name == "linear":
        return torch.linspace(low, high, timesteps)
    if name == "quadratic":
        return torch.linspace(low**0.5, high**0.5, timesteps) ** 2
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (high - low) + low
    points = torch.linspace(0, timesteps, timesteps + 1)
    abar = torch.cos(((points / timesteps) + 0.008) / (1 + 0.008) * math.pi * 0.5) ** 2
    abar = abar / abar[0]
    return torch.clip(1 - (abar[1:] / abar[:-1]), 0.0001, 0.9999)


def p_sample_loop(model: nn.Module, beta: Tensor, shape: tuple[int, ...]) -> Tensor:
    alphas = 1.0 - beta
    abar = torch.cumprod(alphas, dim=0)
    previous = torch.cat([torch.ones(1), abar[:-1]])
    recip, root = torch.sqrt(1.0 / alphas), torch.sqrt(1.0 - abar)
    variance = beta * (1.0 - previous) / (1.0 - abar)

    def read(table: Tensor, t: Tensor) -> Tensor:
        return table.gather(-1, t).reshape(-1, 1, 1, 1)

    x = torch.randn(shape)
    with torch.no_grad():
        for k in reversed(range(len(beta))):
            t = torch.full((shape[0],), k, dtype=torch.long)
            x = read(recip, t) * (x - read(beta, t) * model(x, t) / read(root, t))
            if k > 0:
                x = x + torch.sqrt(read(variance, t)) * torch.randn_like(x)
    return x
