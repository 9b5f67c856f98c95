"""Linear attention in one op: both softmaxes and both products of every head, and the projections around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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

PROJECTED_LINEAR_ATTENTION = Operator(
    "projected_linear_attention",
    "Tensor x, Tensor qkv_weight, Tensor out_weight, Tensor? out_bias, Tensor? memory, int heads, float scale, "
    "Tensor(a!) out",
    reference.projected_linear_attention,
    on=("reference", "cpu"),
)

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_MOST_CHANNELS = 128  # of a head, as in csrc/cpu/linear_attention.cpp
_PROJECTED_CHANNELS = 5  # of input and output together, a pixel; measured (docs/networks.md)


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
        _check_memory(memory, (2, heads, dim), "qkv", qkv)
    scale = _scale(scale, dim)
    if _check.is_transformed():  # torch.func has no memory formats either
        return reference.attend(qkv, memory, heads, scale)
    layout = _layout(qkv)
    backend = backends.choose(qkv)
    kernel = backend == "cpu" and qkv.dtype == torch.float32 and dim <= _MOST_CHANNELS
    asked_for = backends.forced() == "reference"
    if not (kernel or asked_for) or _check.needs_grad(qkv, memory):
        return reference.attend(qkv, memory, heads, scale).contiguous(memory_format=layout)
    shape = (qkv.shape[0], heads * dim, *qkv.shape[2:])
    out = torch.empty(shape, dtype=qkv.dtype, device=qkv.device, memory_format=layout)
    if memory is not None:
        memory = memory.contiguous()
    LINEAR_ATTENTION[backend](_check.one_pixel_stride(qkv), memory, heads, scale, out)
    return out


def is_projecting_faster(channels: int, outputs: int, dim: int, pixels: int) -> bool:
    """Whether the kernel with the projections in it is faster than the projections as convolutions around the other.

    It spares a sample 2 * dim products a pixel and channel of the heads, and takes dim * (C + K) once. The number of
    samples is no argument: a sample's bits must not depend on its batch.

    Args:
        channels, outputs: C and K.
        dim: channels of a head.
        pixels: H * W.
    """
    return dim % 16 == 0 and dim <= _MOST_CHANNELS and channels + outputs <= _PROJECTED_CHANNELS * pixels


def projected_linear_attention(
    x: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    *,
    heads: int,
    memory: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`conv2d(linear_attention(conv2d(x, qkv_weight), heads, ...), out_weight, out_bias)` with 1x1 kernels.

    On the CPU in float32, without gradients, where `is_projecting_faster` says so, a kernel computes the keys and the
    queries a few pixels at a time and makes no tensor but the result. With pixels in rows, a head's context times the
    output's weight is (softmax(X Wk')' X) Wv' Wo', so that the values of the pixels are not made at all. An element's
    bits depend neither on the batch, nor on the number of threads, nor on the instruction set. Everything else runs as
    the three operations.

    Args:
        x: (N, C, H, W), float32, float16, bfloat16 or float64, contiguous or channels_last.
        qkv_weight: (3 * heads * dim, C, 1, 1) of x's dtype.
        out_weight: (K, heads * dim, 1, 1) of x's dtype.
        out_bias: (K,) of x's dtype, or None.
        heads, memory, scale: as `linear_attention` takes them.

    Returns:
        (N, K, H, W) of x's dtype, channels_last where x is. Differentiable.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device or value.
    """
    dim = _check_projections(x, qkv_weight, out_weight, out_bias, heads)
    if memory is not None:
        _check_memory(memory, (2, heads, dim), "x", x)
    scale = _scale(scale, dim)
    backend = backends.choose(x)
    outputs, pixels = out_weight.shape[0], x.shape[2] * x.shape[3]
    kernel = backend == "cpu" and x.dtype == torch.float32 and is_projecting_faster(x.shape[1], outputs, dim, pixels)
    asked_for = backends.forced() == "reference"
    other = _check.is_transformed() or _check.needs_grad(x, qkv_weight, out_weight, out_bias, memory)
    if other or not (kernel or asked_for):
        y = linear_attention(F.conv2d(x, qkv_weight), heads, memory=memory, scale=scale)
        return F.conv2d(y, out_weight, out_bias)
    out = torch.empty((x.shape[0], outputs, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=_layout(x))
    weights = (None if tensor is None else tensor.contiguous() for tensor in (qkv_weight, out_weight, out_bias, memory))
    PROJECTED_LINEAR_ATTENTION[backend](_check.one_pixel_stride(x), *weights, heads, scale, out)
    return out


def _scale(scale: Any, dim: int) -> float:
    if scale is None:
        return float(dim**-0.5)
    if isinstance(scale, bool) or not isinstance(scale, (float, int)):
        raise TypeError(f"scale must be a float or None, not {type(scale).__name__}")
    return scale


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of the result."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is None or x.is_contiguous() or not x.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last


def _check_heads(heads: Any) -> None:
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, not {type(heads).__name__}")
    if heads < 1:
        raise ValueError(f"heads must be at least 1, not {heads}")


def _check_image(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float16, bfloat16 or float64, not {x.dtype}")


def _check_qkv(qkv: Any, heads: Any) -> None:
    _check_image("qkv", qkv)
    _check_heads(heads)
    shape = tuple(qkv.shape)
    if len(shape) < 2 or 0 in shape[1:] or shape[1] % (3 * heads) != 0:
        raise ValueError(
            f"qkv must be (N, 3 * {heads} * dim, *) with at least one channel a head and one pixel, "
            f"not of shape {shape}"
        )


def _check_projections(x: Any, qkv_weight: Any, out_weight: Any, out_bias: Any, heads: Any) -> int:
    """The channels of a head."""
    _check_image("x", x)
    _check_heads(heads)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must be (N, C, H, W) with at least one channel and pixel, not of shape {tuple(x.shape)}")
    _check_like("qkv_weight", qkv_weight, "x", x)
    rows: int = qkv_weight.shape[0] if qkv_weight.dim() else 0
    if tuple(qkv_weight.shape) != (rows, x.shape[1], 1, 1) or rows == 0 or rows % (3 * heads) != 0:
        raise ValueError(
            f"qkv_weight must be (3 * {heads} * dim, {x.shape[1]}, 1, 1), not of shape {tuple(qkv_weight.shape)}"
        )
    _check_like("out_weight", out_weight, "x", x)
    if out_weight.dim() != 4 or out_weight.shape[1:] != (rows // 3, 1, 1) or out_weight.shape[0] == 0:
        raise ValueError(f"out_weight must be (K, {rows // 3}, 1, 1), not of shape {tuple(out_weight.shape)}")
    if out_bias is not None:
        _check_like("out_bias", out_bias, "x", x)
        if out_bias.shape != out_weight.shape[:1]:
            raise ValueError(f"out_bias must be ({out_weight.shape[0]},), not of shape {tuple(out_bias.shape)}")
    return int(rows // (3 * heads))


def _check_like(name: str, tensor: Any, main: str, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} must be {x.dtype} on {x.device}, as {main}, not {tensor.dtype} on {tensor.device}")


def _check_memory(memory: Any, shape: tuple[int, ...], main: str, x: Tensor) -> None:
    if not isinstance(memory, Tensor):
        raise TypeError(f"memory must be a tensor or None, not {type(memory).__name__}")
    if memory.dim() != 4 or memory.shape[:3] != shape:
        raise ValueError(f"memory must be {shape} and one more dimension, not of shape {tuple(memory.shape)}")
    _check_like("memory", memory, main, x)
