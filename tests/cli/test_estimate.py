"""`ddpm-fast sample --estimate`: what a run would take, and that nothing is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ddpm_fast.cli.estimate import Estimate, duration, estimate
from ddpm_fast.cli.sample import Request

from .conftest import TIMESTEPS, Outcome

Cli = Callable[..., Outcome]


def request(checkpoint: Path, **changes: object) -> Request:
    arguments = {
        "checkpoint": checkpoint, "image_size": None, "count": 10, "seed": 3, "steps": None, "solver": "ddpm",
        "eta": 0.0, "micro_batch": 4, "output": "npy", **changes,
    }  # fmt: skip
    return Request(**arguments)


def test_it_counts_the_work_and_writes_nothing(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    options = ["-n", 10, "--micro-batch", 4, "--checkpoint", checkpoint, "--format", "npy", "--out", folder]
    done = cli("sample", *options, "--threads", 2, "--estimate")
    assert done.status == 0
    assert re.fullmatch(rf"3 shards, 2 at once, {TIMESTEPS} steps of \d+\.\d ms: about \d+\.\d s\n", done.out), done.out
    assert not folder.exists()
    assert cli("sample", *options, "--steps", 3).status == 0
    (folder / "samples-00004.npy").unlink()
    before = sorted(folder.iterdir())
    done = cli("sample", *options, "--steps", 3, "--estimate")
    assert done.out.startswith("1 shards (2 are there already), 1 at once, 3 steps of ")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("steps", "solver"), [(1, "ddpm"), (2, "ddim"), (TIMESTEPS, "ddim")])
def test_runs_shorter_than_the_timed_steps(checkpoint: Path, tmp_path: Path, steps: int, solver: str) -> None:
    found = estimate(request(checkpoint, steps=steps, solver=solver), tmp_path / "none", threads=1)
    assert (found.shards, found.found, found.threads, found.steps) == (3, 0, 1, steps)
    assert found.step_seconds > 0


def test_a_share_of_the_work(checkpoint: Path, tmp_path: Path) -> None:
    assert [estimate(request(checkpoint), tmp_path, threads=1, rank=r, world=2).shards for r in (0, 1)] == [2, 1]


def test_the_last_round_counts_whole() -> None:
    assert Estimate(shards=5, found=0, threads=2, steps=10, step_seconds=0.5).seconds == 15.0
    assert Estimate(shards=0, found=5, threads=1, steps=10, step_seconds=0.0).seconds == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
