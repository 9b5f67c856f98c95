"""RMSNorm over the channels followed by SiLU as one module, on the fused op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import rms_norm_silu
from .group_norm_silu import check_activation


class RMSNormSiLU(nn.Module):
    """``silu(rms_norm(x) * weight * (1 + scale) + shift)`` in one pass, the norm over a pixel's channels.

    Args:
        num_channels: channels C of the input ``(N, C, *)``.
        eps: the least Euclidean norm that is divided by.
        affine: whether there is a weight of shape ``(C,)``.
        activation: ``"silu"``, or ``None`` for the norm alone.

    Raises:
        ValueError: for fewer than one channel, or another activation.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-12,
        affine: bool = True,
        *,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_channels < 1:
            raise ValueError(f"num_channels must be at least 1, got {num_channels}")
        check_activation(activation)
        super().__init__()
        self.num_channels, self.eps, self.activation = num_channels, eps, activation
        weight = nn.Parameter(torch.ones(num_channels, device=device, dtype=dtype)) if affine else None
        self.register_parameter("weight", weight)

    def forward(self, input: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Return ``(N, C, *)`` like ``input``; ``scale`` and ``shift`` are ``(N, C)``."""
        return rms_norm_silu(input, self.weight, self.eps, scale, shift, self.activation)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.weight is not None}, activation={self.activation}"
