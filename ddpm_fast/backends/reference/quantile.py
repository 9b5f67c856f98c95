"""The quantile of each sample's magnitudes, as torch.quantile interpolates it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Above it float32 holds no exact ranks; torch.quantile refuses such sizes.
_EXACT_FLOAT32 = 1 << 24


def rank_of(q: float, size: int, dtype: torch.dtype) -> tuple[int, float]:
    """The place of the q quantile among `size` ascending values: the number of the one below, and the way to the next.

    torch.quantile computes the place in the values' own dtype, and so does this as far as float32 holds it exactly.
    """
    last = size - 1
    rounded = dtype == torch.float32 and last < _EXACT_FLOAT32
    place = float(torch.tensor(q, dtype=torch.float32) * last) if rounded else q * last
    below = math.floor(place)
    return below, place - below


def quantile_of_magnitudes(x: Tensor, q: float) -> Tensor:
    """(N,), the q quantile of |x| of each sample of x (N, *); NaN where a sample holds one; differentiable."""
    values = x.flatten(1).abs().sort(dim=1).values  # NaN last
    below, weight = rank_of(q, values.shape[1], x.dtype)
    low, high = values[:, below], values[:, min(below + (weight > 0.0), values.shape[1] - 1)]
    # torch.lerp's formula, which is exact at both ends; lerp itself fuses on some processors.
    way = torch.tensor(weight, dtype=x.dtype)
    between = low + way * (high - low) if way < 0.5 else high - (high - low) * (1 - way)
    return torch.where(values[:, -1].isnan(), values[:, -1], between)


def abs_quantile(x: Tensor, q: float, out: Tensor) -> None:
    out.copy_(quantile_of_magnitudes(x, q))
