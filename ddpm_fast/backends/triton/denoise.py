"""One step of p(x_{t-1} | x_t): guidance, prediction, x0, clip, posterior mean, noise, in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import Image, image_of, is_wide, runs_alongside, tiling
from ddpm_fast.backends.triton._noise import read, sample_and_tile, sample_number, tile_elements, tile_normals
from ddpm_fast.backends.triton._step import FIXED, X_PREV, clamp, guide, learned_sigma, predict_x0


@triton.jit
def denoise_kernel(
    x_ptr,
    output_ptr,
    output_sample_stride,
    output_channel_stride,
    output_pixel_stride,
    unconditional_ptr,
    unconditional_sample_stride,
    unconditional_channel_stride,
    unconditional_pixel_stride,
    rows_ptr,
    index_ptr,
    index_stride,
    clip_low,
    clip_high,
    threshold_ptr,
    noise_ptr,
    noise_sample_stride,
    noise_channel_stride,
    noise_pixel_stride,
    seed_ptr,
    ids_ptr,
    out_ptr,
    x0_out_ptr,
    pixels,
    sample_stride,
    tiles,
    PREDICTION: tl.constexpr,
    VARIANCE: tl.constexpr,
    STREAM: tl.constexpr,
    OUTPUT_ALONG: tl.constexpr,
    UNCONDITIONAL_ALONG: tl.constexpr,
    NOISE_ALONG: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, tile = sample_and_tile(tiles, WIDE)
    element, channel, pixel, there = tile_elements(tile, pixels, CHANNELS, CHANNELS_LAST, BLOCK, WIDTH, PIXELS)
    start = n.to(tl.int64) * sample_stride
    index = tl.load(index_ptr + n * index_stride)
    row = rows_ptr + index * 8
    mean_from_x0, mean_from_x, sigma = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)

    x_t = tl.load(x_ptr + start + element, mask=there, other=0)
    e = read(
        output_ptr, n, element, channel, pixel, there, output_sample_stride, output_channel_stride,
        output_pixel_stride, OUTPUT_ALONG,
    )  # fmt: skip
    if unconditional_ptr is not None:
        u = read(
            unconditional_ptr, n, element, channel, pixel, there, unconditional_sample_stride,
            unconditional_channel_stride, unconditional_pixel_stride, UNCONDITIONAL_ALONG,
        )  # fmt: skip
        e = guide(e, u, tl.load(row + 7))

    x0 = predict_x0(x_t, e, tl.load(row), tl.load(row + 1), mean_from_x0, mean_from_x, PREDICTION)
    if clip_low is not None:
        x0 = clamp(x0, clip_low, clip_high)
    if threshold_ptr is not None:
        s = tl.load(threshold_ptr + n)
        x0 = tl.div_rn(tl.clamp(x0, -s, s, propagate_nan=tl.PropagateNan.ALL), s)
    mean = e if PREDICTION == X_PREV else mean_from_x0 * x0 + mean_from_x * x_t

    if seed_ptr is not None:
        z = tile_normals(
            tile, pixels, sample_number(ids_ptr, n), index, STREAM, tl.load(seed_ptr), CHANNELS, BLOCK, WIDTH, QUADS,
            PIXELS,
        )  # fmt: skip
        z = tl.where(sigma == 0.0, -0.0, z)  # the last step draws none, and -0 leaves a mean of -0
    elif noise_ptr is not None:
        z = read(
            noise_ptr, n, element, channel, pixel, there, noise_sample_stride, noise_channel_stride,
            noise_pixel_stride, NOISE_ALONG,
        )  # fmt: skip
    if (seed_ptr is not None) or (noise_ptr is not None):
        if VARIANCE == FIXED:
            mean += sigma * z
        else:
            # The variance's channels follow the prediction's.
            v = read(
                output_ptr + CHANNELS * output_channel_stride, n, element, channel, pixel, there, output_sample_stride,
                output_channel_stride, output_pixel_stride, OUTPUT_ALONG,
            )  # fmt: skip
            mean += learned_sigma(v, sigma, tl.load(row + 5), tl.load(row + 6), VARIANCE) * z
    tl.store(out_ptr + start + element, mean, mask=there)
    if x0_out_ptr is not None:
        tl.store(x0_out_ptr + start + element, x0, mask=there)


def _strides(image: Image | None) -> tuple[int, int, int]:
    return (0, 0, 0) if image is None else (image.sample_stride, image.channel_stride, image.pixel_stride)


def denoise(
    x_t: Tensor,
    model_output: Tensor,
    unconditional: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    prediction: int,
    variance: int,
    clip_low: float | None,
    clip_high: float | None,
    threshold: Tensor | None,
    noise: Tensor | None,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    stream: int,
    out: Tensor,
    x0_out: Tensor | None,
) -> None:
    """Argument meanings: `ddpm_fast.ops.denoise`. Index, coefficients, seed and sample numbers are read on the device,
    so that a captured graph can be replayed for every step."""
    if x_t.numel() == 0:
        return
    clipped = clip_low is not None and clip_high is not None
    image = image_of(x_t)
    channels_last = not image.channels_first
    tile = tiling(image, out.element_size(), channels_last, noise=seed is not None)
    given = [None if source is None else image_of(source) for source in (model_output, unconditional, noise)]
    along = [
        source is not None and runs_alongside(source.first_channels(image.channels), channels_last) for source in given
    ]
    _launch.launch(
        denoise_kernel,
        (x_t.shape[0] * tile.tiles,),
        x_t,
        model_output,
        *_strides(given[0]),
        unconditional,
        *_strides(given[1]),
        coefficients.contiguous(),
        index,
        index.stride(0) if index.shape[0] > 1 else 0,
        clip_low if clipped else None,
        clip_high if clipped else None,
        None if threshold is None else threshold.contiguous(),
        noise,
        *_strides(given[2]),
        seed,
        sample_ids,
        out,
        x0_out,
        image.pixels,
        image.sample_stride,
        tile.tiles,
        num_warps=tile.num_warps,
        PREDICTION=prediction,
        VARIANCE=variance,
        STREAM=stream,
        OUTPUT_ALONG=along[0],
        UNCONDITIONAL_ALONG=along[1],
        NOISE_ALONG=along[2],
        CHANNELS=image.channels,
        CHANNELS_LAST=channels_last,
        BLOCK=tile.block,
        WIDTH=tile.width,
        QUADS=tile.quads,
        PIXELS=tile.pixels,
        WIDE=is_wide(image, *(source for source in given if source is not None)),
    )
