"""``ddpm-fast eval``: how good samples are, seen by a classifier of the images that the network was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_fast.cli.errors import UserError
from ddpm_fast.cli.network import Network
from ddpm_fast.cli.sample import MANIFEST, is_intact, recorded_sums
from ddpm_fast.ops import randn
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import BitsPerDim, ImageData, bits_per_dim, load_dataset

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


def measure_bound(
    network: Network, schedule: NoiseSchedule, images: Tensor, *, seed: int, batch: int, progress: bool = False
) -> str:
    """The bound on the bits per dimension of images ``(N, C, H, W)`` uint8, as a table; N at least 2.

    Raises:
        UserError: images of another shape than the network's, or fewer than 2.
        ValueError: as :func:`bits_per_dim`.
    """
    if images.shape[1:] != network.shape or len(images) < 2:
        raise UserError(
            f"need at least 2 images of {network.shape}, which {network.path} draws, not {tuple(images.shape)}"
        )
    parts: list[BitsPerDim] = []
    for first in tqdm(range(0, len(images), batch), disable=not progress, unit="batch"):
        rows = images[first : first + batch]
        ids = range(first, first + len(rows))
        parts.append(
            bits_per_dim(
                network.model,
                schedule,
                rows,
                prediction=network.prediction,
                variance=network.variance,
                noise=_noise_of(seed, ids),
                model_kwargs=network.conditions(ids),
            )
        )
    total, prior, vlb, mse, _ = (torch.cat(column).double() for column in zip(*parts, strict=True))
    lines = [f"bits per dimension of {len(images)} test images, {len(schedule)} steps (mean and its standard error)"]
    for name, values in (
        ("total", total),
        ("L_T, prior", prior),
        ("L_1 .. L_T-1", vlb[:, :-1].sum(1)),
        ("L_0, decoder", vlb[:, -1]),
    ):
        error = values.std().item() / len(values) ** 0.5
        lines.append(f"  {name:<16}{values.mean().item():>9.4f} +- {error:.4f}")
    lines.append(f"mean squared error of epsilon: {mse.mean().item():.5f}")
    return "\n".join(lines)


def _noise_of(seed: int, sample_ids: range) -> Callable[[int, int, tuple[int, ...]], Tensor]:
    """Noise that each image has for itself, whatever its batch."""
    return lambda column, t, shape: randn(shape, seed=seed, sample_ids=sample_ids, step=column, stream="training")
