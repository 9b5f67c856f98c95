"""RMSNorm over the channels, an optional scale and shift, and SiLU in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import rms_norm_act as reference
from ddpm_fast.ops import _check, _norm
from ddpm_fast.ops._operator import Operator

RMS_NORM_ACT = Operator(
    "rms_norm_act",
    "Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, int activation, Tensor(a!) out, "
    "Tensor(b!)? rrms",
    reference.rms_norm_act,
)

RMS_NORM_ACT_BACKWARD = Operator(
    "rms_norm_act_backward",
    "Tensor grad_out, Tensor x, Tensor rrms, Tensor? weight, Tensor? scale, Tensor? shift, float eps, "
    "int activation, Tensor(a!)? grad_x, Tensor(b!)? grad_weight, Tensor(c!)? grad_scale, Tensor(d!)? grad_shift",
    reference.rms_norm_act_backward,
)

_LEAST_EPS = 1e-18


class _RmsNormAct(torch.autograd.Function):
    """The two operators tied together. Kept for the backward pass: x, the parameters, and a factor for each pixel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        activation: int,
        backend: str,
    ) -> Tensor:
        out = torch.empty_like(x)
        rrms = torch.empty((x.shape[0], x[0, 0].numel() if len(x) else 0), dtype=_norm.sums(x.dtype), device=x.device)
        RMS_NORM_ACT[backend](x, weight, scale, shift, eps, activation, out, rrms)
        ctx.save_for_backward(x, weight, scale, shift, rrms)
        ctx.eps, ctx.activation, ctx.backend = eps, activation, backend
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        _check.first_derivative_only("rms_norm_silu")
        x, weight, scale, shift, rrms = ctx.saved_tensors
        grad_out = _norm.laid_out_like(grad_out, x)
        parameters = (weight, scale, shift)
        gradients = _norm.empty_gradients(x, parameters, ctx.needs_input_grad)
        RMS_NORM_ACT_BACKWARD[ctx.backend](grad_out, x, rrms, *parameters, ctx.eps, ctx.activation, *gradients)
        return *_norm.cast_gradients(gradients, parameters), None, None, None


def rms_norm_silu(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
    out: Tensor | None = None,
) -> Tensor:
    """`silu(x * sqrt(C) / max(|x|, eps) * weight * (1 + scale) + shift)` in one pass, |x| over a pixel's channels.

    Root-mean-square normalisation (Zhang and Sennrich 2019) of the channels of each pixel, as the U-Nets of
    lucidrains' denoising-diffusion-pytorch (`RMSNorm`) and imagen-pytorch (`ChanRMSNorm`) have it. The norm is taken
    in float32 whatever x's dtype, so that neither the sum of squares nor eps leaves the range of float16. A pixel's
    result depends on nothing but the pixel.

    Args:
        x: (N, C, *), any number of spatial dimensions, also none; float32, float16, bfloat16, or float64 on the
            reference backend. Contiguous and channels_last tensors are taken as they are, others are copied first.
        weight: (C,), of x's dtype or float32.
        eps: the least norm that is divided by, 1e-18 or more: float32 does not hold the squares of smaller ones.
        scale, shift: (N, C), of x's dtype or float32.
        activation: "silu", or None for none.
        out: receives the result: a tensor of x's shape, dtype and layout, x itself included. Without gradients only.

    Returns:
        (N, C, *) of x's dtype and layout, `out` where it was given.

    Raises:
        TypeError: for an argument of the wrong type.
        ValueError: for a wrong shape, dtype, device or value.
        RuntimeError: for `out` where a gradient is needed, and when a second derivative is asked for.
    """
    _norm.check_x(x, eps)
    if eps < _LEAST_EPS:
        raise ValueError(f"eps must be at least {_LEAST_EPS}, not {eps}")
    dtype, device = x.dtype, x.device
    per_sample = x.shape[:2]
    if weight is not None:
        _norm.check_parameter("weight", weight, per_sample[1:], x, dtype, device)
    if scale is not None:
        _norm.check_parameter("scale", scale, per_sample, x, dtype, device)
    if shift is not None:
        _norm.check_parameter("shift", shift, per_sample, x, dtype, device)
    act = _norm.activation_number(activation)
    backend = backends.choose(x)
    x = _norm.dense(x)
    if out is not None:
        _norm.check_out(out, x)
    if _check.needs_grad(x, weight, scale, shift, out):
        if out is not None:
            raise RuntimeError("rms_norm_silu: out= is for calls without gradients; use torch.no_grad()")
        return _RmsNormAct.apply(x, weight, scale, shift, eps, act, backend)  # type: ignore[no-any-return,no-untyped-call]
    if out is None:
        out = torch.empty_like(x)
    RMS_NORM_ACT[backend](x, weight, scale, shift, eps, act, out, None)
    return out
