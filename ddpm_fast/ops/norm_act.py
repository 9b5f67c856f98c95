"""GroupNorm, an optional scale and shift, and SiLU in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import norm_act as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

NORM_ACT = Operator(
    "norm_act",
    "Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? embedding, "
    "float eps, int activation, Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? rstd",
    reference.norm_act,
)

NORM_ACT_BACKWARD = Operator(
    "norm_act_backward",
    "Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, int num_groups, Tensor? weight, Tensor? bias, "
    "Tensor? scale, Tensor? shift, Tensor? embedding, int activation, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, "
    "Tensor(c!)? grad_bias, Tensor(d!)? grad_scale, Tensor(e!)? grad_shift, Tensor(f!)? grad_embedding",
    reference.norm_act_backward,
)

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
_ACTIVATIONS = {"silu": 1, None: 0}


def _dense(x: Tensor) -> Tensor:
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


class _NormAct(torch.autograd.Function):
    """The two operators tied together. Kept for the backward pass: x, the parameters, and (N, G) statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        embedding: Tensor | None,
        num_groups: int,
        eps: float,
        activation: int,
        backend: str,
    ) -> Tensor:
        out = torch.empty_like(x)
        # float64: at mean 1e5 rounding the mean to float32 alone would move the result by 4e-3.
        mean = torch.empty((x.shape[0], num_groups), dtype=torch.float64, device=x.device)
        rstd = torch.empty_like(mean)
        NORM_ACT[backend](x, num_groups, weight, bias, scale, shift, embedding, eps, activation, out, mean, rstd)
        ctx.save_for_backward(x, weight, bias, scale, shift, embedding, mean, rstd)
        ctx.num_groups, ctx.activation, ctx.backend = num_groups, activation, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _check.first_derivative_only("group_norm_silu")
        x, weight, bias, scale, shift, embedding, mean, rstd = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_x = torch.empty_like(x)
        if grad_out.stride() != grad_x.stride():
            grad_out = torch.empty_like(x).copy_(grad_out)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        parameters = (weight, bias, scale, shift, embedding)
        gradients: list[Tensor | None] = [grad_x if needed[0] else None]
        for i, parameter in enumerate(parameters, start=1):
            gradients.append(torch.empty(parameter.shape, dtype=dtype, device=x.device) if needed[i] else None)
        NORM_ACT_BACKWARD[ctx.backend](grad_out, x, mean, rstd, ctx.num_groups, *parameters, ctx.activation, *gradients)
        for i, parameter in enumerate(parameters, start=1):
            gradient = gradients[i]
            if gradient is not None and parameter.dtype != dtype:
                gradients[i] = gradient.to(parameter.dtype)
        return *gradients, None, None, None, None


def _check_parameter(
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


def _check_x(x: Any, num_groups: Any, eps: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    shape = x.shape
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64, not {x.dtype}")
    if len(shape) < 2:
        raise ValueError(f"x must be (N, C, *), not of shape {tuple(shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, not {type(num_groups).__name__}")
    if num_groups < 1 or shape[1] % num_groups:
        raise ValueError(f"num_groups must divide x's {shape[1]} channels, not be {num_groups}")
    if x.numel() == 0 and 0 in shape[1:]:
        raise ValueError(f"x must have at least one channel and one pixel a sample, not shape {tuple(shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a float, not {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, not {eps}")


def _check_out(out: Any, x: Tensor) -> None:
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


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    out: Tensor | None = None,
    *,
    embedding: Tensor | None = None,
) -> Tensor:
    """`silu((group_norm(x + embedding) * weight + bias) * (1 + scale) + shift)` in one pass.

    GroupNorm is that of Wu and He (2018), with the biased variance; the scale and shift are how Dhariwal and Nichol
    (2021) put the time embedding into a residual block. Statistics are accumulated about local means, so a large
    mean costs no accuracy; a sample's result does not depend on its batch, nor on the number of threads.

    Args:
        x: (N, C, *), any number of spatial dimensions, also none; float32, float16, bfloat16, or float64 on the
            reference backend. Contiguous and channels_last tensors are taken as they are, others are copied first.
        num_groups: G, a divisor of C.
        weight, bias: (C,), of x's dtype or float32.
        eps: added to the variance.
        scale, shift: (N, C), of x's dtype or float32; views such as the halves of a linear layer's output are
            not copied.
        activation: "silu", or None for none.
        out: receives the result: a tensor of x's shape, dtype and layout, x itself included. Without gradients only.
        embedding: (N, C), added to x before the statistics.

    Returns:
        (N, C, *) of x's dtype and layout, `out` where it was given.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: for `out` where a gradient is needed, and when a second derivative is asked for.
    """
    _check_x(x, num_groups, eps)
    dtype, device = x.dtype, x.device
    per_sample = x.shape[:2]
    if weight is not None:
        _check_parameter("weight", weight, per_sample[1:], x, dtype, device)
    if bias is not None:
        _check_parameter("bias", bias, per_sample[1:], x, dtype, device)
    if scale is not None:
        _check_parameter("scale", scale, per_sample, x, dtype, device)
    if shift is not None:
        _check_parameter("shift", shift, per_sample, x, dtype, device)
    if embedding is not None:
        _check_parameter("embedding", embedding, per_sample, x, dtype, device)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
    backend = backends.choose(x)
    x = _dense(x)
    act = _ACTIVATIONS[activation]
    if out is not None:
        _check_out(out, x)
    if _check.needs_grad(x, weight, bias, scale, shift, embedding, out):
        if out is not None:
            raise RuntimeError("group_norm_silu: out= is for calls without gradients; use torch.no_grad()")
        return _NormAct.apply(x, weight, bias, scale, shift, embedding, num_groups, eps, act, backend)  # type: ignore[no-any-return,no-untyped-call]
    if out is None:
        out = torch.empty_like(x)
    NORM_ACT[backend](x, num_groups, weight, bias, scale, shift, embedding, eps, act, out, None, None)
    return out
