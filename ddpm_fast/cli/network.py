"""A checkpoint as the commands need it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddpm_fast.cli.errors import UserError
from ddpm_fast.nn import UNet
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import load_checkpoint

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "fashion-mnist.safetensors"

_SIDES = {"digits": 8, "fashion-mnist": 28}


@dataclass(frozen=True)
class Network:
    """A trained network, its schedule, and the samples it makes."""

    path: Path
    model: UNet
    schedule: NoiseSchedule
    prediction: str
    variance: str
    shape: tuple[int, int, int]
    """(C, H, W) of a sample."""
    device: torch.device

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def conditions(self, sample_ids: range) -> dict[str, Any]:
        """Keyword arguments of the network; one with classes draws them in turn, by the sample's number."""
        classes = self.model.config.num_classes
        if classes is None:
            return {}
        return {"y": torch.tensor([number % classes for number in sample_ids], device=self.device)}


def device_of(name: str) -> torch.device:
    """The device called `name`; "cuda" is this process's own GPU, as torchrun numbers the processes of a machine.

    Raises:
        UserError: no such device.
    """
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no GPU")
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= torch.cuda.device_count():
        raise UserError(f"process {number} of this machine has no GPU: it has {torch.cuda.device_count()}")
    return torch.device("cuda", number)


def open_network(path: Path | None, image_size: int | None = None, device: torch.device | str = "cpu") -> Network:
    """Load a checkpoint, the shipped one by default.

    Args:
        path: the file.
        image_size: side of the images, for a checkpoint that does not say.
        device: where the network is to run.

    Raises:
        UserError: nothing is known of the images' size, or it contradicts the checkpoint.
        FileNotFoundError, ValueError: as :func:`load_checkpoint`.
    """
    path = SHIPPED if path is None else path
    model, schedule, metadata = load_checkpoint(path, device=device)
    training = metadata.get("training", {})
    side: int | None = _SIDES.get(training.get("dataset"), training.get("image_size"))
    if image_size is not None and side not in (None, image_size):
        raise UserError(f"{path} makes images of {side}x{side} pixels, not {image_size}x{image_size}")
    side = side or image_size
    if side is None:
        raise UserError(f"{path} does not say how large its images are: give --image-size")
    shape = (model.config.in_channels, side, side)
    prediction, variance = metadata.get("prediction", "epsilon"), metadata.get("variance", "fixed_small")
    return Network(path, model, schedule, prediction, variance, shape, torch.device(device))
