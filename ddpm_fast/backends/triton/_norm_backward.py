"""The derivative of GroupNorm, scale and shift, SiLU: sums over the pixels of each channel, of which all gradients are
made; groups that fit are read once, others are cut: partial - combine - apply. One writer a slot, no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import power_of_two
from ddpm_fast.backends.triton._norm import (
    NOTHING,
    cut,
    images_of,
    is_channels_last,
    over_groups,
    parameter,
    read_once,
    row_of,
    rows_of,
    rows_of_groups,
    sample_of,
    sample_stride,
    silu_derivative,
    sum_over_samples,
    tile_of_sample,
    two_floats,
    warps_of_lanes,
    workspace,
)

_MOST_HELD = 8192  # elements of a program's groups, of x and of the gradient
_MOST_COMBINED = 256  # channels of a program that combines partial results


@triton.jit
def _channel(
    n,
    group,
    channel,
    present,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    GROUPS: tl.constexpr,
):
    """Of each channel: the centre in two parts, rstd, weight, bias, 1 + scale and shift."""
    mean = tl.load(mean_ptr + n * GROUPS + group, mask=present, other=0)
    rstd = tl.load(rstd_ptr + n * GROUPS + group, mask=present, other=0).to(tl.float32)
    e_place = n * embedding_sample_stride + channel * embedding_channel_stride
    high, low = two_floats(mean - parameter(embedding_ptr, e_place, present, 0.0).to(tl.float64))
    w = parameter(weight_ptr, channel * weight_stride, present, 1.0)
    b = parameter(bias_ptr, channel * bias_stride, present, 0.0)
    s_place = n * scale_sample_stride + channel * scale_channel_stride
    one_plus_scale = 1.0 + parameter(scale_ptr, s_place, present, 0.0)
    t_place = n * shift_sample_stride + channel * shift_channel_stride
    return high, low, rstd, w, b, one_plus_scale, parameter(shift_ptr, t_place, present, 0.0)


@triton.jit
def _normalise(x, high, low, rstd):
    return ((x - high[:, None]) - low[:, None]) * rstd[:, None]


@triton.jit
def _differentiate(xhat, grad, factor, offset, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr):
    """The gradient of z = xhat * factor + offset; 0 where the gradient of the result is and xhat is finite."""
    if ACTIVATION:
        grad *= silu_derivative(tl.fma(xhat, factor[:, None], offset[:, None]), DTYPE)
    return grad


@triton.jit
def norm_act_backward_once_kernel(
    grad_ptr,
    grad_sample_stride,
    x_ptr,
    x_sample_stride,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    grad_x_out_ptr,
    grad_x_sample_stride,
    contributions_out_ptr,
    grad_scale_out_ptr,
    grad_shift_out_ptr,
    grad_embedding_out_ptr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BUNDLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, group, _, channel, present = rows_of_groups(CHANNELS, GROUPS, BUNDLE, ROWS, WIDE)
    pixel = tl.arange(0, COLUMNS)
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    there = present[:, None] & (pixel < PIXELS)[None, :]
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + n * grad_sample_stride + place, mask=there, other=0).to(tl.float32)
    high, low, rstd, w, b, one_plus_scale, t = _channel(
        n, group, channel, present, mean_ptr, rstd_ptr, weight_ptr, weight_stride, bias_ptr, bias_stride, scale_ptr,
        scale_sample_stride, scale_channel_stride, shift_ptr, shift_sample_stride, shift_channel_stride, embedding_ptr,
        embedding_sample_stride, embedding_channel_stride, GROUPS,
    )  # fmt: skip
    factor = w * one_plus_scale
    xhat = tl.where(there, _normalise(x, high, low, rstd), 0.0)
    grad = _differentiate(xhat, grad, factor, tl.fma(b, one_plus_scale, t), ACTIVATION, x_ptr.dtype.element_ty)
    sums, products = tl.sum(grad, 1), tl.sum(grad * xhat, 1)

    row = n * CHANNELS + channel
    if contributions_out_ptr is not None:
        pair = contributions_out_ptr + n * (2 * CHANNELS) + channel
        tl.store(pair, products * one_plus_scale, mask=present)
        tl.store(pair + CHANNELS, sums * one_plus_scale, mask=present)
    if grad_scale_out_ptr is not None:
        tl.store(grad_scale_out_ptr + row, w * products + b * sums, mask=present)
    if grad_shift_out_ptr is not None:
        tl.store(grad_shift_out_ptr + row, sums, mask=present)
    if (grad_x_out_ptr is not None) or (grad_embedding_out_ptr is not None):
        count: tl.constexpr = CHANNELS // GROUPS * PIXELS
        along_mean = over_groups(factor * sums, BUNDLE, ROWS) / count
        along_xhat = over_groups(factor * products, BUNDLE, ROWS) / count
        grad_v = tl.fma(grad, factor[:, None], -along_mean[:, None]) - xhat * along_xhat[:, None]
        grad_v *= rstd[:, None]
        if grad_x_out_ptr is not None:
            grad_x = grad_v.to(grad_x_out_ptr.dtype.element_ty)
            tl.store(grad_x_out_ptr + n * grad_x_sample_stride + place, grad_x, mask=there)
        if grad_embedding_out_ptr is not None:
            tl.store(grad_embedding_out_ptr + row, tl.sum(tl.where(there, grad_v, 0.0), 1), mask=present)


@triton.jit
def channel_sums_kernel(
    grad_ptr,
    grad_sample_stride,
    x_ptr,
    x_sample_stride,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    sums_out_ptr,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of each channel of a chunk of pixels: the sums of the gradient, of its product with xhat, and of xhat."""
    n, chunk, channel, pixel = tile_of_sample(CHANNELS, PIXELS, ROWS, COLUMNS, WIDE)
    present, inside = channel < CHANNELS, (pixel < PIXELS)[None, :]
    there = present[:, None] & inside
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there, other=0).to(tl.float32)
    grad = tl.load(grad_ptr + n * grad_sample_stride + place, mask=there, other=0).to(tl.float32)
    high, low, rstd, w, b, one_plus_scale, t = _channel(
        n, channel // (CHANNELS // GROUPS), channel, present, mean_ptr, rstd_ptr, weight_ptr, weight_stride, bias_ptr,
        bias_stride, scale_ptr, scale_sample_stride, scale_channel_stride, shift_ptr, shift_sample_stride,
        shift_channel_stride, embedding_ptr, embedding_sample_stride, embedding_channel_stride, GROUPS,
    )  # fmt: skip
    xhat = tl.where(inside, _normalise(x, high, low, rstd), 0.0)
    offset = tl.fma(b, one_plus_scale, t)
    grad = _differentiate(xhat, grad, w * one_plus_scale, offset, ACTIVATION, x_ptr.dtype.element_ty)
    chunks: tl.constexpr = (PIXELS + COLUMNS - 1) // COLUMNS
    row = sums_out_ptr + (n * chunks + chunk) * (3 * CHANNELS) + channel
    tl.store(row, tl.sum(grad, 1), mask=present)
    tl.store(row + CHANNELS, tl.sum(grad * xhat, 1), mask=present)
    tl.store(row + 2 * CHANNELS, tl.sum(xhat, 1), mask=present)


@triton.jit
def _over_chunks(sums_ptr, n, channel, there, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.full([BLOCK], NOTHING, tl.float64)
    products = tl.full([BLOCK], NOTHING, tl.float64)
    xhats = tl.full([BLOCK], NOTHING, tl.float64)
    for chunk in range(CHUNKS):
        row = sums_ptr + (n * CHUNKS + chunk) * (3 * CHANNELS) + channel
        sums += tl.load(row, mask=there, other=0).to(tl.float64)
        products += tl.load(row + CHANNELS, mask=there, other=0).to(tl.float64)
        xhats += tl.load(row + 2 * CHANNELS, mask=there, other=0).to(tl.float64)
    return sums, products, xhats


@triton.jit
def norm_act_backward_combine_kernel(
    sums_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    along_out_ptr,
    contributions_out_ptr,
    grad_scale_out_ptr,
    grad_shift_out_ptr,
    grad_embedding_out_ptr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A group's means of the gradient of xhat, alone and times xhat; and its parameters' gradients."""
    width: tl.constexpr = CHANNELS // GROUPS
    program = tl.program_id(0)
    n, group = (program // GROUPS).to(tl.int64), program % GROUPS
    lane = tl.arange(0, BLOCK)
    total_mean = tl.full([BLOCK], NOTHING, tl.float64)
    total_xhat = tl.full([BLOCK], NOTHING, tl.float64)
    for start in range(0, width, BLOCK):
        there = start + lane < width
        channel = group * width + start + lane
        sums, products, _ = _over_chunks(sums_ptr, n, channel, there, CHANNELS, CHUNKS, BLOCK)
        _, _, _, w, b, one_plus_scale, _ = _channel(
            n, group + lane * 0, channel, there, mean_ptr, rstd_ptr, weight_ptr, weight_stride, bias_ptr, bias_stride,
            scale_ptr, scale_sample_stride, scale_channel_stride, shift_ptr, shift_sample_stride, shift_channel_stride,
            embedding_ptr, embedding_sample_stride, embedding_channel_stride, GROUPS,
        )  # fmt: skip
        factor = (w * one_plus_scale).to(tl.float64)
        total_mean += factor * sums
        total_xhat += factor * products
        row = n * CHANNELS + channel
        if contributions_out_ptr is not None:
            pair = contributions_out_ptr + n * (2 * CHANNELS) + channel
            tl.store(pair, (products * one_plus_scale).to(tl.float32), mask=there)
            tl.store(pair + CHANNELS, (sums * one_plus_scale).to(tl.float32), mask=there)
        if grad_scale_out_ptr is not None:
            tl.store(grad_scale_out_ptr + row, (w * products + b * sums).to(tl.float32), mask=there)
        if grad_shift_out_ptr is not None:
            tl.store(grad_shift_out_ptr + row, sums.to(tl.float32), mask=there)
    along_mean = tl.sum(total_mean, 0) / (width * PIXELS)
    along_xhat = tl.sum(total_xhat, 0) / (width * PIXELS)
    tl.store(along_out_ptr + program * 2, along_mean.to(tl.float32))
    tl.store(along_out_ptr + program * 2 + 1, along_xhat.to(tl.float32))

    if grad_embedding_out_ptr is not None:
        rstd = tl.load(rstd_ptr + program)
        for start in range(0, width, BLOCK):
            there = start + lane < width
            channel = group * width + start + lane
            sums, _, xhats = _over_chunks(sums_ptr, n, channel, there, CHANNELS, CHUNKS, BLOCK)
            w = parameter(weight_ptr, channel * weight_stride, there, 1.0)
            s_place = n * scale_sample_stride + channel * scale_channel_stride
            factor = w * (1.0 + parameter(scale_ptr, s_place, there, 0.0))
            gradient = (factor * sums - PIXELS * along_mean - xhats * along_xhat) * rstd
            tl.store(grad_embedding_out_ptr + n * CHANNELS + channel, gradient.to(tl.float32), mask=there)


@triton.jit
def norm_act_backward_apply_kernel(
    grad_ptr,
    grad_sample_stride,
    x_ptr,
    x_sample_stride,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    weight_stride,
    bias_ptr,
    bias_stride,
    scale_ptr,
    scale_sample_stride,
    scale_channel_stride,
    shift_ptr,
    shift_sample_stride,
    shift_channel_stride,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    along_ptr,
    grad_x_out_ptr,
    grad_x_sample_stride,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, _, channel, pixel = tile_of_sample(CHANNELS, PIXELS, ROWS, COLUMNS, WIDE)
    present = channel < CHANNELS
    there = present[:, None] & (pixel < PIXELS)[None, :]
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    group = channel // (CHANNELS // GROUPS)
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there).to(tl.float32)
    grad = tl.load(grad_ptr + n * grad_sample_stride + place, mask=there).to(tl.float32)
    high, low, rstd, w, b, one_plus_scale, t = _channel(
        n, group, channel, present, mean_ptr, rstd_ptr, weight_ptr, weight_stride, bias_ptr, bias_stride, scale_ptr,
        scale_sample_stride, scale_channel_stride, shift_ptr, shift_sample_stride, shift_channel_stride, embedding_ptr,
        embedding_sample_stride, embedding_channel_stride, GROUPS,
    )  # fmt: skip
    factor = w * one_plus_scale
    xhat = _normalise(x, high, low, rstd)
    grad = _differentiate(xhat, grad, factor, tl.fma(b, one_plus_scale, t), ACTIVATION, x_ptr.dtype.element_ty)
    along = along_ptr + (n * GROUPS + group) * 2
    along_mean = tl.load(along, mask=present)
    along_xhat = tl.load(along + 1, mask=present)
    grad_v = tl.fma(grad, factor[:, None], -along_mean[:, None]) - xhat * along_xhat[:, None]
    grad_x = (grad_v * rstd[:, None]).to(grad_x_out_ptr.dtype.element_ty)
    tl.store(grad_x_out_ptr + n * grad_x_sample_stride + place, grad_x, mask=there)


def norm_act_backward(
    grad_out: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    embedding: Tensor | None,
    activation: int,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
    grad_shift: Tensor | None,
    grad_embedding: Tensor | None,
) -> None:
    """Writes the gradients that are given: like x, (C,) for weight and bias, (N, C) for the others."""
    if x.numel() == 0:
        for gradient in (grad_weight, grad_bias, grad_scale, grad_shift, grad_embedding):
            if gradient is not None:
                gradient.zero_()
        return
    samples, image = x.shape[0], images_of(x, grad_out, grad_x)
    channels, pixels, channels_last = image.channels, image.pixels, is_channels_last(image)
    inputs = (grad_out, sample_stride(grad_out), x, sample_stride(x))
    statistics = (mean, rstd)
    parameters = (*row_of(weight), *row_of(bias), *rows_of(scale), *rows_of(shift), *rows_of(embedding))
    result = (grad_x, 0 if grad_x is None else sample_stride(grad_x))
    common = {"ACTIVATION": activation, "GROUPS": num_groups, **sample_of(image)._asdict()}
    summed = grad_weight is not None or grad_bias is not None
    contributions = workspace(x, samples, 2, channels) if summed else None
    by_sample = (contributions, grad_scale, grad_shift, grad_embedding)

    once = read_once(channels, pixels, num_groups, channels_last, x.element_size(), _MOST_HELD)
    if once is not None:
        _launch.launch(
            norm_act_backward_once_kernel,
            (samples * -(-num_groups // once.bundle),),
            *inputs,
            *statistics,
            *parameters,
            *result,
            *by_sample,
            num_warps=once.num_warps,
            BUNDLE=once.bundle,
            ROWS=once.rows,
            COLUMNS=once.columns,
            **common,
        )
    else:
        tile = cut(channels, pixels, channels_last)
        chunks = -(-pixels // tile.columns)
        grid = (samples * chunks * -(-channels // tile.rows),)
        tiled = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps, **common}
        sums, along = workspace(x, samples, chunks, 3, channels), workspace(x, samples, num_groups, 2)
        _launch.launch(channel_sums_kernel, grid, *inputs, *statistics, *parameters, sums, **tiled)
        block = min(power_of_two(channels // num_groups), _MOST_COMBINED)
        _launch.launch(
            norm_act_backward_combine_kernel,
            (samples * num_groups,),
            sums,
            *statistics,
            *parameters,
            along,
            *by_sample,
            num_warps=warps_of_lanes(block),
            GROUPS=num_groups,
            CHUNKS=chunks,
            BLOCK=block,
            CHANNELS=channels,
            PIXELS=pixels,
        )
        if grad_x is not None:
            _launch.launch(
                norm_act_backward_apply_kernel, grid, *inputs, *statistics, *parameters, along, *result, **tiled
            )
    if contributions is not None:
        sum_over_samples(contributions, grad_weight, grad_bias)
