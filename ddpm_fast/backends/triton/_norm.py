"""What the norms' kernels share: how a sample is cut, the parameters of its channels, SiLU and its derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import Image, image_of, is_wide, power_of_two

_WARP = 32
_PER_THREAD = 16  # elements of a tile that a thread keeps in registers
_MOST_WARPS = 16
_MOST_COMBINING = 4  # warps
_SECTOR = 32  # bytes of the least access to memory
_TILE = 8192  # elements of a tile where a group is cut
_CHANNELS = 32  # of such a tile in channels_last memory: two sectors and more of any dtype
_SAMPLES = 32  # that are added up side by side
_BLOCK = 64  # channels of a program that adds them up


class Once(NamedTuple):
    """A program holds `bundle` groups of up to `rows` channels and `columns` pixels, and reads them once."""

    bundle: int
    rows: int
    columns: int
    num_warps: int


class Cut(NamedTuple):
    """A program holds a tile of `rows` channels and `columns` pixels, whatever their groups."""

    rows: int
    columns: int
    num_warps: int


def warps_for(elements: int) -> int:
    return min(max(elements // (_WARP * _PER_THREAD), 1), _MOST_WARPS)


def warps_of_lanes(lanes: int) -> int:
    """For a program that combines partial results: a thread for each lane, so that no two work on the same."""
    return min(max(lanes // _WARP, 1), _MOST_COMBINING)


def read_once(channels: int, pixels: int, groups: int, channels_last: bool, itemsize: int, most: int) -> Once | None:
    """How whole groups are held in registers; None where they are larger than `most` elements.

    The number of samples is no argument: a sample must be summed up in the same way in every batch.
    """
    width = channels // groups
    rows, columns = power_of_two(width), power_of_two(pixels)
    # A warp's worth of work; and in channels_last memory, where groups lie side by side, whole sectors of it.
    bundle = power_of_two(-(-_WARP * _PER_THREAD // (rows * columns)))
    if channels_last:
        bundle = max(bundle, power_of_two(-(-_SECTOR // (width * itemsize))))
    bundle = min(bundle, power_of_two(groups))
    elements = bundle * rows * columns
    return Once(bundle, rows, columns, warps_for(elements)) if elements <= most else None


def cut(channels: int, pixels: int, channels_last: bool) -> Cut:
    """How a sample is cut where its groups are too large to be held."""
    if channels_last:
        rows = min(power_of_two(channels), _CHANNELS)
        columns = min(power_of_two(pixels), _TILE // rows)
        rows = min(power_of_two(channels), _TILE // columns)
    else:
        columns = min(power_of_two(pixels), _TILE)
        rows = min(power_of_two(channels), _TILE // columns)
    return Cut(rows, columns, warps_for(rows * columns))


class Sample(NamedTuple):
    """The compile-time part of a sample's description; keys are the kernels' arguments."""

    CHANNELS: int
    PIXELS: int
    CHANNEL_STRIDE: int
    PIXEL_STRIDE: int
    WIDE: bool


def is_channels_last(image: Image) -> bool:
    return image.channels_last and (image.pixels == 1 or not image.channels_first)


def sample_of(image: Image) -> Sample:
    channels, pixels = image.channels, image.pixels
    strides = (1, channels) if is_channels_last(image) else (pixels, 1)
    return Sample(channels, pixels, *strides, is_wide(image))


def images_of(*tensors: Tensor | None) -> Image:
    """The first tensor's image; all must be contiguous, or all channels_last, sample by sample."""
    images = [image_of(tensor) for tensor in tensors if tensor is not None]
    first = all(image.channels_first for image in images)
    if not first and not all(image.channels_last for image in images):
        raise ValueError("the tensors must all be contiguous, or all channels_last")
    return images[0]


def sample_stride(tensor: Tensor) -> int:
    """The distance between samples; 0 where there is one, which any alignment divides."""
    return tensor.stride(0) if tensor.shape[0] > 1 else 0


def row_of(parameter: Tensor | None) -> tuple[Tensor | None, int]:
    """A (C,) parameter and its stride."""
    return parameter, 0 if parameter is None else parameter.stride(0)


def rows_of(parameter: Tensor | None) -> tuple[Tensor | None, int, int]:
    """A (N, C) parameter and its strides."""
    return (None, 0, 0) if parameter is None else (parameter, parameter.stride(0), parameter.stride(1))


def workspace(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=x.device)


@triton.jit
def rows_of_groups(
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BUNDLE: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr
):
    """This program's sample; and, one a lane, the group, whether this is its first channel, the channel, and whether
    there is one. (BUNDLE * ROWS,)"""
    bundles: tl.constexpr = (GROUPS + BUNDLE - 1) // BUNDLE
    width: tl.constexpr = CHANNELS // GROUPS
    program = tl.program_id(0)
    lane = tl.arange(0, BUNDLE * ROWS)
    first = program % bundles * BUNDLE
    group = first + lane // ROWS
    if width == ROWS:  # then the compiler sees the channels in a row
        channel = first * width + lane
        present = channel < CHANNELS
    else:
        channel = group * width + lane % ROWS
        present = (group < GROUPS) & (lane % ROWS < width)
    if WIDE:
        channel = channel.to(tl.int64)
    return (program // bundles).to(tl.int64), group, lane % ROWS == 0, channel, present


@triton.jit
def over_groups(values, BUNDLE: tl.constexpr, ROWS: tl.constexpr):
    """The sums of the channels' values (BUNDLE * ROWS,) over each group, handed to each of its channels."""
    sums = tl.sum(tl.reshape(values, [BUNDLE, ROWS]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [BUNDLE, ROWS]), [BUNDLE * ROWS])


@triton.jit
def tile_of_sample(
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr
):
    """This program's sample, chunk of pixels, channels (ROWS,) and pixels (COLUMNS,)."""
    across: tl.constexpr = (CHANNELS + ROWS - 1) // ROWS
    chunks: tl.constexpr = (PIXELS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    chunk = program // across % chunks
    channel = program % across * ROWS + tl.arange(0, ROWS)
    pixel = chunk * COLUMNS + tl.arange(0, COLUMNS)
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    return (program // (across * chunks)).to(tl.int64), chunk, channel, pixel


NOTHING = tl.constexpr(-0.0)  # added to any number, it leaves it as it is: a zero's sign too


@triton.jit
def parameter(pointer, place, there, ABSENT: tl.constexpr):
    """A parameter of the channels in float32; ABSENT where it is not given."""
    value = tl.full(place.shape, ABSENT, tl.float32)
    if pointer is not None:
        value = tl.load(pointer + place, mask=there, other=0).to(tl.float32)
    return value


@triton.jit
def two_floats(x):
    """A float64 as the sum of two float32."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


_LOG2_E = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2 = tl.constexpr(float.fromhex("0x1.62e430p-1"))
_LN2_REST = tl.constexpr(float.fromhex("-0x1.05c61p-29"))


@triton.jit
def one_plus_exp_neg(z, RESULT: tl.constexpr):
    """1 + exp(-z), infinite for large negative z, as precise as a result of the dtype RESULT asks for."""
    if tl.float32 == RESULT:
        # 2^t errs by t's rounding, up to 1e-7 |z|: what is missing of -z comes after it. The bounds are where the
        # exponential is infinite, and where t would be.
        y = tl.minimum(tl.maximum(z, -88.73), 2.357e38)
        t = y * -_LOG2_E
        excess = tl.fma(t, _LN2_REST, tl.fma(t, _LN2, y))
        return tl.fma(tl.exp2(t), 1.0 - excess, 1.0)
    return 1.0 + tl.exp2(z * -_LOG2_E)


@triton.jit
def silu(z, RESULT: tl.constexpr):
    return z / one_plus_exp_neg(z, RESULT)


@triton.jit
def silu_derivative(z, RESULT: tl.constexpr):
    """s (1 + z (1 - s)), s = sigmoid(z)."""
    s = 1.0 / one_plus_exp_neg(z, RESULT)
    return tl.fma(s, z * (1.0 - s), s)


@triton.jit
def _sum_over_samples(
    contributions_ptr, sample_stride, gradient_out_ptr, samples, channels, SAMPLES: tl.constexpr, BLOCK: tl.constexpr
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([SAMPLES, BLOCK], tl.float64)
    tl.assume(samples > 0)
    for start in range(0, samples, SAMPLES):
        n = start + tl.arange(0, SAMPLES)
        there = (n < samples)[:, None] & (channel < channels)[None, :]
        place = n.to(tl.int64)[:, None] * sample_stride + channel[None, :]
        total += tl.load(contributions_ptr + place, mask=there, other=0).to(tl.float64)
    tl.store(gradient_out_ptr + channel, tl.sum(total, 0).to(tl.float32), mask=channel < channels)


@triton.jit
def sum_over_samples_kernel(
    contributions_ptr,
    sample_stride,
    weight_out_ptr,
    bias_out_ptr,
    samples,
    channels,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if weight_out_ptr is not None:
        _sum_over_samples(contributions_ptr, sample_stride, weight_out_ptr, samples, channels, SAMPLES, BLOCK)
    if bias_out_ptr is not None:
        _sum_over_samples(contributions_ptr + channels, sample_stride, bias_out_ptr, samples, channels, SAMPLES, BLOCK)


def sum_over_samples(contributions: Tensor, grad_weight: Tensor | None, grad_bias: Tensor | None) -> None:
    """Gradients (C,) of weight and bias from those of each sample, (N, 2, C); (N, 1, C) where there is no bias."""
    samples, _, channels = contributions.shape
    _launch.launch(
        sum_over_samples_kernel,
        (-(-channels // _BLOCK),),
        contributions,
        contributions.stride(0),
        grad_weight,
        grad_bias,
        samples,
        channels,
        num_warps=4,
        SAMPLES=_SAMPLES,
        BLOCK=_BLOCK,
    )
