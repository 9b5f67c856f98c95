"""Samples as pictures: PNG files, a grid, an animation."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.cli.errors import UserError
from ddpm_fast.evaluation import to_uint8
from ddpm_fast.training.files import write_atomically

_GAP = 2  # pixels between the images of a grid
_SMALLEST = 64  # smaller images are enlarged by a whole factor, to be looked at


def to_bytes(x: Tensor) -> Tensor:
    """``(N, C, H, W)`` in [-1, 1] as uint8 ``(N, H, W, C)``; what lies outside is clipped.

    Raises:
        UserError: C is neither 1 (gray) nor 3 (RGB).
    """
    if x.shape[1] not in (1, 3):
        raise UserError(f"pictures have 1 or 3 channels, these samples have {x.shape[1]}: use --format npy")
    return to_uint8(x).permute(0, 2, 3, 1)


def picture(pixels: Tensor) -> Image.Image:
    """uint8 ``(H, W, C)`` as an image."""
    array = pixels.cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def grid(x: Tensor) -> Image.Image:
    """``(N, C, H, W)`` as one image, row by row, about square."""
    tiles = to_bytes(x)
    factor = max(1, _SMALLEST // max(tiles.shape[1:3]))
    tiles = tiles.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    count, height, width, channels = tiles.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = torch.full(
        (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, channels), 255, dtype=torch.uint8
    )
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        canvas[top : top + height, left : left + width] = tile
    return picture(canvas)


def png_bytes(image: Image.Image) -> bytes:
    """The contents of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_png(path: Path, image: Image.Image) -> None:
    """One PNG file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(png_bytes(image)))


def write_gif(path: Path, frames: list[Image.Image], *, milliseconds: int, last: int) -> None:
    """An animation that runs for ever; the last frame stays for `last` milliseconds."""
    durations = [milliseconds] * (len(frames) - 1) + [last]

    def save(temporary: Path) -> None:
        frames[0].save(temporary, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)

    write_atomically(path, save)
