"""GroupNorm, an optional scale and shift, and SiLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import norm_act as reference
from ddpm_fast.ops import _check, _norm
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
        grad_out = _norm.laid_out_like(grad_out, x)
        parameters = (weight, bias, scale, shift, embedding)
        gradients = _norm.empty_gradients(x, parameters, ctx.needs_input_grad)
        NORM_ACT_BACKWARD[ctx.backend](grad_out, x, mean, rstd, ctx.num_groups, *parameters, ctx.activation, *gradients)
        return *_norm.cast_gradients(gradients, parameters), None, None, None, None


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
    _norm.check_x(x, eps)
    dtype, device = x.dtype, x.device
    per_sample = x.shape[:2]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"num_groups must be an int, not {type(num_groups).__name__}")
    if num_groups < 1 or per_sample[1] % num_groups:
        raise ValueError(f"num_groups must divide x's {per_sample[1]} channels, not be {num_groups}")
    if weight is not None:
        _norm.check_parameter("weight", weight, per_sample[1:], x, dtype, device)
    if bias is not None:
        _norm.check_parameter("bias", bias, per_sample[1:], x, dtype, device)
    if scale is not None:
        _norm.check_parameter("scale", scale, per_sample, x, dtype, device)
    if shift is not None:
        _norm.check_parameter("shift", shift, per_sample, x, dtype, device)
    if embedding is not None:
        _norm.check_parameter("embedding", embedding, per_sample, x, dtype, device)
    act = _norm.activation_number(activation)
    backend = backends.choose(x)
    x = _norm.dense(x)
    if out is not None:
        _norm.check_out(out, x)
    if _check.needs_grad(x, weight, bias, scale, shift, embedding, out):
        if out is not None:
            raise RuntimeError("group_norm_silu: out= is for calls without gradients; use torch.no_grad()")
        return _NormAct.apply(x, weight, bias, scale, shift, embedding, num_groups, eps, act, backend)  # type: ignore[no-any-return,no-untyped-call]
    if out is None:
        out = torch.empty_like(x)
    NORM_ACT[backend](x, num_groups, weight, bias, scale, shift, embedding, eps, act, out, None, None)
    return out
