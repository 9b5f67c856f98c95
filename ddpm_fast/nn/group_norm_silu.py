"""GroupNorm followed by SiLU as one module, on the fused op and, for comparison, on plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import group_norm_silu

_ACTIVATIONS = ("silu", None)


def check_activation(activation: str | None) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")


class GroupNormSiLU(nn.GroupNorm):
    """``silu((group_norm(x + embedding)) * (1 + scale) + shift)`` in one pass.

    The parameters and the state dict are those of ``nn.GroupNorm``, so weights move freely between the two.

    Args:
        num_groups: groups, a divisor of ``num_channels``.
        num_channels: channels C of the input ``(N, C, *)``.
        eps: added to the variance.
        affine: whether there are a weight and a bias of shape ``(C,)``.
        activation: ``"silu"``, or ``None`` for the norm alone.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups != 0:
            raise ValueError(f"num_channels must be a multiple of num_groups, got {num_channels} and {num_groups}")
        check_activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    def forward(
        self,
        input: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        """Return ``(N, C, *)`` like ``input``; ``scale``, ``shift`` and ``embedding`` are ``(N, C)``."""
        return group_norm_silu(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            scale=scale,
            shift=shift,
            embedding=embedding,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class EagerGroupNormSiLU(GroupNormSiLU):
    """What :class:`GroupNormSiLU` computes, in PyTorch's own separate operations."""

    def forward(
        self,
        input: Tensor,
        *,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        embedding: Tensor | None = None,
    ) -> Tensor:
        spatial = (1,) * (input.ndim - 2)
        if embedding is not None:
            input = input + embedding.reshape(*embedding.shape, *spatial)
        y = F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        if scale is not None:
            y = y * (1 + scale.reshape(*scale.shape, *spatial))
        if shift is not None:
            y = y + shift.reshape(*shift.shape, *spatial)
        return F.silu(y) if self.activation == "silu" else y
