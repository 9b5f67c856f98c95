"""Where the elements of a tensor lie, and how the ops that work element by element cut a sample into tiles."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_INT32_ELEMENTS = 1 << 31


class Image(NamedTuple):
    """A sample (C, *) of a batch in memory: its size, and the distances between samples, channels and pixels."""

    channels: int
    pixels: int
    sample_stride: int
    channel_stride: int
    pixel_stride: int

    @property
    def size(self) -> int:
        return self.channels * self.pixels

    @property
    def span(self) -> int:
        """The distance from a sample's first element to behind its last."""
        return (self.channels - 1) * self.channel_stride + (self.pixels - 1) * self.pixel_stride + 1

    @property
    def channels_first(self) -> bool:
        return (self.pixel_stride == 1 or self.pixels == 1) and (
            self.channel_stride == self.pixels or self.channels == 1
        )

    @property
    def channels_last(self) -> bool:
        return (self.channel_stride == 1 or self.channels == 1) and (
            self.pixel_stride == self.channels or self.pixels == 1
        )

    def first_channels(self, channels: int) -> Image:
        return self._replace(channels=channels)


def image_of(tensor: Tensor) -> Image:
    """A tensor (N, ...) with at least one element whose pixels have one stride: `ops._check.one_pixel_stride`."""
    shape, stride = tensor.shape, tensor.stride()
    pixels, pixel_stride = 1, 1
    for size, step in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size != 1 and pixels == 1:
            pixel_stride = step
        pixels *= size
    channels, channel_stride = (shape[1], stride[1]) if tensor.dim() > 1 else (1, 1)
    return Image(channels, pixels, stride[0], channel_stride, pixel_stride)


def runs_alongside(source: Image, channels_last: bool) -> bool:
    """Whether a sample of the source lies in memory in the order of the result's, without gaps."""
    return source.channels_last if channels_last else source.channels_first


def is_wide(*images: Image) -> bool:
    """Whether offsets within a sample need 64 bits."""
    return any(image.span > _INT32_ELEMENTS or image.size > _INT32_ELEMENTS for image in images)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


class Tiling(NamedTuple):
    """How a sample is cut: `tiles` tiles of `block` lanes, by `num_warps` warps.

    A tile is a run of memory; or, where noise is made for channels_last memory, `width` channels of `pixels` pixels,
    `quads` blocks of the noise a channel.
    """

    tiles: int
    block: int
    width: int
    quads: int
    pixels: int
    num_warps: int


_WARP = 32
_LANES = 1024  # of a tile: two blocks of the noise a thread in half precision, one in float32
_VECTOR = 16  # bytes of a memory access
_QUAD = 4  # elements of a block of the noise
_WIDTH = 64  # channels of a tile: four sectors of memory and more


def tiling(image: Image, itemsize: int, channels_last: bool, noise: bool) -> Tiling:
    """Cuts a sample of elements of so many bytes. Depends on nothing but the sample's shape."""
    per_thread = max(_VECTOR // itemsize, _QUAD)
    rows = power_of_two(min(image.channels, _WIDTH))
    by_channels = channels_last and noise
    least = max(_WARP * per_thread, 2 * _QUAD * rows if by_channels else 0)
    block = max(min(_LANES, power_of_two(image.size)), least)
    num_warps = block // (_WARP * per_thread)
    if not by_channels:
        return Tiling(-(-image.size // block), block, 0, block // _QUAD, 0, num_warps)
    width, quads = min(image.channels, _WIDTH), block // (_QUAD * rows)
    # Where channels do not begin with a block of the noise, the blocks reach over the tile's ends.
    pixels = _QUAD * quads if image.pixels % _QUAD == 0 else _QUAD * (quads - 1)
    tiles = -(-image.channels // width) * -(-image.pixels // pixels)
    return Tiling(tiles, block, width, quads, pixels, num_warps)
