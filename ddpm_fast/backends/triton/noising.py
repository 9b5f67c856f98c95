"""q(x_t | x_0) = N(sqrt(alphas_cumprod) x_0, 1 - alphas_cumprod): Ho et al. 2020, equation 4."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import image_of, is_wide, runs_alongside, tiling
from ddpm_fast.backends.triton._noise import read, sample_and_tile, sample_number, tile_elements, tile_normals


@triton.jit
def noising_kernel(
    x0_ptr,
    t_ptr,
    t_stride,
    rows_ptr,
    noise_ptr,
    noise_out_ptr,
    seed_ptr,
    ids_ptr,
    step_ptr,
    step_stride,
    out_ptr,
    pixels,
    sample_stride,
    noise_sample_stride,
    noise_channel_stride,
    noise_pixel_stride,
    tiles,
    STREAM: tl.constexpr,
    ALONG: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Reads the noise, or, given a seed, makes it and writes it."""
    n, tile = sample_and_tile(tiles, WIDE)
    element, channel, pixel, there = tile_elements(tile, pixels, CHANNELS, CHANNELS_LAST, BLOCK, WIDTH, PIXELS)
    start = n.to(tl.int64) * sample_stride
    if seed_ptr is None:
        z = read(
            noise_ptr, n, element, channel, pixel, there, noise_sample_stride, noise_channel_stride,
            noise_pixel_stride, ALONG,
        )  # fmt: skip
    else:
        step = tl.load(step_ptr + n * step_stride)
        z = tile_normals(
            tile, pixels, sample_number(ids_ptr, n), step, STREAM, tl.load(seed_ptr), CHANNELS, BLOCK, WIDTH, QUADS,
            PIXELS,
        )  # fmt: skip
        z = z.to(noise_out_ptr.dtype.element_ty)
        tl.store(noise_out_ptr + start + element, z, mask=there)
        z = z.to(tl.float32)
    x0 = tl.load(x0_ptr + start + element, mask=there, other=0).to(tl.float32)
    if x0_ptr.dtype.element_ty == tl.uint8:
        x0 = tl.div_rn(x0, 127.5) - 1.0
    row = rows_ptr + tl.load(t_ptr + n * t_stride) * 2
    x_t = tl.load(row) * x0 + tl.load(row + 1) * z
    tl.store(out_ptr + start + element, x_t.to(out_ptr.dtype.element_ty), mask=there)


def _noising(
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    noise: Tensor,
    seed: Tensor | None,
    sample_ids: Tensor | None,
    step: Tensor | None,
    stream: int,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    image, source = image_of(out), image_of(noise)
    channels_last = not image.channels_first
    tile = tiling(image, out.element_size(), channels_last, noise=seed is not None)
    _launch.launch(
        noising_kernel,
        (out.shape[0] * tile.tiles,),
        x0,
        t,
        t.stride(0),
        coefficients.contiguous(),
        noise if seed is None else None,
        None if seed is None else noise,
        seed,
        sample_ids,
        step,
        step.stride(0) if step is not None and step.shape[0] > 1 else 0,
        out,
        image.pixels,
        image.sample_stride,
        source.sample_stride,
        source.channel_stride,
        source.pixel_stride,
        tile.tiles,
        num_warps=tile.num_warps,
        STREAM=stream,
        ALONG=runs_alongside(source, channels_last),
        CHANNELS=image.channels,
        CHANNELS_LAST=channels_last,
        BLOCK=tile.block,
        WIDTH=tile.width,
        QUADS=tile.quads,
        PIXELS=tile.pixels,
        WIDE=is_wide(image, source),
    )


def noising(x0: Tensor, t: Tensor, coefficients: Tensor, noise: Tensor, out: Tensor) -> None:
    """x_t from the given noise, of any layout whose pixels have one stride; x0 lies as `out` does."""
    _noising(x0, t, coefficients, noise, None, None, None, 0, out)


def noising_random(
    x0: Tensor,
    t: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    sample_ids: Tensor | None,
    step: Tensor,
    stream: int,
    out: Tensor,
    noise: Tensor,
) -> None:
    """x_t and the noise that it is made with; x0, `noise` and `out` lie alike."""
    _noising(x0, t, coefficients, noise, seed, sample_ids, step, stream, out)
