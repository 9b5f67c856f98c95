"""Linear attention in one op: both softmaxes and both products of every head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import linear_attention as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

LINEAR_ATTENTION = Operator(
    "linear_attention",
    "Tensor qkv, Tensor? memory, int heads, float scale, Tensor(a!) out",
    reference.linear_attention,
    on=("reference", "cpu"),
)

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_MOST_CHANNELS = 128  # of a head, as in csrc/cpu/linear_attention.cpp


def linear_attention(qkv: Tensor, heads: int, *, memory: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Attention whose cost grows with the pixels, not with their square (Shen et al. 2018), every head in one pass.

    `out = (softmax(k, over pixels) v^T)^T (softmax(q, over channels) * scale)`, head by head, as the annotated
    article's `LinearAttention` has it and, with `memory`, lucidrains' denoising-diffusion-pytorch.

    On the CPU in float32, without gradients and with heads of up to 128 channels, a kernel reads qkv once and makes no
    tensor but the result; its error against float64 is at most that of the operations one by one, and an element's
    bits depend neither on the batch, nor on the number of threads, nor on the instruction set. Everything else runs as
    those operations, in torch.

    Args:
        qkv: (N, 3 * heads * dim, *), any number of spatial dimensions: queries, keys and values one after the other,
            heads inside, as a 1x1 convolution gives them. float32, float16, bfloat16 or float64. Contiguous and
            channels_last tensors are taken as they are; channels_last is faster.
        heads: the number of heads.
        memory: (2, heads, dim, n) of qkv's dtype: keys and values of n further positions, before those of the image.
        scale: what the queries are multiplied by after their softmax; None is `dim ** -0.5`.

    Returns:
        (N, heads * dim, *) of qkv's dtype, channels_last where qkv is. Differentiable.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device or value.
    """
    _check_qkv(qkv, heads)
    dim = qkv.shape[1] // (3 * heads)
    if memory is not None:
        _check_memory(memory, (2, heads, dim), qkv)
    if scale is None:
        scale = dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a float or None, not {type(scale).__name__}")
    if _check.is_transformed():  # torch.func has no memory formats either
        return reference.attend(qkv, memory, heads, scale)
    layout = _layout(qkv)
    backend = backends.choose(qkv)
    kernel = backend == "cpu" and qkv.dtype == torch.float32 and dim <= _MOST_CHANNELS
    asked_for = backend == "reference" == backends._forced
    if not (kernel or asked_for) or _check.needs_grad(qkv, memory):
        return reference.attend(qkv, memory, heads, scale).contiguous(memory_format=layout)
    shape = (qkv.shape[0], heads * dim, *qkv.shape[2:])
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device, memory_format=layout)
    if memory is not None:
        memory = memory.contiguous()
    LINEAR_ATTENTION[backend](_check.one_pixel_stride(qkv), memory, heads, scale, out)
    return out


def _layout(qkv: Tensor) -> torch.memory_format:
    """The memory format of the result."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(qkv.dim())
    if last is None or qkv.is_contiguous() or not qkv.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _check_qkv(qkv: Any, heads: Any) -> None:
    if not isinstance(qkv, Tensor):
        raise TypeError(f"qkv must be a tensor, not {type(qkv).__name__}")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, not {type(heads).__name__}")
    if qkv.dtype not in _DTYPES:
        raise ValueError(f"qkv must be float32, float16, bfloat16 or float64, not {qkv.dtype}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")
    shape = tuple(qkv.shape)
    if len(shape) < 2 or 0 in shape[1:] or shape[1] % (3 * heads) != 0:
        raise ValueError(
            f"qkv must be (N, 3 * {heads} * dim, *) with at least one channel a head and one pixel, "
            f"not of shape {shape}"
        )


def _check_memory(memory: Any, shape: tuple[int, ...], qkv: Tensor) -> None:
    if not isinstance(memory, Tensor):
        raise TypeError(f"memory must be a tensor or None, not {type(memory).__name__}")
    if memory.dim() != 4 or memory.shape[:3] != shape:
        raise ValueError(f"memory must be {shape} and one more dimension, not of shape {tuple(memory.shape)}")
    if memory.dtype != qkv.dtype or memory.device != qkv.device:
        raise ValueError(f"memory must be {qkv.dtype} on {qkv.device}, as qkv, not {memory.dtype} on {memory.device}")
