"""GroupNorm, an optional scale and shift, and SiLU in one pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

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
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, embedding, mean, rstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        if grad_out.stride() != grad_x.stride():
            grad_out = torch.empty_like(x).copy_(grad_out)
        parameters = (weight, bias, scale, shift, embedding)
        sums = torch.promote_types(x.dtype, torch.float32)
        gradients = [
            None if parameter is None or not needed else torch.empty(parameter.shape, dtype=sums, device=x.device)
            for parameter, needed in zip(parameters, ctx.needs_input_grad[1:6], strict=True)
        ]
        NORM_ACT_BACKWARD[ctx.backend](
            grad_out,
            x,
            mean,
            rstd,
            ctx.num_groups,
            *parameters,
            ctx.activation,
            grad_x if ctx.needs_input_grad[0] else None,
            *gradients,
        )
        casts = [
            None if gradient is None else gradient.to(parameter.dtype)
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return grad_x if ctx.needs_input_grad[0] else None, *casts, None, None, None, None


def _check_parameter(name: str, parameter: Any, shape: tuple[int, ...], x: Tensor) -> None:
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} must be a tensor or None, not {type(parameter).__name__}")
    if parameter.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} for x of shape {tuple(x.shape)}, not {tuple(parameter.shape)}"
        )
    if parameter.dtype != x.dtype and parameter.dtype != torch.float32:
        raise ValueError(f"{name} must be of x's dtype {x.dtype} or float32, not {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, not on {parameter.device}")


def _check_x(x: Any, num_groups: Any, eps: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, float16, bfloat16 or float64, not {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *), not of shape {tuple(x.shape)}")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, not {type(num_groups).__name__}")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"num_groups must divide x's {x.shape[1]} channels, not be {num_groups}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one channel and one pixel a sample, not shape {tuple(x.shape)}")
    if isinstance(eps, bool) or not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a float, not {type(eps).__name__}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite, not {eps}")


def _check_out(out: Any, x: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor or None, not {type(out).__name__}")
    samples = x.shape[0]
    size = x.numel() // max(samples, 1)
    if out.shape != x.shape or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"out must be {x.dtype} of shape {tuple(x.shape)} on {x.device}, as x, "
            f"not {out.dtype} of shape {tuple(out.shape)} on {out.device}"
        )
    if samples and not (_same_layout(out, x) and (samples == 1 or out.stride(0) >= size)):
        raise ValueError(f"out must be laid out like x, with strides {x.stride()}, not {out.stride()}")
    if torch.compiler.is_compiling() or not samples:
        return
    # In place is safe, since each element is read before it is written, but only where element meets element.
    first, last = x.data_ptr(), x.data_ptr() + ((samples - 1) * x.stride(0) + size) * x.element_size()
    start, end = out.data_ptr(), out.data_ptr() + ((samples - 1) * out.stride(0) + size) * x.element_size()
    if start < last and first < end and not (start == first and out.stride(0) == x.stride(0)):
        raise ValueError("out must be x itself or share no memory with it")


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
        out: receives the result: a tensor of x's shape, dtype and strides, x itself included. Without gradients only.
        embedding: (N, C), added to x before the statistics.

    Returns:
        (N, C, *) of x's dtype and layout, `out` where it was given.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: for `out` where a gradient is needed, and when a second derivative is asked for.
    """
    _check_x(x, num_groups, eps)
    channels = x.shape[1]
    if weight is not None:
        _check_parameter("weight", weight, (channels,), x)
    if bias is not None:
        _check_parameter("bias", bias, (channels,), x)
    if scale is not None:
        _check_parameter("scale", scale, (x.shape[0], channels), x)
    if shift is not None:
        _check_parameter("shift", shift, (x.shape[0], channels), x)
    if embedding is not None:
        _check_parameter("embedding", embedding, (x.shape[0], channels), x)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be 'silu' or None, not {activation!r}")
    backend = "reference"  # until the C++ kernel is registered
    x = _dense(x)
    act = _ACTIVATIONS[activation]
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias, scale, shift, embedding, out)
    ):
        if out is not None:
            raise RuntimeError("group_norm_silu: out= is for calls without gradients; use torch.no_grad()")
        return _NormAct.apply(x, weight, bias, scale, shift, embedding, num_groups, eps, act, backend)  # type: ignore[no-any-return,no-untyped-call]
    if out is None:
        out = torch.empty_like(x)
    else:
        _check_out(out, x)
    NORM_ACT[backend](x, num_groups, weight, bias, scale, shift, embedding, eps, act, out, None, None)
    return out
