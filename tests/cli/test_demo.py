"""`ddpm-fast demo`, and the plain loop that it compares with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import ddpm_fast as df
from ddpm_fast.cli.demo import compare, table
from ddpm_fast.cli.network import open_network
from ddpm_fast.cli.plain_loop import plain_loop
from ddpm_fast.nn import GroupNormSiLU, UNet

from .conftest import Outcome, write_checkpoint

Cli = Callable[..., Outcome]


@pytest.mark.parametrize("steps", [None, 7, 1], ids=str)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_plain_loop_is_the_sampler_to_the_bit(name: str, steps: int | None) -> None:
    def network(x: Tensor, t: Tensor) -> Tensor:
        return (0.3 * x).sin() + t.reshape(-1, 1, 1, 1).float() / 100

    sampler = df.Sampler(network, df.NoiseSchedule.named(name, 30), steps=steps)
    shape = (3, 2, 5, 4)
    x = plain_loop(
        network,
        sampler.schedule.betas,
        sampler.schedule.timestep_map,
        df.randn(shape, seed=5, stream="x_T"),
        lambda i: df.randn(shape, seed=5, step=i),
    )
    assert torch.equal(x, sampler.sample(shape, seed=5))


def test_the_demo_compares_and_writes_pictures(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    done = cli("demo", "-n", 5, "--steps", 20, "--checkpoint", checkpoint, "--threads", 1, "--out", tmp_path)
    assert done.status == 0
    assert "20 of 40 steps" in done.out
    for line in ("plain PyTorch loop", "ddpm_fast", "ratio", "between the loops", "drawn again alone", "wrote"):
        assert sum(row.startswith(line) for row in done.out.splitlines()) == 1
    assert "100%" in done.err  # the progress bar
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (3 * 66 + 2, 2 * 66 + 2)
    with Image.open(tmp_path / "denoising.gif") as image:
        assert image.n_frames == 20
        assert image.size == (3 * 66 + 2, 2 * 66 + 2)
        assert image.info["loop"] == 0


def test_the_two_loops_draw_the_same_images(checkpoint: Path) -> None:
    result = compare(open_network(checkpoint), count=4, steps=None, seed=3)
    # Rounding of the norms, carried through 40 steps of a network with random weights; noise of another seed, or one
    # step left out, gives differences of order one.
    assert result.difference < 1e-3
    assert result.twin_difference < 1e-3
    assert result.frames.shape == (40, 4, 1, 8, 8)
    assert torch.equal(result.frames[-1], result.x)
    other = compare(open_network(checkpoint), count=4, steps=None, seed=4)
    assert (other.x - result.x).abs().max() > 0.1
    assert "ratio" in table(result, 40)


def test_the_plain_network_is_pytorchs_own(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain: list[nn.Module] = []

    def loop(model: nn.Module, betas: Tensor, timesteps: Tensor, x: Tensor, noise: object) -> Tensor:
        plain.append(model)
        return x

    monkeypatch.setattr("ddpm_fast.cli.demo.plain_loop", loop)
    network = open_network(checkpoint)
    compare(network, count=1, steps=2, seed=0)
    (model,) = plain
    assert isinstance(model, UNet)
    assert not any(type(module) is GroupNormSiLU for module in model.modules())
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    assert any(type(module) is GroupNormSiLU for module in network.model.modules())


@pytest.mark.parametrize("kind", ["v", "classes"])
def test_other_networks_are_refused(cli: Cli, tmp_path: Path, kind: str) -> None:
    metadata = {"prediction": "v" if kind == "v" else "epsilon", "training": {"dataset": "digits"}}
    path = write_checkpoint(tmp_path / "x.safetensors", metadata, num_classes=3 if kind == "classes" else None)
    done = cli("demo", "--checkpoint", path, "--out", tmp_path)
    assert done.status == 2
    assert "predict epsilon, without classes" in done.err
