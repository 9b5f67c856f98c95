"""Sinusoidal embedding of the timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Cosines then sines of ``t * max_period ** (-k / (dim / 2))``, ``k = 0 .. dim/2 - 1``.

    Vaswani et al. 2017, section 3.5, on the timestep as in Ho et al. 2020, appendix B.

    Args:
        t: ``(N,)``, integer or floating point.
        dim: even width of the embedding.
        max_period: period of the slowest pair, over 2 pi.

    Returns:
        ``(N, dim)`` float32 on t's device.

    Raises:
        ValueError: ``t`` is not one-dimensional, or ``dim`` is not a positive even number.
    """
    if t.ndim != 1:
        raise ValueError(f"t must have shape (N,), got {tuple(t.shape)}")
    if dim < 2 or dim % 2 != 0:
        raise ValueError(f"dim must be a positive even number, got {dim}")
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(max_period) / half))
    angles = t.to(torch.float32)[:, None] * frequencies[None, :]
    return torch.cat((torch.cos(angles), torch.sin(angles)), dim=1)
