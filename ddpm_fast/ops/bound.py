"""The terms of the variational bound in one pass, from what the network put out to bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.reference import bound as reference
from ddpm_fast.backends.reference.denoise import PREDICTIONS, VARIANCES
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator

_ARGUMENTS = (
    "Tensor x0, Tensor x_t, Tensor model_output, Tensor coefficients, Tensor t, int prediction, int variance, "
    "float? clip_low, float? clip_high, "
)
BOUND_TERMS = Operator(
    "bound_terms",
    _ARGUMENTS + "Tensor(a!) bound, Tensor(b!) x0_mse",
    reference.bound_terms,
    on=("reference", "cpu"),
)
BOUND_TERMS_BACKWARD = Operator(
    "bound_terms_backward",
    "Tensor grad_bound, " + _ARGUMENTS + "bool mean_gradient, Tensor(a!) grad_output",
    reference.bound_terms_backward,
    on=("reference", "cpu"),
)

COLUMNS = ("x0_from_x", "x0_from_output", "mean_from_x0", "mean_from_x", "log_posterior", "log_min", "log_max")
"""What the columns of a table hold, in order: those of a denoising step, and the posterior's log variance."""

_PREDICTIONS = {name: number for number, name in enumerate(PREDICTIONS)}
_VARIANCES = {name: number for number, name in enumerate(VARIANCES)}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _BoundTerms(torch.autograd.Function):
    """The two operators tied together; kept for the backward pass are the inputs alone."""

    @staticmethod
    def forward(
        ctx: Any, model_output: Tensor, x0: Tensor, x_t: Tensor, coefficients: Tensor, t: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        *numbers, mean_gradient, backend = options
        bound, x0_mse = _empty_results(x_t)
        BOUND_TERMS[backend](x0, x_t, model_output, coefficients, t, *numbers, bound, x0_mse)
        ctx.save_for_backward(model_output, x0, x_t, coefficients, t)
        ctx.numbers, ctx.mean_gradient, ctx.backend = numbers, mean_gradient, backend
        ctx.mark_non_differentiable(x0_mse)
        return bound, x0_mse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _check.first_derivative_only("bound_terms")
        model_output, x0, x_t, coefficients, t = ctx.saved_tensors
        # The kernel fills the halves of the mean and of the variance one after the other.
        layout = torch.preserve_format if model_output.shape == x_t.shape else torch.contiguous_format
        grad_output = torch.empty_like(model_output, memory_format=layout)
        BOUND_TERMS_BACKWARD[ctx.backend](
            grads[0].contiguous(), x0, x_t, model_output, coefficients, t, *ctx.numbers, ctx.mean_gradient, grad_output
        )
        return grad_output, *(None,) * 10


def _empty_results(x_t: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    bound = torch.empty(x_t.shape[:1], dtype=dtype, device=x_t.device)
    return bound, torch.empty_like(bound)


def _check_image(tensor: Any, name: str, shape: tuple[int, ...], device: torch.device, dtypes: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.shape != shape or tensor.dtype not in dtypes or tensor.device != device:
        raise ValueError(
            f"{name} must have shape {shape}, one of the dtypes {[str(d) for d in dtypes]} and device {device}, "
            f"not {tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
        )


def bound_terms(
    x0: Tensor,
    x_t: Tensor,
    model_output: Tensor,
    t: Tensor,
    coefficients: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed",
    clip: tuple[float, float] | None = None,
    mean_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """The term of the variational bound that belongs to each sample's t, in bits per dimension.

    Ho et al. 2020, equation 5, with the learned variances of Nichol and Dhariwal 2021: for t > 0 the divergence
    KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), for t = 0 the negative log-likelihood of 8-bit data x0 under p,
    discretised (section 3.3, with the logistic approximation of the normal distribution function, and no
    probability below 1e-12, that openai's code has).

    Args:
        x0: (N, C, *) images in [-1, 1], floating point, or uint8, which become `x0 / 127.5 - 1`.
        x_t: (N, C, *) float32 or float64, contiguous or channels_last; float64 runs on the reference backend.
        model_output: (N, C, *), or (N, 2C, *) where the variance is learned: the second half is the variance's.
        t: int64 (N,): the row of the table; row 0 is the decoder's.
        coefficients: (T, 7) in x_t's dtype, columns in the order of `COLUMNS`.
        prediction: what the network predicts: "epsilon", "x0", "v" or "x_prev".
        variance: "fixed" (log_max of the table), "learned" (a log variance) or "learned_range".
        clip: the range of x0, or None. The mean of p comes from the clipped x0, except where it is predicted itself.
        mean_gradient: without it only the variance gets a gradient (Nichol and Dhariwal's L_hybrid).

    Returns:
        The terms (N,), and the mean squared errors (N,) of the clipped x0, both of x_t's dtype. The terms are
        differentiable in model_output, once.

    Raises:
        TypeError, ValueError: for anything outside the shapes, dtypes, devices, ranges and names above.
    """
    if not isinstance(x_t, Tensor):
        raise TypeError(f"x_t must be a tensor, not {type(x_t).__name__}")
    if x_t.dtype not in (torch.float32, torch.float64) or x_t.dim() < 2 or not _check.is_dense(x_t):
        raise ValueError(
            f"x_t must be float32 or float64 (N, C, *), contiguous or channels_last, "
            f"not {x_t.dtype} of shape {tuple(x_t.shape)} and strides {x_t.stride()}"
        )
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction must be one of {list(_PREDICTIONS)}, not {prediction!r}")
    if variance not in _VARIANCES:
        raise ValueError(f"variance must be one of {list(_VARIANCES)}, not {variance!r}")
    shape, device = tuple(x_t.shape), x_t.device
    channels = shape[1] if variance == "fixed" else 2 * shape[1]
    _check_image(x0, "x0", shape, device, (*_FLOATS, torch.uint8))
    _check_image(model_output, "model_output", (shape[0], channels, *shape[2:]), device, _FLOATS)
    if t.dtype != torch.int64 or t.shape != shape[:1] or t.device != device:
        raise ValueError(
            f"t must be int64 of shape ({shape[0]},) on {device}, not {t.dtype} of shape {tuple(t.shape)} on {t.device}"
        )
    if coefficients.shape[1:] != (len(COLUMNS),) or coefficients.dtype != x_t.dtype:
        raise ValueError(
            f"coefficients must be {x_t.dtype} of shape (T, {len(COLUMNS)}), "
            f"not {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    _check.rows_in_range(t, coefficients.shape[0], "t")
    if clip is not None and not (len(clip) == 2 and -math.inf < clip[0] < clip[1] < math.inf):
        raise ValueError(f"clip must be (low, high) with low < high, both finite, not {clip}")
    low, high = (None, None) if clip is None else clip
    backend = BOUND_TERMS.choose(x_t, x0, model_output)
    numbers = (_PREDICTIONS[prediction], _VARIANCES[variance], low, high)
    x0, model_output = _check.one_pixel_stride(x0), _check.one_pixel_stride(model_output)
    if _check.needs_grad(model_output):
        return _BoundTerms.apply(model_output, x0, x_t, coefficients, t, *numbers, mean_gradient, backend)  # type: ignore[no-any-return,no-untyped-call]
    bound, x0_mse = _empty_results(x_t)
    BOUND_TERMS[backend](x0, x_t, model_output, coefficients, t, *numbers, bound, x0_mse)
    return bound, x0_mse
