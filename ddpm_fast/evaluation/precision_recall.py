"""Precision and recall of generated images, by the k nearest neighbours in a feature space."""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1000  # a block of distances holds so many rows


def precision_recall(generated: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkaanniemi, Karras, Laine, Lehtinen and Aila 2019.

    A set's manifold is the union of the balls around its points that reach to their k-th nearest neighbours in it.
    Precision is the fraction of the generated points within the real ones' manifold (are they realistic?), recall that
    of the real points within the generated ones' (do they cover everything?). Both depend on the number of points:
    compare sets of equal sizes.

    Args:
        generated, real: ``(N, D)`` and ``(M, D)`` floating-point features, more than k of each; computed in float64.
        k: which neighbour.

    Raises:
        TypeError: `k` is no int.
        ValueError: other shapes or dtypes, too few rows, values that are not finite, or k less than 1.
    """
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, features in (("generated", generated), ("real", real)):
        if features.ndim != 2 or len(features) <= k or not features.is_floating_point():
            raise ValueError(
                f"{name} must hold more than k = {k} floating-point rows (N, D), "
                f"got {features.dtype} {tuple(features.shape)}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite")
    if generated.shape[1] != real.shape[1]:
        raise ValueError(
            f"generated and real must have the same number of features, got {generated.shape[1]} and {real.shape[1]}"
        )
    generated, real = generated.double(), real.double()
    return _covered(generated, real, k), _covered(real, generated, k)


def _covered(points: Tensor, centres: Tensor, k: int) -> float:
    """The fraction of `points` within the manifold of `centres`."""
    # The nearest of all is the point itself.
    radii = torch.cat([_distances(rows, centres).kthvalue(k + 1).values for rows in centres.split(_ROWS)])
    inside = [(_distances(rows, centres) <= radii).any(1) for rows in points.split(_ROWS)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by |a|^2 + |b|^2 - 2ab, whose cancellation leaves points that are equal at some distance.
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
