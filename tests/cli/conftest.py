"""A small network with random weights as a checkpoint, and the command line run inside the test's process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ddpm_fast.cli.app import run
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import save_checkpoint

TIMESTEPS = 40


def tiny_network(**changes: object) -> UNet:
    """One level of attention and one without; no weight is zero, so that every layer counts."""
    fields: dict[str, object] = {
        "in_channels": 1,
        "base_channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_levels": (1,),
        "num_groups": 4,
        **changes,
    }
    torch.manual_seed(0)
    model = UNet(UNetConfig(**fields))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def write_checkpoint(path: Path, metadata: dict[str, object] | None = None, **changes: object) -> Path:
    described = {"prediction": "epsilon", "training": {"dataset": "digits"}} if metadata is None else metadata
    save_checkpoint(path, tiny_network(**changes), NoiseSchedule.linear(TIMESTEPS), metadata=described)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors")


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        status = run([str(argument) for argument in arguments])
        return Outcome(status, *capsys.readouterr())

    return call
