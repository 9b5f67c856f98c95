"""Dynamic thresholding: the bound that each sample's x0 is clipped to."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EXACT_FLOAT32 = 1 << 24


def dynamic_bound(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """The `ratio` quantile of |x0| of each sample, between 1 and `maximum`.

    Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022),
    section 2.3. The quantile is torch.quantile's, linear between neighbours, without its limit on the size.

    Args:
        x0: float32 ``(N, C, *)`` in any layout.
        ratio: in (0, 1].
        maximum: at least 1, may be infinite.

    Returns:
        float32 ``(N,)``.
    """
    magnitudes = x0.reshape(x0.shape[0], -1).abs()
    last = magnitudes.shape[1] - 1
    # Up to here the rank is rounded to float32, as torch.quantile does; beyond, float32 holds no exact ranks.
    rounded = last < _EXACT_FLOAT32
    rank = float(torch.tensor(ratio, dtype=torch.float32) * last) if rounded else ratio * last
    below = math.floor(rank)
    # The wanted neighbours are the smallest of the largest; a full sort would order the rest for nothing.
    largest = torch.topk(magnitudes, last - below + 1, dim=1).values
    low, high = largest[:, -1], largest[:, max(largest.shape[1] - 2, 0)]
    return torch.lerp(low, high, rank - below).clamp_(1.0, maximum)
