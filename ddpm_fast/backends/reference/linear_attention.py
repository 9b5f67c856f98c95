"""Linear attention (Shen et al. 2018, "efficient attention"), heads apart, with a memory of further keys and values.

    q' = softmax of q over the channels, times scale        k' = softmax of k over the positions
    context[d, e] = sum over positions n of k'[d, n] v[e, n]        out[e, n] = sum over d of context[d, e] q'[d, n]

The context has the size of a head's channels squared, whatever the image's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(qkv: Tensor, memory: Tensor | None, heads: int, scale: float) -> Tensor:
    """The attention of qkv (N, 3 * heads * dim, *), in its dtype: (N, heads * dim, *)."""
    samples, channels, *spatial = qkv.shape
    q, k, v = qkv.reshape(samples, 3, heads, channels // (3 * heads), math.prod(spatial)).unbind(1)
    if memory is not None:
        memory_k, memory_v = memory.unsqueeze(1).expand(2, samples, *memory.shape[1:])
        k, v = torch.cat((memory_k, k), dim=-1), torch.cat((memory_v, v), dim=-1)
    context = k.softmax(dim=-1) @ v.transpose(-2, -1)
    out = context.transpose(-2, -1) @ (q.softmax(dim=-2) * scale)
    return out.reshape(samples, channels // 3, *spatial)


def linear_attention(qkv: Tensor, memory: Tensor | None, heads: int, scale: float, out: Tensor) -> None:
    """Writes the attention to `out`, computed in float64 and rounded once."""
    out.copy_(attend(qkv.double(), None if memory is None else memory.double(), heads, scale))


def attend_projected(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    memory: Tensor | None,
    heads: int,
    scale: float,
) -> Tensor:
    """The attention of x (N, C, H, W) between two 1x1 convolutions, in its dtype: (N, K, H, W)."""
    return F.conv2d(attend(F.conv2d(x, qkv_weight), memory, heads, scale), out_weight, out_bias)


def projected_linear_attention(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    memory: Tensor | None,
    heads: int,
    scale: float,
    out: Tensor,
) -> None:
    """Writes the attention to `out`, computed in float64 and rounded once."""
    out_bias, memory = (None if tensor is None else tensor.double() for tensor in (out_bias, memory))
    out.copy_(attend_projected(x.double(), qkv_weight.double(), out_weight.double(), out_bias, memory, heads, scale))
