"""What the norms' public functions share: what they take, and what their gradients are put into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.ops import _check

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_ACTIVATIONS = {"silu": 1, None: 0}


def dense(x: Tensor) -> Tensor:
    """x, or a contiguous copy where a sample is neither contiguous nor channels_last.

    Both layouts are taken at any number of dimensions and with any stride between samples, so that a slice of the
    channels costs no copy.
    """
    if _check.is_dense(x) or x.numel() == 0:
        return x
    sample = x[0]
    return x if sample.is_contiguous() or sample.movedim(0, -1).is_contiguous() else x.contiguous()


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the samples of two dense tensors of one shape are laid out alike."""
    if a.stride() == b.stride():
        return True
    a, b = a[0], b[0]
    return (a.is_contiguous() and b.is_contiguous()) or (
        a.movedim(0, -1).is_contiguous() and b.movedim(0, -1).is_contiguous()
    )


def check_parameter(
    name: str, parameter: Any, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """The dtype and device are x's: asking x for them time and again would cost more than the rest of this."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor or None, not {type(parameter).__name__}")
    if parameter.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for x of shape {tuple(x.shape)}, not {tuple(parameter.shape)}"
        )
    if parameter.dtype != dtype and parameter.dtype != torch.float32:
        raise ValueError(f"{name} must be of x's dtype {dtype} or float32, not {parameter.dtype}")
    if parameter.device != device:
        raise ValueError(f"{name} must be on x's device {device}, not on {parameter.device}")


def check_x(x: Any, eps: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    shape = x.shape
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64, not {x.dtype}")
    if len(shape) < 2:
        raise ValueError(f"x must be (N, C, *), not of shape {tuple(shape)}")
    if x.numel() == 0 and 0 in shape[1:]:
        raise ValueError(f"x must have at least one channel and one pixel a sample, not shape {tuple(shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a float, not {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, not {eps}")


def check_out(out: Any, x: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor or None, not {type(out).__name__}")
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, as x, "
            f"not {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    samples = x.shape[0]
    if samples == 0:
        return
    size = x.numel() // samples
    if not _same_layout(out, x) or (samples > 1 and out.stride(0) < size):
        raise ValueError(
            f"out must be contiguous or channels_last, whichever x is, not of strides {out.stride()}; "
            f"x counts as contiguous where it is neither"
        )
    if not torch.compiler.is_compiling() and _overlap(out, x, size):
        raise ValueError("out must be x itself or share no memory with it")


def _overlap(out: Tensor, x: Tensor, size: int) -> bool:
    """Whether writing to `out` changes elements of x that are still to be read; a sample is a run of `size` elements.

    In place is safe: an element is read before it is written.
    """
    samples, item = x.shape[0], x.element_size()
    x_step, out_step = (t.stride(0) if samples > 1 else size for t in (x, out))
    distance = out.data_ptr() - x.data_ptr()
    if distance >= ((samples - 1) * x_step + size) * item or -distance >= ((samples - 1) * out_step + size) * item:
        return False
    if x_step != out_step:
        return True
    # Samples of one may lie between samples of the other, as two halves of the channels do.
    return distance != 0 and not size * item <= distance % (x_step * item) <= (x_step - size) * item


def activation_number(activation: str | None) -> int:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
    return _ACTIVATIONS[activation]


def laid_out_like(grad_out: Tensor, x: Tensor) -> Tensor:
    """A gradient, which may come in any layout, in that of x."""
    if grad_out.stride() == x.stride():
        return grad_out
    like = torch.empty_like(x)  # x's own samples may have gaps between them
    return grad_out if grad_out.stride() == like.stride() else like.copy_(grad_out)


def sums(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what is summed up over pixels or channels."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_gradients(x: Tensor, parameters: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """Where the gradients of x and of the parameters are to be written; None where none is needed."""
    gradients: list[Tensor | None] = [torch.empty_like(x) if needed[0] else None]
    dtype = sums(x.dtype)
    for parameter, wanted in zip(parameters, needed[1:], strict=False):
        assert parameter is not None or not wanted
        gradients.append(
            torch.empty_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
            if wanted and parameter is not None
            else None
        )
    return gradients


def cast_gradients(gradients: list[Tensor | None], parameters: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same in the dtypes of the parameters."""
    for i, parameter in enumerate(parameters, 1):
        gradient = gradients[i]
        if gradient is not None and parameter is not None and gradient.dtype != parameter.dtype:
            gradients[i] = gradient.to(parameter.dtype)
    return gradients
