"""What goes wrong while a network trains: nothing is lost, and the message says what happened and where."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ddpm_fast.nn import UNet
from ddpm_fast.training import load_dataset, train, trainer
from ddpm_fast.training.trainer import LOG_FILE, MODEL_FILE, STATE_FILE

from .test_trainer import CONFIG, assert_same, everything, synthetic

KILLED = dataclasses.replace(CONFIG, steps=6)

# Kills itself when it is about to do something for the n-th time: rename a file, write a file's content, take a step.
SCRIPT = """
import json, os, signal, sys
import safetensors.torch, torch
from ddpm_fast.training import TrainConfig, files, train, trainer

config, folder, threads, where, countdown = *sys.argv[1:5], int(sys.argv[5])
torch.set_num_threads(int(threads))  # torch's own sums depend on it

def deadly(function, half=False):
    def call(*arguments, **options):
        global countdown
        countdown -= 1
        if countdown == 0:
            if half:
                function(*arguments, **options)
                path = arguments[1]
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

if where == "rename":
    os.replace = deadly(os.replace)
elif where == "write":
    files.save_file = deadly(files.save_file, half=True)
else:
    trainer._Run.advance = deadly(trainer._Run.advance)
train(TrainConfig.from_dict(json.loads(config)), folder, checkpoint_every=2, log_every=1, resume=True)
"""


def run_until_killed(folder: Path, where: str, count: int) -> None:
    arguments = [json.dumps(KILLED.to_dict()), str(folder), str(torch.get_num_threads()), where, str(count)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("straight")
    train(KILLED, folder, checkpoint_every=2, log_every=1)
    return everything(folder)


@pytest.mark.parametrize(
    ("where", "count"),
    [("rename", 1), ("rename", 6), ("write", 5), ("step", 4)],
    ids=["before-the-first-file", "between-the-last-two-files", "inside-a-file", "between-checkpoints"],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(
    tmp_path: Path, straight: dict[str, Any], where: str, count: int
) -> None:
    """SIGKILL, which nobody can catch. A checkpoint every two steps is two files: the model's, then the state's."""
    run_until_killed(tmp_path, where, count)
    train(KILLED, tmp_path, checkpoint_every=2, log_every=1, resume=True)
    assert_same(straight, everything(tmp_path))


# Trains on a disk that is full from step 7 on, and says how that ended.
FULL_DISK = """
import contextlib, json, resource, signal, sys
from pathlib import Path
import torch
from ddpm_fast.training import TrainConfig, train
from tests.training.test_trainer import synthetic

how, config, folder, threads = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)

def fill(step, loss):
    if step != 7:
        return
    if how == "file-size-limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    else:
        with contextlib.suppress(OSError), open(folder.parent / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))

try:
    train(TrainConfig.from_dict(config), folder, data=synthetic(), callback=fill, checkpoint_every=5, log_every=1)
except OSError as error:
    print(error)
"""


def on_a_small_disk(command: list[str], disk: Path, kept: Path) -> list[str]:
    """The command with a file system of its own, of a few checkpoints, at `disk`; what it leaves goes to `kept`."""
    script = 'disk=$0; kept=$1; shift; mount -t tmpfs -o size=4m none "$disk" && "$@" && cp -r "$disk/run" "$kept"'
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(disk), str(kept), *command]


@pytest.mark.parametrize("how", ["file-size-limit", "small-disk"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, how: str) -> None:
    """The system itself refuses, in safetensors' own code."""
    data, options = synthetic(), {"checkpoint_every": 5, "log_every": 1}
    train(CONFIG, tmp_path / "straight", data=data, **options)
    folder, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    where = folder if how == "file-size-limit" else disk / "run"
    arguments = [how, json.dumps(CONFIG.to_dict()), str(where), str(torch.get_num_threads())]
    command = [sys.executable, "-c", FULL_DISK, *arguments]
    if how == "small-disk":
        command = on_a_small_disk(command, disk, folder)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if how == "small-disk" and re.search("unshare|mount", done.stderr):
        pytest.skip(f"no file system of one's own here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    reason = "File too large" if how == "file-size-limit" else "No space left on device"
    assert re.search(rf"step 10: no checkpoint could be written .*{reason}.* is whole: resume from it", done.stdout)
    assert {path.name for path in folder.iterdir()} == {STATE_FILE, MODEL_FILE, LOG_FILE}
    train(CONFIG, folder, data=data, resume=True, **options)
    assert_same(everything(tmp_path / "straight"), everything(folder))


def test_a_disk_too_full_for_the_log(tmp_path: Path) -> None:
    """/dev/full fails every write as a full disk does."""
    data, options = synthetic(), {"checkpoint_every": 5, "log_every": 1}
    train(CONFIG, tmp_path / "straight", data=data, **options)
    log = tmp_path / "run" / LOG_FILE

    def fill(step: int, loss: float) -> None:
        if step == 7:
            log.rename(tmp_path / "kept")
            log.symlink_to("/dev/full")

    with pytest.raises(
        OSError, match=r"step 8: the log could not be written .*No space left.* is whole: resume from it"
    ):
        train(CONFIG, tmp_path / "run", data=data, callback=fill, **options)
    (tmp_path / "kept").rename(log)
    train(CONFIG, tmp_path / "run", data=data, resume=True, **options)
    assert_same(everything(tmp_path / "straight"), everything(tmp_path / "run"))


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int], indices: list[int], value: float = float("nan")) -> None:
    """The loss is not finite at these places of these steps' batches."""
    loss = trainer.diffusion_loss

    def bad(*arguments: Any, step: int, **options: Any) -> Tensor:
        losses = loss(*arguments, step=step, **options)
        if step in steps:
            losses = losses * torch.tensor([value if i in indices else 1.0 for i in range(len(losses))])
        return losses

    monkeypatch.setattr(trainer, "diffusion_loss", bad)


def test_a_loss_that_is_no_number_stops_the_run_and_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, options = synthetic(), {"checkpoint_every": 5, "log_every": 3}
    train(CONFIG, tmp_path / "straight", data=data, **options)
    poisoned(monkeypatch, {7}, [2, 5])
    with pytest.raises(FloatingPointError) as caught:
        train(CONFIG, tmp_path / "run", data=data, **options)
    run = trainer._Run(CONFIG, data, torch.device("cpu"))
    rows, (t, _) = run._rows(7), run.timestep_sampler.sample(8, seed=CONFIG.seed, step=7)
    assert str(caught.value) == (
        f"step 7: the loss is not finite at batch index 2 (image {rows[2]}, timestep {t[2]}): nan, "
        f"5 (image {rows[5]}, timestep {t[5]}): nan"
    )
    # The steps before it are kept, though the last checkpoint was due at step 5; with the cause gone it goes on.
    assert everything(tmp_path / "run")["header"]["step"] == 7
    monkeypatch.undo()
    train(CONFIG, tmp_path / "run", data=data, resume=True, **options)
    assert_same(everything(tmp_path / "straight"), everything(tmp_path / "run"))


def test_a_gradient_that_is_no_number_is_located_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = trainer._Run._backward

    def overflow(run: trainer._Run, *arguments: Any) -> Tensor:
        losses = backward(run, *arguments)
        run.model.conv_in.weight.grad[0, 0, 0, 0] = float("inf")
        return losses

    monkeypatch.setattr(trainer._Run, "_backward", overflow)
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient's norm is inf; the losses are finite.*image"):
        train(CONFIG, tmp_path, data=synthetic())


def test_steps_are_skipped_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poisoned(monkeypatch, {0, 4}, [1])
    data, options = synthetic(), {"checkpoint_every": 1, "log_every": 5, "on_nan": "skip"}
    with pytest.warns(
        RuntimeWarning, match=r"step 4: .*batch index 1 \(image \d+, timestep \d+\): nan; the step is skipped"
    ):
        result = train(CONFIG, tmp_path / "run", data=data, **options)
    assert [(row["step"], row["skipped"]) for row in result.log] == [(5, 2), (10, 0)]
    assert all(np.isfinite(row["loss"]) for row in result.log)
    assert all(torch.isfinite(weight).all() for weight in result.model.state_dict().values())

    class Stop(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 6:
            raise Stop

    with pytest.warns(RuntimeWarning, match="step 0"), pytest.raises(Stop):
        train(CONFIG, tmp_path / "cut", data=data, callback=stop, **options)
    train(CONFIG, tmp_path / "cut", data=data, resume=True, **options)
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "cut"))


def test_skipping_everything_is_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNet, "forward", lambda self, x, t, y=None: self.conv_in(x)[:, :1] * float("nan"))
    with pytest.warns(RuntimeWarning), pytest.raises(FloatingPointError, match="the last 3 steps were all skipped"):
        train(CONFIG, tmp_path, data=synthetic(), on_nan="skip", log_every=3)


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in "abcdefgh":
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{name}.png")
    whole = (folder / "c.png").read_bytes()
    (folder / "c.png").write_bytes(whole[: len(whole) // 2])
    (folder / "e.jpg").write_text("<html>not found</html>")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    with pytest.raises(ValueError, match=r"c\.png: cannot read this image"):
        load_dataset("folder", tmp_path, image_size=8, channels=1)


def test_unreadable_images_are_skipped_as_asked_and_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    with pytest.warns(RuntimeWarning, match="2 of 9 files are left out") as caught:
        images, _ = load_dataset("folder", tmp_path / "images", image_size=8, channels=1, unreadable="skip")
    assert all(name in str(caught[0].message) for name in ("c.png", "e.jpg"))
    assert len(images) == 7
    config = dataclasses.replace(
        CONFIG, dataset="folder", data_folder=str(tmp_path / "images"), image_size=8, batch_size=7, steps=1
    )
    with pytest.raises(ValueError, match=r"c\.png"):
        train(config, tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="left out"):
        train(config, tmp_path / "run", unreadable="skip")


def test_a_folder_without_a_readable_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(FileNotFoundError, match="none of the 1 files"):
        load_dataset("folder", tmp_path, image_size=8, unreadable="skip")
    with pytest.raises(ValueError, match="unreadable must be one of"):
        load_dataset("folder", tmp_path, image_size=8, unreadable="ignore")


@pytest.mark.parametrize("content", ["truncated", "pickle", "empty"])
def test_a_state_that_is_none_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    train(CONFIG, tmp_path, data=synthetic())
    path = tmp_path / STATE_FILE
    whole = path.read_bytes()
    if content == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif content == "pickle":
        torch.save({"model": torch.zeros(3)}, path)
    else:
        path.write_bytes(b"")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"state\.safetensors: damaged or truncated, or not a safetensors file"):
        train(CONFIG, tmp_path, data=synthetic(), resume=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_state_of_another_program_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / STATE_FILE)
    with pytest.raises(ValueError, match="not one that ddpm_fast wrote"):
        train(CONFIG, tmp_path, data=synthetic(), resume=True)
