"""One step of the reverse process in one pass: guidance, prediction, x0, clip, posterior mean, noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_fast import backends
from ddpm_fast.backends.reference import denoise as reference
from ddpm_fast.ops import _check
from ddpm_fast.ops._operator import Operator
from ddpm_fast.ops.random import NORMAL

DENOISE = Operator(
    "denoise",
    "Tensor x_t, Tensor model_output, Tensor? unconditional, Tensor coefficients, Tensor index, int prediction, "
    "int variance, float? clip_low, float? clip_high, Tensor? threshold, Tensor? noise, Tensor? seed, "
    "Tensor? sample_ids, int stream, Tensor(a!) out, Tensor(b!)? x0_out",
    reference.denoise,
)

_PREDICTIONS = {name: number for number, name in enumerate(reference.PREDICTIONS)}
_VARIANCES = {name: number for number, name in enumerate(reference.VARIANCES)}
_COLUMNS = 8
_OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _check_state(x_t: Tensor) -> None:
    if x_t.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x_t must be float32 (or float64, on the reference backend) whatever the network's dtype, not {x_t.dtype}"
        )
    if x_t.dim() < 2 or not _check.is_dense(x_t):
        raise ValueError(
            f"x_t must be (N, C, *), contiguous or channels_last, "
            f"not of shape {tuple(x_t.shape)} and strides {x_t.stride()}"
        )


def _check_like(tensor: Tensor, name: str, shape: tuple[int, ...], x_t: Tensor) -> None:
    if tensor.shape != shape or tensor.dtype not in _OUTPUT_DTYPES or tensor.device != x_t.device:
        raise ValueError(
            f"{name} must be a floating-point tensor of shape {shape} on {x_t.device}, "
            f"not {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )


def _check_result(tensor: Tensor, name: str, x_t: Tensor) -> None:
    if (
        tensor.shape != x_t.shape
        or tensor.dtype != x_t.dtype
        or tensor.device != x_t.device
        or tensor.stride() != x_t.stride()
    ):
        raise ValueError(
            f"{name} must have x_t's shape {tuple(x_t.shape)}, dtype {x_t.dtype}, device {x_t.device} and strides "
            f"{x_t.stride()}, not {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device} and {tensor.stride()}"
        )


def denoise(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    index: Tensor,
    *,
    prediction: str = "epsilon",
    variance: str = "fixed",
    clip: tuple[float, float] | None = None,
    unconditional: Tensor | None = None,
    threshold: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
    sample_ids: Sequence[int] | Tensor | None = None,
    stream: str = "noise",
    out: Tensor | None = None,
    x0_out: Tensor | None = None,
) -> Tensor:
    """Draws x_{t-1} from p(x_{t-1} | x_t), one row of a coefficient table (`ddpm_fast.solvers`).

    Ho et al. 2020, algorithm 2, with the learned variances of Nichol and Dhariwal 2021 (equation 15) and the
    classifier-free guidance of Ho and Salimans 2022. In this order, each operation rounded on its own:

        e = u + guidance_scale * (model_output - u)                    where `unconditional` u is given
        x0 = x0_from_x * x_t - x0_from_output * e                      epsilon and v; x0 = e for "x0"
        x0 = clip(x0)                                                  or thresholded, or neither
        mean = mean_from_x0 * x0 + mean_from_x * x_t                   mean = e for "x_prev"
        x_prev = mean + sigma * z

    Args:
        x_t: (N, C, *) float32, contiguous or channels_last; float64 runs on the reference backend.
        model_output: (N, C, *), or (N, 2C, *) where the variance is learned: the second half is the variance's.
            float32, float16 or bfloat16, any layout.
        coefficients: (S, 8) float32, columns in the order of `solvers.COLUMNS`; float64 for a float64 state.
        index: int64 (1,) or (N,): the row of the table, which is also the number of the draw.
        prediction: what the network predicts: "epsilon", "x0", "v" or "x_prev".
        variance: "fixed" (the table's sigma), "learned" (a log variance) or "learned_range".
        clip: the range of x0, or None.
        unconditional: the network's output without the condition, of model_output's shape.
        threshold: (N,) float32 > 0: x0 is clamped to [-s, s] and divided by s (Saharia et al. 2022, section 2.3).
        noise: (N, C, *) standard normal z. Without noise and seed the mean is returned.
        seed, sample_ids, stream: z drawn on the way, as for `randn`; none is drawn where the row's sigma is 0.
        out: where to write; x_t itself is allowed.
        x0_out: where to write the x0 that the step was made from.

    Returns:
        x_{t-1} (N, C, *), in x_t's dtype and layout; `out` where it was given. Differentiable in x_t, model_output and
        unconditional where neither `out` nor `x0_out` is given.

    Raises:
        TypeError, ValueError: for anything outside the shapes, dtypes, devices, ranges and names above.
    """
    _check_state(x_t)
    if prediction not in _PREDICTIONS:
        raise ValueError(f"prediction must be one of {list(_PREDICTIONS)}, not {prediction!r}")
    if variance not in _VARIANCES:
        raise ValueError(f"variance must be one of {list(_VARIANCES)}, not {variance!r}")
    shape = tuple(x_t.shape)
    samples, channels = shape[0], shape[1]
    output_shape = shape if variance == "fixed" else (samples, 2 * channels, *shape[2:])
    _check_like(model_output, "model_output", output_shape, x_t)
    if unconditional is not None:
        _check_like(unconditional, "unconditional", output_shape, x_t)
    if coefficients.shape[1:] != (_COLUMNS,) or coefficients.dtype not in (torch.float32, x_t.dtype):
        raise ValueError(
            f"coefficients must be float32 of shape (S, {_COLUMNS}), "
            f"not {coefficients.dtype} of shape {tuple(coefficients.shape)}"
        )
    if index.dtype != torch.int64 or index.dim() != 1 or index.shape[0] not in (1, samples):
        raise ValueError(
            f"index must be int64 of shape (1,) or ({samples},), not {index.dtype} of shape {tuple(index.shape)}"
        )
    _check.rows_in_range(index, coefficients.shape[0], "index")
    if clip is not None and not (len(clip) == 2 and -math.inf < clip[0] < clip[1] < math.inf):
        raise ValueError(f"clip must be (low, high) with low < high, both finite, not {clip}")
    if threshold is not None and (threshold.shape != (samples,) or threshold.dtype != torch.float32):
        raise ValueError(
            f"threshold must be float32 of shape ({samples},), not {threshold.dtype} of shape {tuple(threshold.shape)}"
        )
    if noise is not None:
        if seed is not None:
            raise ValueError("noise and seed exclude each other: give the noise or the seed it is drawn from")
        _check_like(noise, "noise", shape, x_t)
    if out is not None:
        _check_result(out, "out", x_t)
    if x0_out is not None:
        _check_result(x0_out, "x0_out", x_t)

    number = _check.stream_number(stream)
    seed_value = None if seed is None else _check.seed_tensor(seed, x_t.device)
    ids = _check.sample_id_tensor(sample_ids, samples, x_t.device)

    if out is None and x0_out is None and _check.needs_grad(x_t, model_output, unconditional, noise):
        # The same bits as the kernels', and autograd knows the way back.
        if seed_value is not None:
            noise = torch.empty_like(x_t, requires_grad=False)
            NORMAL[backends.choose(x_t)](noise, seed_value, ids, index, number)
        return reference.step(
            x_t,
            model_output,
            unconditional,
            coefficients,
            index,
            prediction,
            variance,
            clip,
            threshold,
            noise,
        )[0]
    if out is None:
        out = torch.empty_like(x_t)
    DENOISE[backends.choose(x_t)](
        x_t,
        _check.one_pixel_stride(model_output),
        None if unconditional is None else _check.one_pixel_stride(unconditional),
        coefficients,
        index,
        _PREDICTIONS[prediction],
        _VARIANCES[variance],
        None if clip is None else clip[0],
        None if clip is None else clip[1],
        threshold,
        None if noise is None else _check.one_pixel_stride(noise),
        seed_value,
        ids,
        number,
        out,
        x0_out,
    )
    return out
