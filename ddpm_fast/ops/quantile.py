"""The quantile of each sample's magnitudes, without sorting them and without torch.quantile's limit on the size."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import quantile as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

ABS_QUANTILE = Operator("abs_quantile", "Tensor x, float q, Tensor(a!) out", reference.abs_quantile)


def abs_quantile(x: Tensor, q: float) -> Tensor:
    """The q quantile of |x| of each sample, `torch.quantile(x.flatten(1).abs(), q, dim=1)`.

    Linear between neighbours, in torch.lerp's formula with each operation rounded on its own; NaN where a sample holds
    a NaN. Samples may have more than 2^24 elements, where torch.quantile refuses. Dynamic thresholding (Saharia et al.
    2022, section 2.3) is made of it.

    Args:
        x: (N, *) float32, any layout; float64 runs on the reference backend. A sample has at least one element.
        q: in [0, 1].

    Returns:
        (N,) in x's dtype. Differentiable.

    Raises:
        TypeError, ValueError: for anything outside the types, shapes, dtypes and ranges above.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be float32 or float64, not {x.dtype}")
    if x.dim() < 2 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (N, *) with at least one element a sample, not of shape {tuple(x.shape)}")
    if isinstance(q, bool) or not isinstance(q, (int, float)):
        raise TypeError(f"q must be a real number, not {type(q).__name__}")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"q must lie in [0, 1], not {q}")
    if _check.needs_grad(x):
        # The same bits as the kernels', and autograd knows the way back.
        return reference.quantile_of_magnitudes(x, q)
    out = x.new_empty(x.shape[0])
    ABS_QUANTILE[backends.choose(x)](x if _check.is_dense(x) else x.contiguous(), q, out)
    return out
