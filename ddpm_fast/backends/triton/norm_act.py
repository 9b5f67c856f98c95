"""GroupNorm, scale and shift, SiLU: groups that fit are read once, others are cut: partial - combine - apply.

Statistics are taken about local means, which Chan, Golub and LeVeque's update (1979) merges; the arithmetic of a group
depends on its sample's shape alone.
"""

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
    silu,
    tile_of_sample,
    two_floats,
    warps_of_lanes,
    workspace,
)
from ddpm_fast.backends.triton._norm_backward import norm_act_backward

__all__ = ["norm_act", "norm_act_backward"]

_MOST_HELD = 16384  # elements of a program's groups: 32 registers a thread
_MOST_COMBINED = 256  # lanes of a program that combines partial results


@triton.jit
def norm_act_once_kernel(
    x_ptr,
    x_sample_stride,
    out_ptr,
    out_sample_stride,
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
    mean_out_ptr,
    rstd_out_ptr,
    eps,
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
    n, group, first, channel, present = rows_of_groups(CHANNELS, GROUPS, BUNDLE, ROWS, WIDE)
    pixel = tl.arange(0, COLUMNS)
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    there = present[:, None] & (pixel < PIXELS)[None, :]
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there, other=0).to(tl.float32)

    # The mean to float32's accuracy, then its error from the differences: together they are as good as float64.
    count: tl.constexpr = CHANNELS // GROUPS * PIXELS
    if embedding_ptr is not None:
        e_place = n * embedding_sample_stride + channel * embedding_channel_stride
        e = parameter(embedding_ptr, e_place, present, 0.0)
        v = tl.where(there, x + e[:, None], 0.0)
        high = over_groups(tl.sum(v, 1), BUNDLE, ROWS) / count
        # x - (high - e), the inner difference with its rounding error (Knuth's two-sum).
        centre = high - e
        part = centre - high
        error = (high - (centre - part)) - (e + part)
        d = (x - centre[:, None]) - error[:, None]
    else:
        high = over_groups(tl.sum(x, 1), BUNDLE, ROWS) / count
        d = x - high[:, None]
    low = over_groups(tl.sum(tl.where(there, d, 0.0), 1), BUNDLE, ROWS) / count
    d = tl.where(there, d - low[:, None], 0.0)
    variance = over_groups(tl.sum(d * d, 1), BUNDLE, ROWS) / count
    rstd = 1.0 / tl.sqrt(variance.to(tl.float64) + eps)  # rounded once, in the factor

    w = parameter(weight_ptr, channel * weight_stride, present, 1.0)
    b = parameter(bias_ptr, channel * bias_stride, present, 0.0)
    s_place = n * scale_sample_stride + channel * scale_channel_stride
    one_plus_scale = 1.0 + parameter(scale_ptr, s_place, present, 0.0)
    t_place = n * shift_sample_stride + channel * shift_channel_stride
    t = parameter(shift_ptr, t_place, present, 0.0)
    factor = (rstd * (w * one_plus_scale).to(tl.float64)).to(tl.float32)
    z = tl.fma(d, factor[:, None], tl.fma(b, one_plus_scale, t)[:, None])
    if ACTIVATION:
        z = silu(z, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * out_sample_stride + place, z.to(out_ptr.dtype.element_ty), mask=there)
    if mean_out_ptr is not None:
        mean = high.to(tl.float64) + low.to(tl.float64)
        tl.store(mean_out_ptr + n * GROUPS + group, mean, mask=first & present)
    if rstd_out_ptr is not None:
        tl.store(rstd_out_ptr + n * GROUPS + group, rstd, mask=first & present)


@triton.jit
def channel_moments_kernel(
    x_ptr,
    x_sample_stride,
    moments_out_ptr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNEL_STRIDE: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Of each channel of a chunk of pixels: the mean, in two parts, and the sum of the squared differences to it."""
    n, chunk, channel, pixel = tile_of_sample(CHANNELS, PIXELS, ROWS, COLUMNS, WIDE)
    present, inside = channel < CHANNELS, (pixel < PIXELS)[None, :]
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=present[:, None] & inside, other=0).to(tl.float32)
    count = tl.minimum(PIXELS - chunk * COLUMNS, COLUMNS).to(tl.float32)
    high = tl.sum(x, 1) / count
    d = tl.where(inside, x - high[:, None], 0.0)
    low = tl.sum(d, 1) / count
    d = tl.where(inside, d - low[:, None], 0.0)
    chunks: tl.constexpr = (PIXELS + COLUMNS - 1) // COLUMNS
    row = moments_out_ptr + (n * chunks + chunk) * (3 * CHANNELS) + channel
    tl.store(row, high, mask=present)
    tl.store(row + CHANNELS, low, mask=present)
    tl.store(row + 2 * CHANNELS, tl.sum(d * d, 1), mask=present)


@triton.jit
def _moments(
    moments_ptr,
    embedding_ptr,
    embedding_sample_stride,
    embedding_channel_stride,
    n,
    first_channel,
    part,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Number of values, mean and squared differences of a group's parts, which are numbered chunk by chunk."""
    chunks: tl.constexpr = (PIXELS + COLUMNS - 1) // COLUMNS
    there = part < WIDTH * chunks
    chunk = part // WIDTH
    channel = first_channel + part % WIDTH
    row = moments_ptr + (n * chunks + chunk) * (3 * CHANNELS) + channel
    mean = tl.load(row, mask=there, other=0).to(tl.float64)
    mean += tl.load(row + CHANNELS, mask=there, other=0).to(tl.float64)
    place = n * embedding_sample_stride + channel * embedding_channel_stride
    mean += parameter(embedding_ptr, place, there, NOTHING).to(tl.float64)
    count = tl.where(there, tl.minimum(PIXELS - chunk * COLUMNS, COLUMNS), 0).to(tl.float64)
    return count, mean, tl.load(row + 2 * CHANNELS, mask=there, other=0).to(tl.float64)


@triton.jit
def norm_act_combine_kernel(
    moments_ptr,
    folded_out_ptr,
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
    mean_out_ptr,
    rstd_out_ptr,
    eps,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """A group's statistics; and of each channel the centre, factor and offset: z = (x - centre) * factor + offset."""
    width: tl.constexpr = CHANNELS // GROUPS
    parts: tl.constexpr = width * ((PIXELS + COLUMNS - 1) // COLUMNS)
    program = tl.program_id(0)
    n, group = (program // GROUPS).to(tl.int64), program % GROUPS
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], NOTHING, tl.float64)
    for start in range(0, parts, BLOCK):
        count, mean, _ = _moments(
            moments_ptr, embedding_ptr, embedding_sample_stride, embedding_channel_stride, n, group * width,
            start + lane, CHANNELS, width, PIXELS, COLUMNS,
        )  # fmt: skip
        total += count * mean
    group_mean = tl.sum(total, 0) / (width * PIXELS)
    total = tl.full([BLOCK], NOTHING, tl.float64)
    for start in range(0, parts, BLOCK):
        count, mean, squares = _moments(
            moments_ptr, embedding_ptr, embedding_sample_stride, embedding_channel_stride, n, group * width,
            start + lane, CHANNELS, width, PIXELS, COLUMNS,
        )  # fmt: skip
        difference = mean - group_mean
        total += squares + count * (difference * difference)
    group_rstd = 1.0 / tl.sqrt(tl.sum(total, 0) / (width * PIXELS) + eps)
    if mean_out_ptr is not None:
        tl.store(mean_out_ptr + program, group_mean)
    if rstd_out_ptr is not None:
        tl.store(rstd_out_ptr + program, group_rstd)

    for start in range(0, width, BLOCK):
        there = start + lane < width
        channel = group * width + start + lane
        w = parameter(weight_ptr, channel * weight_stride, there, 1.0)
        b = parameter(bias_ptr, channel * bias_stride, there, 0.0)
        s_place = n * scale_sample_stride + channel * scale_channel_stride
        one_plus_scale = 1.0 + parameter(scale_ptr, s_place, there, 0.0)
        t_place = n * shift_sample_stride + channel * shift_channel_stride
        t = parameter(shift_ptr, t_place, there, 0.0)
        e_place = n * embedding_sample_stride + channel * embedding_channel_stride
        e = parameter(embedding_ptr, e_place, there, 0.0)
        centre, rest = two_floats(group_mean - e.to(tl.float64))
        factor = group_rstd.to(tl.float32) * (w * one_plus_scale)
        row = folded_out_ptr + n * (3 * CHANNELS) + channel
        tl.store(row, centre, mask=there)
        tl.store(row + CHANNELS, factor, mask=there)
        tl.store(row + 2 * CHANNELS, tl.fma(-rest, factor, tl.fma(b, one_plus_scale, t)), mask=there)


@triton.jit
def norm_act_apply_kernel(
    x_ptr,
    x_sample_stride,
    folded_ptr,
    out_ptr,
    out_sample_stride,
    ACTIVATION: tl.constexpr,
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
    row = folded_ptr + n * (3 * CHANNELS) + channel
    centre = tl.load(row, mask=present)
    factor = tl.load(row + CHANNELS, mask=present)
    offset = tl.load(row + 2 * CHANNELS, mask=present)
    there = present[:, None] & (pixel < PIXELS)[None, :]
    place = channel[:, None] * CHANNEL_STRIDE + pixel[None, :] * PIXEL_STRIDE
    x = tl.load(x_ptr + n * x_sample_stride + place, mask=there).to(tl.float32)
    z = tl.fma(x - centre[:, None], factor[:, None], offset[:, None])
    if ACTIVATION:
        z = silu(z, out_ptr.dtype.element_ty)
    tl.store(out_ptr + n * out_sample_stride + place, z.to(out_ptr.dtype.element_ty), mask=there)


def norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    embedding: Tensor | None,
    eps: float,
    activation: int,
    out: Tensor,
    mean: Tensor | None,
    rstd: Tensor | None,
) -> None:
    """Writes y (N, C, *) to `out` and, where given, the statistics (N, G) of the groups, in float64."""
    if x.numel() == 0:
        return
    samples, image = x.shape[0], images_of(x, out)
    sample = sample_of(image)
    channels, pixels, channels_last = image.channels, image.pixels, is_channels_last(image)
    parameters = (*row_of(weight), *row_of(bias), *rows_of(scale), *rows_of(shift), *rows_of(embedding))
    once = read_once(channels, pixels, num_groups, channels_last, x.element_size(), _MOST_HELD)
    if once is not None:
        _launch.launch(
            norm_act_once_kernel,
            (samples * -(-num_groups // once.bundle),),
            x,
            sample_stride(x),
            out,
            sample_stride(out),
            *parameters,
            mean,
            rstd,
            float(eps),
            num_warps=once.num_warps,
            ACTIVATION=activation,
            GROUPS=num_groups,
            BUNDLE=once.bundle,
            ROWS=once.rows,
            COLUMNS=once.columns,
            **sample._asdict(),
        )
        return
    tile = cut(channels, pixels, channels_last)
    chunks = -(-pixels // tile.columns)
    moments, folded = workspace(x, samples, chunks, 3, channels), workspace(x, samples, 3, channels)
    grid = (samples * chunks * -(-channels // tile.rows),)
    tiled = {"ROWS": tile.rows, "COLUMNS": tile.columns, "num_warps": tile.num_warps, **sample._asdict()}
    _launch.launch(channel_moments_kernel, grid, x, sample_stride(x), moments, **tiled)
    block = min(power_of_two(channels // num_groups * chunks), _MOST_COMBINED)
    _launch.launch(
        norm_act_combine_kernel,
        (samples * num_groups,),
        moments,
        folded,
        *parameters,
        mean,
        rstd,
        float(eps),
        num_warps=warps_of_lanes(block),
        GROUPS=num_groups,
        COLUMNS=tile.columns,
        BLOCK=block,
        CHANNELS=channels,
        PIXELS=pixels,
    )
    _launch.launch(
        norm_act_apply_kernel,
        grid,
        x,
        sample_stride(x),
        folded,
        out,
        sample_stride(out),
        ACTIVATION=activation,
        **tiled,
    )
