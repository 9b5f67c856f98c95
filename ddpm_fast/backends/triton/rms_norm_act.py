"""RMSNorm over the channels of each pixel, scale and shift, SiLU, and their derivative. A program holds all channels of
some pixels in registers, and reads them once; no pixel's result depends on another."""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import power_of_two
from ddpm_fast.backends.triton._norm import (
    NOTHING,
    images_of,
    is_channels_last,
    parameter,
    row_of,
    rows_of,
    sample_of,
    sample_stride,
    silu,
    silu_derivative,
    sum_over_samples,
    warps_for,
    warps_of_lanes,
    workspace,
)

_TILE = 4096  # elements of a tile
_RUN = 32  # bytes of a channel's pixels that lie side by side: a sector
_PIXELS = 128  # of a program whose sums over pixels go to memory
_BLOCK = 64  # channels of a program that combines them


class Columns(NamedTuple):
    """A program holds `rows` channels of `columns` pixels, `steps` times."""

    rows: int
    columns: int
    steps: int
    num_warps: int


def columns_of(channels: int, pixels: int, channels_last: bool, itemsize: int, summed: bool) -> Columns:
    """How a sample is cut: by its shape alone. `summed`: sums over the pixels are taken."""
    rows = power_of_two(channels)
    columns = max(_TILE // rows, 1 if channels_last else _RUN // itemsize)
    columns = min(columns, power_of_two(pixels))
    steps = min(max(_PIXELS // columns, 1), -(-pixels // columns)) if summed else 1
    return Columns(rows, columns, steps, warps_for(rows * columns))


@triton.jit
def _affine(
    n,
    channel,
    present,
    weight_ptr,
    weight_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
):
    """z = xhat * factor + offset of the channels."""
    s_place = n * scale_sample_stride + channel * scale_channel_stride
    t_place = n * shift_sample_stride + channel * shift_channel_stride
    w = parameter(weight_ptr, channel * weight_stride, present, 1.0)
    return w * (1.0 + parameter(scale_ptr, s_place, present, 0.0)), parameter(shift_ptr, t_place, present, NOTHING)


@triton.jit
def _channels_and_pixels(pixel, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr):
    channel = tl.arange(0, ROWS)
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    return channel, pixel, (channel < CHANNELS)[:, None] & (pixel < PIXELS)[None, :]


@triton.jit
def rms_norm_act_kernel(
    x_ptr,
    x_sample_stride,
    out_ptr,
    out_sample_stride,
    weight_ptr,
    weight_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    rrms_out_ptr,
    eps,
    root,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    chunks: tl.constexpr = (PIXELS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    n = (program // chunks).to(tl.int64)
    pixel = program % chunks * COLUMNS + tl.arange(0, COLUMNS)
    channel, pixel, there = _channels_and_pixels(pixel, CHANNELS, PIXELS, ROWS, WIDE)
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there, other=0).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(x * x, 0)), eps, propagate_nan=tl.PropagateNan.ALL)
    r = tl.div_rn(root, norm)
    factor, offset = _affine(
        n, channel, channel < CHANNELS, weight_ptr, weight_stride, scale_ptr, scale_sample_stride,
        scale_channel_stride, shift_ptr, shift_sample_stride, shift_channel_stride,
    )  # fmt: skip
    z = tl.fma(x * r[None, :], factor[:, None], offset[:, None])
    if ACTIVATION:
        z = silu(z, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * out_sample_stride + place, z.to(out_ptr.dtype.element_ty), mask=there)
    if rrms_out_ptr is not None:
        tl.store(rrms_out_ptr + n * PIXELS + pixel, r, mask=pixel < PIXELS)


@triton.jit
def rms_norm_act_backward_kernel(
    grad_ptr,
    grad_sample_stride,
    x_ptr,
    x_sample_stride,
    rrms_ptr,
    weight_ptr,
    weight_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    grad_x_out_ptr,
    grad_x_sample_stride,
    sums_out_ptr,
    eps,
    root,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The gradient of x; and the sums of the gradient of z, alone and times xhat, over this program's pixels."""
    chunks: tl.constexpr = (PIXELS + COLUMNS * STEPS - 1) // (COLUMNS * STEPS)
    program = tl.program_id(0)
    n, first = (program // chunks).to(tl.int64), program % chunks * (COLUMNS * STEPS)
    present = tl.arange(0, ROWS) < CHANNELS
    factor, offset = _affine(
        n, tl.arange(0, ROWS), present, weight_ptr, weight_stride, scale_ptr, scale_sample_stride,
        scale_channel_stride, shift_ptr, shift_sample_stride, shift_channel_stride,
    )  # fmt: skip
    largest = tl.div_rn(root, eps)  # r where |x| is at most eps, and then a constant
    sums = tl.full([ROWS], NOTHING, tl.float32)
    products = tl.full([ROWS], NOTHING, tl.float32)
    for step in range(STEPS):
        pixel = first + step * COLUMNS + tl.arange(0, COLUMNS)
        channel, pixel, there = _channels_and_pixels(pixel, CHANNELS, PIXELS, ROWS, WIDE)
        place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
        x = tl.load(x_ptr + n * x_sample_stride + place, mask=there, other=0).to(tl.float32)
        grad = tl.load(grad_ptr + n * grad_sample_stride + place, mask=there, other=0).to(tl.float32)
        r = tl.load(rrms_ptr + n * PIXELS + pixel, mask=pixel < PIXELS, other=0)
        xhat = x * r[None, :]
        if ACTIVATION:
            z = tl.fma(xhat, factor[:, None], offset[:, None])
            grad *= silu_derivative(z, x_ptr.dtype.element_ty)
        if sums_out_ptr is not None:
            sums += tl.sum(grad, 1)
            products += tl.sum(grad * xhat, 1)
        if grad_x_out_ptr is not None:
            grad_xhat = grad * factor[:, None]
            along = tl.where(r < largest, tl.sum(grad_xhat * xhat, 0) / CHANNELS, 0.0)
            grad_x = tl.fma(xhat, -along[None, :], grad_xhat) * r[None, :]
            tl.store(
                grad_x_out_ptr + n * grad_x_sample_stride + place, grad_x.to(grad_x_out_ptr.dtype.element_ty),
                mask=there,
            )  # fmt: skip
    if sums_out_ptr is not None:
        row = sums_out_ptr + program.to(tl.int64) * (2 * CHANNELS) + tl.arange(0, ROWS)
        tl.store(row, sums, mask=present)
        tl.store(row + CHANNELS, products, mask=present)


@triton.jit
def rms_norm_act_combine_kernel(
    sums_ptr,
    weight_ptr,
    weight_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    contributions_out_ptr,
    grad_scale_out_ptr,
    grad_shift_out_ptr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The gradients of a sample's parameters, and what it contributes to the weight's."""
    across: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    n, channel = (program // across).to(tl.int64), program % across * BLOCK + tl.arange(0, BLOCK)
    there = channel < CHANNELS
    sums = tl.full([BLOCK], NOTHING, tl.float64)
    products = tl.full([BLOCK], NOTHING, tl.float64)
    for chunk in range(CHUNKS):
        row = sums_ptr + (n * CHUNKS + chunk) * (2 * CHANNELS) + channel
        sums += tl.load(row, mask=there, other=0).to(tl.float64)
        products += tl.load(row + CHANNELS, mask=there, other=0).to(tl.float64)
    place = n * CHANNELS + channel
    if contributions_out_ptr is not None:
        s_place = n * scale_sample_stride + channel * scale_channel_stride
        one_plus_scale = 1.0 + parameter(scale_ptr, s_place, there, 0.0)
        tl.store(contributions_out_ptr + place, (products * one_plus_scale).to(tl.float32), mask=there)
    if grad_scale_out_ptr is not None:
        w = parameter(weight_ptr, channel * weight_stride, there, 1.0)
        tl.store(grad_scale_out_ptr + place, (products * w).to(tl.float32), mask=there)
    if grad_shift_out_ptr is not None:
        tl.store(grad_shift_out_ptr + place, sums.to(tl.float32), mask=there)


def rms_norm_act(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
    out: Tensor,
    rrms: Tensor | None,
) -> None:
    """Writes y (N, C, *) to `out` and, where given, the factors (N, P) of the pixels to `rrms`, in float32."""
    if x.numel() == 0:
        return
    samples, image = x.shape[0], images_of(x, out)
    channels, pixels = image.channels, image.pixels
    tile = columns_of(channels, pixels, is_channels_last(image), x.element_size(), summed=False)
    _launch.launch(
        rms_norm_act_kernel,
        (samples * -(-pixels // tile.columns),),
        x,
        sample_stride(x),
        out,
        sample_stride(out),
        *row_of(weight),
        *rows_of(scale),
        *rows_of(shift),
        rrms,
        float(eps),
        math.sqrt(channels),
        num_warps=tile.num_warps,
        ACTIVATION=activation,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        **sample_of(image)._asdict(),
    )


def rms_norm_act_backward(
    grad_out: Tensor,
    x: Tensor,
    rrms: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    activation: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
) -> None:
    """Writes the gradients that are given: like x, (C,) for weight, (N, C) for the others."""
    parameters = (grad_weight, grad_scale, grad_shift)
    if x.numel() == 0:
        for gradient in parameters:
            if gradient is not None:
                gradient.zero_()
        return
    samples, image = x.shape[0], images_of(x, grad_out, grad_x)
    channels, pixels = image.channels, image.pixels
    summed = any(gradient is not None for gradient in parameters)
    tile = columns_of(channels, pixels, is_channels_last(image), x.element_size(), summed)
    chunks = -(-pixels // (tile.columns * tile.steps))
    sums = workspace(x, samples, chunks, 2, channels) if summed else None
    _launch.launch(
        rms_norm_act_backward_kernel,
        (samples * chunks,),
        grad_out,
        sample_stride(grad_out),
        x,
        sample_stride(x),
        rrms,
        *row_of(weight),
        *rows_of(scale),
        *rows_of(shift),
        grad_x,
        0 if grad_x is None else sample_stride(grad_x),
        sums,
        float(eps),
        math.sqrt(channels),
        num_warps=tile.num_warps,
        ACTIVATION=activation,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEPS=tile.steps,
        **sample_of(image)._asdict(),
    )
    if sums is None:
        return
    contributions = None if grad_weight is None else workspace(x, samples, 1, channels)
    block = min(power_of_two(channels), _BLOCK)
    _launch.launch(
        rms_norm_act_combine_kernel,
        (samples * -(-channels // block),),
        sums,
        *row_of(weight),
        *rows_of(scale),
        contributions,
        grad_scale,
        grad_shift,
        num_warps=warps_of_lanes(block),
        CHUNKS=chunks,
        BLOCK=block,
        CHANNELS=channels,
    )
    if contributions is not None:
        sum_over_samples(contributions, grad_weight, None)
