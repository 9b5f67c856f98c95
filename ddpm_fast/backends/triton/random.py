"""Normal noise."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.triton import _launch
from ddpm_fast.backends.triton._layout import image_of, is_wide, tiling
from ddpm_fast.backends.triton._noise import sample_and_tile, sample_number, tile_elements, tile_normals


@triton.jit
def normal_kernel(
    out_ptr,
    seed_ptr,
    ids_ptr,
    step_ptr,
    step_stride,
    pixels,
    sample_stride,
    tiles,
    STREAM: tl.constexpr,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
    PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, tile = sample_and_tile(tiles, WIDE)
    step = tl.load(step_ptr + n * step_stride)
    z = tile_normals(
        tile, pixels, sample_number(ids_ptr, n), step, STREAM, tl.load(seed_ptr), CHANNELS, BLOCK, WIDTH, QUADS, PIXELS
    )
    element, _, _, there = tile_elements(tile, pixels, CHANNELS, CHANNELS_LAST, BLOCK, WIDTH, PIXELS)
    out_ptr += n.to(tl.int64) * sample_stride
    tl.store(out_ptr + element, z.to(out_ptr.dtype.element_ty), mask=there)


def normal(out: Tensor, seed: Tensor, sample_ids: Tensor | None, step: Tensor, stream: int) -> None:
    """Fills `out` (N, ...) with standard normals, in the logical order of each sample's elements."""
    if out.numel() == 0:
        return
    image = image_of(out)
    channels_last = not image.channels_first
    tile = tiling(image, out.element_size(), channels_last, noise=True)
    _launch.launch(
        normal_kernel,
        (out.shape[0] * tile.tiles,),
        out,
        seed,
        sample_ids,
        step,
        step.stride(0) if step.shape[0] > 1 else 0,
        image.pixels,
        image.sample_stride,
        tile.tiles,
        num_warps=tile.num_warps,
        STREAM=stream,
        CHANNELS=image.channels,
        CHANNELS_LAST=channels_last,
        BLOCK=tile.block,
        WIDTH=tile.width,
        QUADS=tile.quads,
        PIXELS=tile.pixels,
        WIDE=is_wide(image),
    )
