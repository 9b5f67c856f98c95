"""Small image data sets as one uint8 tensor ``(N, C, H, W)`` each, with labels where there are any."""

from __future__ import annotations

import gzip
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

DATASETS = ("digits", "fashion-mnist", "folder")
UNREADABLE = ("stop", "skip")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class ImageData(NamedTuple):
    """Images ``(N, C, H, W)`` uint8, and labels ``(N,)`` int64 or None."""

    images: Tensor
    labels: Tensor | None


def load_dataset(
    name: str,
    folder: str | Path | None = None,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int = 3,
    unreadable: str = "stop",
) -> ImageData:
    """Load one of the data sets by name.

    Args:
        name: "digits" (scikit-learn's 8x8 digits), "fashion-mnist" (IDX files in `folder`) or "folder" (image files).
        folder: where the files are; not for digits.
        split: "train" or "test"; only fashion-mnist has a "test".
        image_size, channels: only for "folder": side in pixels, and 1 (gray) or 3 (RGB).
        unreadable: only for "folder": "stop" at a file that is no image, or "skip" it with a warning that names it.

    Raises:
        ValueError: an unknown name or split, an argument that is missing or does not apply, or damaged files.
        FileNotFoundError: no such folder or file.
    """
    if name not in DATASETS:
        raise ValueError(f"dataset must be one of {DATASETS}, got {name!r}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if split == "test" and name != "fashion-mnist":
        raise ValueError(f"the data set {name!r} has no test split")
    if image_size is not None and name != "folder":
        raise ValueError(f"image_size applies to the data set 'folder' only, not to {name!r}")
    if name == "digits":
        if folder is not None:
            raise ValueError("the data set 'digits' comes with scikit-learn and takes no folder")
        return load_digits()
    if folder is None:
        raise ValueError(f"the data set {name!r} needs the folder that holds its files")
    if name == "fashion-mnist":
        return load_fashion_mnist(folder, split=split)
    if image_size is None:
        raise ValueError("the data set 'folder' needs image_size")
    return ImageData(load_image_folder(folder, image_size=image_size, channels=channels, unreadable=unreadable), None)


def load_digits() -> ImageData:
    """scikit-learn's 1797 handwritten digits, ``(1797, 1, 8, 8)``, their 17 gray levels spread over 0..255.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise ImportError("the digits data set needs scikit-learn: pip install 'ddpm_fast[datasets]'") from error
    bunch = sklearn_digits()
    images = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return ImageData(torch.from_numpy(images)[:, None].contiguous(), torch.from_numpy(bunch.target.astype(np.int64)))


def load_fashion_mnist(folder: str | Path, *, split: str = "train") -> ImageData:
    """Fashion-MNIST (Xiao et al. 2017) from its four IDX files, plain or gzipped; Debian: dataset-fashion-mnist.

    Args:
        folder: holds ``train-images-idx3-ubyte[.gz]`` and the like.
        split: "train" (60000 images) or "test" (10000).

    Returns:
        images ``(N, 1, 28, 28)``, labels ``(N,)``.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    images = read_idx(_find(folder, f"{prefix}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{prefix}-labels-idx1-ubyte"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise ValueError(
            f"{folder}: images {tuple(images.shape)} and labels {tuple(labels.shape)} do not belong together"
        )
    return ImageData(images[:, None].contiguous(), labels.long())


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file of unsigned bytes (LeCun's format for MNIST), gzipped if its name ends in ``.gz``.

    Raises:
        ValueError: not an IDX file of bytes, or of another length than its header says.
    """
    path = Path(path)
    opener: Callable[..., gzip.GzipFile] = gzip.open if path.suffix == ".gz" else open  # type: ignore[assignment]
    try:
        with opener(path, "rb") as file:
            data = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error
    # Magic number: two zero bytes, the type (8 is unsigned byte), the number of dimensions.
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or data[3] == 0:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes (it starts with {data[:4].hex() or 'nothing'})")
    header = 4 + 4 * data[3]
    if len(data) < header:
        raise ValueError(f"{path}: truncated inside its header, {len(data)} of {header} bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise ValueError(f"{path}: {len(data)} bytes, but its header {shape} asks for {expected}")
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).reshape(shape)


def load_image_folder(folder: str | Path, *, image_size: int, channels: int = 3, unreadable: str = "stop") -> Tensor:
    """All image files below a folder, in the order of their names, as ``(N, channels, image_size, image_size)``.

    The shorter side is resized to `image_size`, then the middle square is cut out.

    Raises:
        FileNotFoundError: no such folder, or no image in it.
        ValueError: wrong `image_size`, `channels` or `unreadable`, or, with "stop", a file that is not the image its
            name promises.
    """
    folder = Path(folder)
    if unreadable not in UNREADABLE:
        raise ValueError(f"unreadable must be one of {UNREADABLE}, got {unreadable!r}")
    if image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (gray) or 3 (RGB), got {channels}")
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no image ({', '.join(_IMAGE_SUFFIXES)}) below {folder}")
    images, failures = [], []
    for path in paths:
        try:
            images.append(_load_image(path, image_size, channels))
        except ValueError as error:
            if unreadable == "stop":
                raise
            failures.append(str(error))
    if failures:
        reasons = "\n  ".join(failures)
        warnings.warn(f"{len(failures)} of {len(paths)} files are left out:\n  {reasons}", RuntimeWarning, stacklevel=2)
    if not images:
        raise FileNotFoundError(f"none of the {len(paths)} files below {folder} can be read")
    return torch.stack(images)


def _load_image(path: Path, size: int, channels: int) -> Tensor:
    try:
        with Image.open(path) as file:
            image = file.convert("L" if channels == 1 else "RGB")
    except (
        OSError,
        EOFError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        # All of these come out of Pillow's decoders for files that are damaged in one way or another.
        raise ValueError(f"{path}: cannot read this image: {error}") from error
    factor = size / min(image.size)
    width, height = (max(size, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)), dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()


def _find(folder: str | Path, name: str) -> Path:
    for candidate in (Path(folder) / name, Path(folder) / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"neither {name} nor {name}.gz in {folder}")
