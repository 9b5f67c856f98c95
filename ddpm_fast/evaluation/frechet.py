"""Frechet distance between two sets of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of the normal distributions fitted to two sets of features.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``, the FID of Heusel et al. 2017 on any features, in float64.
    With ``C = R' R``, the trace is the least ``|R_a' - R_b' Q|_F^2`` over orthogonal Q (the Bures distance as a
    Procrustes problem). Computed so, nothing cancels: equal sets give 0 up to rounding, and singular covariances
    need no special care.

    Args:
        a, b: ``(N, D)`` and ``(M, D)`` floating-point features, N and M at least 2.

    Raises:
        ValueError: other shapes or dtypes, or values that are not finite.
    """
    for name, features in (("a", a), ("b", b)):
        if features.ndim != 2 or len(features) < 2 or not features.is_floating_point():
            raise ValueError(
                f"{name} must hold at least 2 floating-point rows (N, D), got {features.dtype} {tuple(features.shape)}"
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"{name} holds values that are not finite")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same number of features, got {a.shape[1]} and {b.shape[1]}")
    mean_a, root_a = _mean_and_root(a)
    mean_b, root_b = _mean_and_root(b)
    u, _, vh = torch.linalg.svd(root_b @ root_a.T)
    spread = (root_a.T - root_b.T @ (u @ vh)).square().sum()
    return float((mean_a - mean_b).square().sum() + spread)


def _mean_and_root(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and R ``(D, D)`` with ``R' R`` the unbiased covariance."""
    features = features.double()
    mean = features.mean(0)
    # QR of the centred rows: the covariance itself, which squares the condition number, is never formed.
    root = torch.linalg.qr((features - mean) / (len(features) - 1) ** 0.5, mode="r").R
    missing = features.shape[1] - len(root)
    return mean, torch.nn.functional.pad(root, (0, 0, 0, max(0, missing)))
