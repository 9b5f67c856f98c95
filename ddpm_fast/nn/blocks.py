"""The building blocks of the U-Net: residual block, self-attention, up- and down-sampling."""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._derived import Derived
from .conv import Conv3x3
from .folded import Folded, attend, fold, folding_is_safe
from .group_norm_silu import GroupNormSiLU

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear, Conv3x3)


def zero_init(module: Layer) -> Layer:
    """Set weight and bias to zero, so that a residual branch starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the time embedding entering at the second norm, plus a skip connection.

    Args:
        in_channels, out_channels: channels in and out.
        embedding_dim: width of the (already activated) time embedding.
        num_groups: groups of both norms.
        time_embedding: ``"add"`` (Ho et al. 2020: added before the second norm) or ``"scale_shift"``
            (Dhariwal & Nichol 2021: scales and shifts after it).
        dropout: probability, applied before the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        embedding_dim: int,
        num_groups: int,
        time_embedding: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.scale_shift = time_embedding == "scale_shift"
        self.norm1 = GroupNormSiLU(num_groups, in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.embedding = nn.Linear(embedding_dim, 2 * out_channels if self.scale_shift else out_channels)
        self.norm2 = GroupNormSiLU(num_groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(Conv3x3(out_channels, out_channels))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x (N, in_channels, H, W)``, ``embedding (N, embedding_dim)`` -> ``(N, out_channels, H, W)``."""
        h = self.conv1(self.norm1(x))
        e = self.embedding(embedding)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h, scale=scale, shift=shift)
        else:
            h = self.norm2(h, embedding=e)
        h = self.dropout(h)
        if self.conv2.plan(h).tile is not None:
            return self.conv2(h, self.skip(x))  # type: ignore[no-any-return]
        h = self.conv2(h)
        return self.skip(x) + h  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, with a norm before and a skip around it.

    With one head, in float32 on the CPU and where no gradient is needed, its four projections are two
    (``nn.folded.fold``).
    """

    # Whether projections are folded where they can be: not a matter of the checkpoint.
    folds: bool = True

    def __init__(self, channels: int, *, num_heads: int, num_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNormSiLU(num_groups, channels, activation=None)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.project = zero_init(nn.Linear(channels, channels))
        self._folded: Derived[Folded] = Derived()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` -> the same shape."""
        n, c, h, w = x.shape
        # In channels_last this permutation is the memory order, and nothing is copied. In a contiguous image it is a
        # view as well, of rows whose elements lie apart: PyTorch then takes slower kernels for everything below.
        rows = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c).contiguous()
        parameters = (self.qkv.weight, self.qkv.bias, self.project.weight, self.project.bias)
        if self.folds and self.num_heads == 1 and folding_is_safe(rows, parameters):
            out = attend(rows, self._folded.get(parameters, _fold_qkv))
            return x + out.reshape(n, h, w, c).permute(0, 3, 1, 2)
        qkv = self.qkv(rows).reshape(n, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.project(out).reshape(n, h, w, c).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def _fold_qkv(qkv: Tensor, qkv_bias: Tensor, project: Tensor, project_bias: Tensor) -> Folded:
    q, k, v = qkv.chunk(3)
    q_bias, _, v_bias = qkv_bias.chunk(3)
    return fold(q, k, v, project, q_bias, v_bias, project_bias)


class Downsample(nn.Module):
    """Halve height and width with a strided 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Double height and width (nearest neighbour), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, upsample=True)  # type: ignore[no-any-return]
