"""Data sets: contents, and damaged files."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_fast.training import load_dataset
from ddpm_fast.training.datasets import load_image_folder, read_idx


def idx(shape: tuple[int, ...], seed: int = 0) -> tuple[bytes, np.ndarray]:
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + values.tobytes(), values


def write_fashion(folder: Path, *, zipped: bool, images: int = 5, labels: int = 5) -> np.ndarray:
    for prefix in ("train", "t10k"):
        pixels, values = idx((images, 28, 28))
        classes, _ = idx((labels,))
        for name, data in ((f"{prefix}-images-idx3-ubyte", pixels), (f"{prefix}-labels-idx1-ubyte", classes)):
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)
    return values


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_fashion_mnist(tmp_path: Path, zipped: bool, split: str) -> None:
    expected = write_fashion(tmp_path, zipped=zipped)
    images, labels = load_dataset("fashion-mnist", tmp_path, split=split)
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 28, 28)
    assert np.array_equal(images[:, 0].numpy(), expected)
    assert labels is not None
    assert (labels.dtype, labels.shape) == (torch.int64, (5,))


def test_digits() -> None:
    images, labels = load_dataset("digits")
    assert (images.dtype, images.shape) == (torch.uint8, (1797, 1, 8, 8))
    assert (images.min(), images.max()) == (0, 255)
    assert images.unique().numel() == 17
    assert labels is not None
    assert labels.bincount().numel() == 10


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "asks for 28"),
        (lambda data: data + b"x", "asks for 28"),
        (lambda data: data[:9], "inside its header"),
        (lambda data: b"\0\0\x0d" + data[3:], "not an IDX file of unsigned bytes"),
        (lambda data: b"\x89PNG" + data[4:], "not an IDX file"),
        (lambda data: b"\0\0\x08\0" + data[4:], "not an IDX file"),
        (lambda data: b"", "it starts with nothing"),
    ],
    ids=["short", "long", "header", "floats", "png", "no-dimensions", "empty"],
)
def test_damaged_idx(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    data, _ = idx((2, 2, 3))
    assert len(data) == 28
    path = tmp_path / "images"
    path.write_bytes(damage(data))
    with pytest.raises(ValueError, match=message):
        read_idx(path)


@pytest.mark.parametrize(
    "damage",
    [lambda z: z[: len(z) // 2], lambda z: b"no" + z[2:], lambda z: z[:12] + b"\xff" * 8 + z[20:]],
    ids=["truncated", "magic", "content"],
)
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(damage(gzip.compress(idx((20, 2, 3))[0])))
    with pytest.raises(ValueError, match="damaged gzip"):
        read_idx(path)


def test_labels_of_another_data_set(tmp_path: Path) -> None:
    write_fashion(tmp_path, zipped=False, images=5, labels=4)
    with pytest.raises(ValueError, match="do not belong together"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_image_folder(tmp_path: Path, channels: int, mode: str) -> None:
    (tmp_path / "sub").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sub" / "b.png")
    Image.new("RGB", (12, 6), (255, 0, 0)).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    images, labels = load_dataset("folder", tmp_path, image_size=6, channels=channels)
    assert labels is None
    assert (images.dtype, images.shape) == (torch.uint8, (2, channels, 6, 6))
    # Names decide the order; an image that has the size already keeps its pixels.
    expected = np.array(Image.fromarray(pixels).convert(mode)).reshape(6, 6, channels)
    assert np.array_equal(images[1].permute(1, 2, 0).numpy(), expected)
    assert images[0].unique().numel() == (1 if channels == 1 else 2)


def test_image_folder_cuts_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((4, 12), dtype=np.uint8)
    pixels[:, 4:8] = 200
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_image_folder(tmp_path, image_size=4, channels=1).unique().tolist() == [200]


def test_bad_image_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no image"):
        load_image_folder(tmp_path, image_size=4)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_image_folder(tmp_path / "missing", image_size=4)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n but no more")
    with pytest.raises(ValueError, match="cannot read this image"):
        load_image_folder(tmp_path, image_size=4)
    with pytest.raises(ValueError, match="channels"):
        load_image_folder(tmp_path, image_size=4, channels=2)
    with pytest.raises(ValueError, match="image_size"):
        load_image_folder(tmp_path, image_size=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "imagenet"}, ValueError, "dataset must be one of"),
        ({"name": "fashion-mnist"}, ValueError, "needs the folder"),
        ({"name": "fashion-mnist", "folder": "missing"}, FileNotFoundError, "neither"),
        ({"name": "fashion-mnist", "folder": ".", "image_size": 28}, ValueError, "image_size applies"),
        ({"name": "fashion-mnist", "folder": ".", "split": "val"}, ValueError, "split"),
        ({"name": "digits", "folder": "."}, ValueError, "takes no folder"),
        ({"name": "digits", "split": "test"}, ValueError, "no test split"),
        ({"name": "folder", "folder": "."}, ValueError, "needs image_size"),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_dataset(**arguments)
