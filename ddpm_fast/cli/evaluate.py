"""``ddpm-fast eval``: how good samples are, seen by a classifier of the images that the network was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_fast.cli.errors import UserError
from ddpm_fast.cli.sample import MANIFEST, is_intact, recorded_sums
from ddpm_fast.training import ImageData, load_dataset

_HELD_OUT_DIGITS = 360  # of scikit-learn's 1797, which come without a split


def real_images(dataset: str, folder: Path | None) -> tuple[ImageData, ImageData]:
    """Training and test images with their labels.

    Raises:
        UserError: a data set without labels.
        ValueError, FileNotFoundError: as :func:`load_dataset`.
    """
    if dataset == "digits":
        images, labels = load_dataset("digits", folder)
        assert labels is not None  # digits have them
        cut = len(images) - _HELD_OUT_DIGITS
        return ImageData(images[:cut], labels[:cut]), ImageData(images[cut:], labels[cut:])
    if dataset == "folder":
        raise UserError("eval needs images with labels: digits or fashion-mnist, not a folder")
    return load_dataset(dataset, folder), load_dataset(dataset, folder, split="test")


def read_samples(folder: Path) -> Tensor:
    """The samples that ``ddpm-fast sample`` wrote to a folder, float32 ``(N, C, H, W)``.

    Raises:
        UserError: no such samples, not all of them, damaged ones, or pictures only.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = [folder / file for shard in manifest["shards"] for file in shard["files"]]
    except FileNotFoundError as error:
        raise UserError(f"{folder} holds no {MANIFEST}: it takes what ddpm-fast sample wrote") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / MANIFEST} is no manifest of ddpm-fast sample") from error
    if manifest["settings"]["format"] == "png":
        raise UserError(f"{folder} holds PNG files: eval needs samples of --format npy or grid")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is not complete, {missing[0]} is missing: run ddpm-fast sample again")
    sums = recorded_sums(folder)
    damaged = [file.name for file in files if not is_intact(file, sums)]
    if damaged:
        raise UserError(f"{folder / damaged[0]} is damaged or unfinished: run ddpm-fast sample again")
    return torch.from_numpy(np.concatenate([np.load(file) for file in files]))
