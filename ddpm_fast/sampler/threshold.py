"""Dynamic thresholding: the bound that each sample's x0 is clipped to."""

from __future__ import annotations

from torch import Tensor

from ddpm_fast.ops.quantile import abs_quantile


def dynamic_bound(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """The `ratio` quantile of |x0| of each sample, between 1 and `maximum`.

    Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022),
    section 2.3.

    Args:
        x0: float32 ``(N, C, *)`` in any layout.
        ratio: in (0, 1].
        maximum: at least 1, may be infinite.

    Returns:
        float32 ``(N,)``.
    """
    return abs_quantile(x0, ratio).clamp_(1.0, maximum)
