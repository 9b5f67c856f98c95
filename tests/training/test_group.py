"""Training by several processes: the draws of one, sums that agree, and a killed worker's run taken up again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.training import TrainConfig
from ddpm_fast.training.files import read_tensors
from ddpm_fast.training.group import Group

ROOT = Path(df.__file__).parent.parent

# What each process runs: argv is the folder, and the step at which rank 1 is killed, or nothing. Besides training it
# keeps what the network was shown in each step, and the gradients that the optimiser got in the first.
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
from ddpm_fast.nn import UNet, UNetConfig
from ddpm_fast.training import ImageData, TrainConfig, train
from ddpm_fast.training.group import process_group

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
fatal = int(sys.argv[2]) if len(sys.argv) > 2 else None
unet = UNetConfig(
    in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_groups=4
)
config = TrainConfig(
    dataset="digits", unet=unet, timesteps=100, steps=6, batch_size=8, warmup_steps=2, seed=4, flip=True
)
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (35, 1, 8, 8), dtype=torch.uint8, generator=generator)
shown, gradients, forward, update = [], [], UNet.forward, torch.optim.AdamW.step

def watched(self, x, t, *rest):
    shown.append((x.clone(), t.clone()))
    return forward(self, x, t, *rest)

def recorded(self, *rest):
    if not gradients:
        gradients.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
    return update(self, *rest)

UNet.forward, torch.optim.AdamW.step = watched, recorded

def kill(step, loss):
    if step == fatal and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)

with process_group(torch.device("cpu")):
    result = train(
        config, folder, data=ImageData(images, None), resume=True, checkpoint_every=2, log_every=1, callback=kill
    )
torch.save((shown, gradients, result.log, result.model.state_dict()), folder / f"seen-{rank}.pt")
"""


class Seen(NamedTuple):
    """What one process saw."""

    shown: list[tuple[Tensor, Tensor]]
    gradients: list[Tensor]
    log: list[dict[str, float]]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER)

    def start(processes: int, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        return subprocess.run(
            [sys.executable, *(several if processes > 1 else []), str(script), str(folder), *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    return start


@pytest.fixture(scope="module")
def runs(launch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run by one, two and three processes."""
    folders = {}
    for processes in (1, 2, 3):
        folders[processes] = tmp_path_factory.mktemp("runs") / str(processes)
        done = launch(processes, folders[processes])
        assert done.returncode == 0, done.stderr
    return folders


def seen(folder: Path, processes: int) -> list[Seen]:
    found = [Seen(*torch.load(folder / f"seen-{rank}.pt")) for rank in range(processes)]
    return [s._replace(shown=s.shown[-6:]) for s in found]  # several processes begin with a pass to sort buckets


@pytest.mark.parametrize("processes", [2, 3])
def test_every_image_has_the_noise_that_it_has_with_one_process(runs, processes):
    """x_t, made of the image, its flip, its timestep and its noise, to the bit."""
    (one,) = seen(runs[1], 1)
    several = seen(runs[processes], processes)
    assert {len(s.shown[0][0]) for s in several} == ({4} if processes == 2 else {2, 3})
    for step, (x, t) in enumerate(one.shown):
        assert torch.equal(torch.cat([s.shown[step][0] for s in several]), x)
        assert torch.equal(torch.cat([s.shown[step][1] for s in several]), t)


@pytest.mark.parametrize("processes", [2, 3])
def test_gradients_and_weights_are_those_of_one_process(runs, processes):
    (one,) = seen(runs[1], 1)
    several = seen(runs[processes], processes)
    for s in several[1:]:  # all processes have the same bits
        assert all(torch.equal(a, b) for a, b in zip(s.gradients, several[0].gradients, strict=True))
        assert all(torch.equal(weight, several[0].weights[name]) for name, weight in s.weights.items())
    largest = max(gradient.abs().max() for gradient in one.gradients)
    for expected, gradient in zip(one.gradients, several[0].gradients, strict=True):
        # Sums over a batch of 8 and 64 pixels in another order: a few ulp of their largest terms.
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-6 * largest.item())
    rates = sum(row["learning_rate"] for row in one.log)
    for name, expected in one.weights.items():
        # AdamW divides a gradient by its own size, so where terms cancel and leave rounding errors alone, an update may
        # differ by as much as its length, the learning rate. Elsewhere the updates agree as the gradients do.
        difference = (several[0].weights[name] - expected).abs()
        assert difference.max() < rates
        assert difference.median() < 1e-3 * rates
    for row, expected_row in zip(several[0].log, one.log, strict=True):
        assert row["loss"] == pytest.approx(expected_row["loss"], rel=1e-3)


def test_rank_0_alone_writes(runs):
    for processes in (1, 2, 3):
        names = {f"seen-{rank}.pt" for rank in range(processes)}
        assert {path.name for path in runs[processes].iterdir()} - names == {
            "log.jsonl",
            "model.safetensors",
            "state.safetensors",
        }
        assert len((runs[processes] / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("processes", [2, 3])
def test_a_killed_worker_leaves_a_run_that_goes_on_to_the_same_bits(launch, runs, tmp_path, processes):
    folder = tmp_path / "run"
    done = launch(processes, folder, 5)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert read_tensors(folder / "state.safetensors", "training")[1]["step"] == 4
    done = launch(processes, folder)
    assert done.returncode == 0, done.stderr
    for file, kind in (("state.safetensors", "training"), ("model.safetensors", "model")):
        expected, found = (read_tensors(path / file, kind)[0] for path in (runs[processes], folder))
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_the_command_shares_a_batch(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "ddpm_fast",
    ]
    options = ["--dataset", "digits", "--base-channels", "8", "--batch-size", "8", "--steps", "2", "--accumulate", "2"]
    done = subprocess.run(
        [*command, "train", *options, "--dropout", "0.1", "--out", "run"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote run/model.safetensors") == 1


# ---------------------------------------------------------------------- the parts


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 8])
def test_shares_follow_each_other_and_cover_the_batch(processes, monkeypatch):
    group = Group(torch.device("cpu"))
    group.size = processes
    places = []
    sizes = set()
    for group.rank in range(processes):
        share = group.share(range(8, 16))
        places += list(share)
        sizes.add(len(share))
    assert places == list(range(8, 16))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


def test_a_process_alone_asks_nobody():
    group = Group(torch.device("cpu"))
    model = torch.nn.Linear(1, 1)
    assert (group.rank, group.size) == (0, 1)
    assert group.wrap(model) is model
    values = torch.ones(2)
    assert group.sum(values) is values
    group.agree("step", 3)
    group.wait()


def test_processes_that_differ_are_told(monkeypatch):
    group = Group(torch.device("cpu"))
    group.size = 2
    monkeypatch.setattr(group, "sum", lambda numbers: numbers + torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"different steps, \[2, 4\] by rank.*file system that all share"):
        group.agree("step", 2)


def test_a_batch_too_small_for_the_processes_is_refused(tmp_path, monkeypatch):
    from ddpm_fast.training import trainer

    class Many(Group):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self.size = 5

    monkeypatch.setattr(trainer, "Group", Many)
    images = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
    config = TrainConfig(dataset="digits", batch_size=8, accumulate=2)
    with pytest.raises(ValueError, match="5 processes share parts of 4 images"):
        trainer._Run(config, trainer.ImageData(images, None), torch.device("cpu"))
