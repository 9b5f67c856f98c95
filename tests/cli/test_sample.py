"""`ddpm-fast sample`: how the work is split, interrupted or taken up again changes no bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm_fast as df
from ddpm_fast.cli.network import SHIPPED
from ddpm_fast.cli.sample import share
from ddpm_fast.evaluation import to_uint8
from ddpm_fast.nn import UNet
from ddpm_fast.training import load_checkpoint
from ddpm_fast.training.files import write_atomically

from .conftest import Outcome, write_checkpoint

Cli = Callable[..., Outcome]
ROOT = Path(df.__file__).parent.parent


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(folder: Path) -> np.ndarray[Any, Any]:
    return np.concatenate([np.load(path) for path in sorted(folder.glob("*.npy"))])


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


@pytest.fixture
def options(checkpoint: Path) -> list[object]:
    """Ten samples in shards of four: the last one is padded."""
    return ["-n", 10, "--seed", 3, "--steps", 5, "--micro-batch", 4, "--checkpoint", checkpoint, "--format", "npy"]


@pytest.fixture
def whole(cli: Cli, options: list[object], tmp_path: Path) -> Path:
    """The samples of one process and one thread."""
    folder = tmp_path / "whole"
    assert cli("sample", *options, "--threads", 1, "--out", folder).status == 0
    return folder


def test_shards_hold_the_samplers_samples_in_order(whole: Path, checkpoint: Path) -> None:
    assert sorted(contents(whole)) == [
        "manifest.json",
        "samples-00000.npy",
        "samples-00004.npy",
        "samples-00008.npy",
    ]
    x = samples(whole)
    assert (x.shape, x.dtype) == ((10, 1, 8, 8), np.float32)
    torch.set_num_threads(1)
    model, schedule, _ = load_checkpoint(checkpoint)
    sampler = df.Sampler(model, schedule, steps=5)
    expected = torch.cat([sampler.sample((4, 1, 8, 8), seed=3, sample_ids=range(i, i + 4)) for i in (0, 4, 8)])
    assert x.tobytes() == expected[:10].contiguous().numpy().tobytes()


def test_the_manifest_says_how_they_were_made(whole: Path, checkpoint: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings["checkpoint"]["file"] == checkpoint.name
    assert len(settings["checkpoint"]["sha256"]) == 64
    assert settings["made_with"]["torch"] == torch.__version__
    expected = {"samples": 10, "seed": 3, "steps": 5, "solver": "ddpm", "eta": 0.0, "micro_batch": 4, "format": "npy"}
    assert {name: settings[name] for name in expected} == expected
    assert [(shard["first"], shard["count"]) for shard in manifest["shards"]] == [(0, 4), (4, 4), (8, 2)]


def test_the_manifest_holds_the_checksums(whole: Path) -> None:
    manifest = json.loads((whole / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert shard["sha256"] == [hashlib.sha256((whole / file).read_bytes()).hexdigest() for file in shard["files"]]


def test_an_unfinished_run_keeps_checksums_that_sha256sum_checks(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    folder = tmp_path / "s"
    assert cli("sample", *options, "--out", folder).status == 0
    assert not any("sha256" in shard for shard in json.loads((folder / "manifest.json").read_text())["shards"])
    records = [path.name for path in folder.glob(".*.sha256")]
    assert sorted(records) == [".samples-00000.npy.sha256", ".samples-00008.npy.sha256"]
    subprocess.run(["sha256sum", "--check", "--strict", *records], cwd=folder, check=True, capture_output=True)


def test_a_shard_without_its_record_is_made_again(cli: Cli, options: list[object], whole: Path) -> None:
    """As a worker leaves it that is killed between the two."""
    before = contents(whole)
    manifest = json.loads((whole / "manifest.json").read_text())
    del manifest["shards"][1]["sha256"]
    (whole / "manifest.json").write_text(json.dumps(manifest))
    assert cli("sample", *options, "--out", whole).out == f"{whole}: 1 shards made, 2 were there already\n"
    assert contents(whole) == before


def test_a_shard_costs_two_writes_and_the_manifest_is_written_twice(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: of 50,000 samples each is written once."""
    written: list[str] = []

    def count(path: Path, *arguments: Any, **keywords: Any) -> None:
        written.append(path.name)
        write_atomically(path, *arguments, **keywords)

    monkeypatch.setattr("ddpm_fast.cli.sample.write_atomically", count)
    assert cli("sample", *options, "-n", 40, "--steps", 1, "--threads", 1, "--out", tmp_path / "s").status == 0
    shards = [f"samples-{first:05}.npy" for first in range(0, 40, 4)]
    assert sorted(written) == sorted(["manifest.json"] * 2 + shards + [f".{name}.sha256" for name in shards])


@pytest.mark.parametrize("size", [8, 12], ids=lambda size: f"shards-of-{size}")
def test_the_size_of_the_shards_changes_no_bit(
    cli: Cli, options: list[object], whole: Path, tmp_path: Path, size: int
) -> None:
    assert cli("sample", *options, "--shard-size", size, "--out", tmp_path / "s").status == 0
    assert len(list((tmp_path / "s").glob("*.npy"))) == -(-10 // size)
    assert samples(tmp_path / "s").tobytes() == samples(whole).tobytes()
    done = cli("sample", *options, "--out", tmp_path / "s")
    assert done.status == 2
    assert f"shard_size {size} there, 4 now" in done.err


def test_the_network_sees_one_batch_size(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = UNet.forward

    def record(self: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        seen.append((len(x), torch.get_num_threads()))
        return forward(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", record)
    assert cli("sample", *options, "--threads", 2, "--out", tmp_path / "s").status == 0
    assert seen == [(4, 1)] * 15  # 3 shards of 5 steps


@pytest.mark.parametrize("number", [2, 3])
def test_threads_change_no_bit(cli: Cli, options: list[object], whole: Path, tmp_path: Path, number: int) -> None:
    before = torch.get_num_threads()
    assert cli("sample", *options, "--threads", number, "--out", tmp_path / "s").status == 0
    assert contents(tmp_path / "s") == contents(whole)
    assert torch.get_num_threads() == before


def test_a_sample_does_not_depend_on_how_many_there_are(
    cli: Cli, options: list[object], whole: Path, tmp_path: Path
) -> None:
    options[1] = 3
    assert cli("sample", *options, "--out", tmp_path / "s").status == 0
    assert samples(tmp_path / "s").tobytes() == samples(whole)[:3].tobytes()


def test_torchrun_shares_the_work(options: list[object], whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "ddpm_fast", "sample"]
    done = subprocess.run(
        [*command, *map(str, options), "--out", str(tmp_path / "s")],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 of 2" in done.stdout
    assert "2 shards made" in done.stdout
    assert "1 shards made" in done.stdout
    assert contents(tmp_path / "s") == contents(whole)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=str)
def test_processes_may_come_in_any_order(
    cli: Cli,
    options: list[object],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, ...],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        done = cli("sample", *options, "--out", tmp_path / "s")
        assert done.out == f"rank {rank} of 3: {tmp_path / 's'}: 1 shards made\n"
    assert contents(tmp_path / "s") == contents(whole)


def test_the_last_process_makes_the_grid(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options[-1] = "grid"
    assert cli("sample", *options, "--out", tmp_path / "one").status == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        assert not (tmp_path / "two" / "grid.png").exists()
        monkeypatch.setenv("RANK", str(rank))
        assert cli("sample", *options, "--out", tmp_path / "two").status == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def finished(folder: Path) -> list[Path]:
    """The shards that are on record."""
    return [folder / path.name[1:].removesuffix(".sha256") for path in folder.glob(".*.sha256")]


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.parametrize(("processes", "then"), [(3, 2), (2, 3)], ids=["three-then-two", "two-then-three"])
def test_a_killed_worker_is_made_good(checkpoint: Path, cli: Cli, tmp_path: Path, processes: int, then: int) -> None:
    """torchrun ends the others when one is killed; the next run, of another size, finds what each has finished."""
    options = ["-n", "60", "--micro-batch", "2", "--checkpoint", str(checkpoint), "--format", "npy"]
    assert cli("sample", *options, "--threads", 1, "--out", tmp_path / "whole").status == 0
    folder = tmp_path / "s"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = ["-m", "ddpm_fast", "sample", *options, "--out", str(folder)]
    process = subprocess.Popen(
        [*torchrun, f"--nproc-per-node={processes}", *command],
        env=environment(),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(folder.glob(".*.sha256")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    os.kill(workers(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "SIGKILL" in err
    there = {path: path.stat().st_mtime_ns for path in finished(folder)}
    assert 0 < len(there) < 30
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={then}", *command],
        env=environment(),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    made = [int(number) for number in re.findall(r"(\d+) shards made", done.stdout)]
    assert len(made) == then
    assert sum(made) == 30 - len(there)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_killed_run_is_taken_up_again(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "sample", "-n", "40", "--micro-batch", "2", "--threads", "1"]
    command += ["--checkpoint", str(checkpoint), "--format", "npy", "--out"]
    subprocess.run([*command, "whole"], env=environment(), cwd=tmp_path, check=True, capture_output=True)
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, "killed"], env=environment(), cwd=tmp_path)
    while not list(killed.glob(".*.sha256")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = {path: path.stat().st_mtime_ns for path in finished(killed)}
    assert 0 < len(there) < 20
    done = subprocess.run(
        [*command, "killed"], env=environment(), cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout == f"killed: {20 - len(there)} shards made, {len(there)} were there already\n"
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert contents(killed) == contents(tmp_path / "whole")


def test_ctrl_c_ends_the_run_and_the_next_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ddpm_fast", "sample", "-n", "400", "--micro-batch", "2", "--threads", "2"]
    command += ["--checkpoint", str(checkpoint), "--format", "npy", "--out", "s"]
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and what they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list((tmp_path / "s").glob("*.npy")):
        assert process.poll() is None, "the run ended before it could be interrupted"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "ddpm-fast: interrupted\n"
    assert not list((tmp_path / "s").glob(".*.tmp"))


def test_only_what_is_missing_or_damaged_is_made_again(cli: Cli, options: list[object], whole: Path) -> None:
    before = contents(whole)
    assert cli("sample", *options, "--out", whole).out == f"{whole}: 0 shards made, 3 were there already\n"
    (whole / "samples-00004.npy").unlink()
    with open(whole / "samples-00008.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    untouched = (whole / "samples-00000.npy").stat().st_mtime_ns
    assert cli("sample", *options, "--out", whole).out == f"{whole}: 2 shards made, 1 were there already\n"
    assert contents(whole) == before
    assert (whole / "samples-00000.npy").stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["-n", 11], "samples 10 there, 11 now"),
        (["--seed", 4], "seed 3 there, 4 now"),
        (["--steps", 6], "steps 5 there, 6 now"),
        (["--solver", "ddim"], "solver 'ddpm' there, 'ddim' now"),
        (["--solver", "ddim", "--eta", 0.5], "eta 0.0 there, 0.5 now"),
        (["--micro-batch", 5], "micro_batch 4 there, 5 now"),
        (["--format", "png"], "format 'npy' there, 'png' now"),
    ],
    ids=lambda change: " ".join(map(str, change)) if isinstance(change, list) else "",
)
def test_other_settings_are_refused(
    cli: Cli, options: list[object], whole: Path, change: list[object], message: str
) -> None:
    before = contents(whole)
    done = cli("sample", *options, *change, "--out", whole)
    assert done.status == 2
    assert "made with other settings" in done.err
    assert message in done.err
    assert done.err.count("\n") == 1
    assert contents(whole) == before


def test_another_checkpoint_of_the_same_name_is_refused(
    cli: Cli, options: list[object], whole: Path, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "tiny.safetensors", time_embedding="scale_shift")
    done = cli("sample", *options, "--checkpoint", other, "--out", whole)
    assert done.status == 2
    assert "checkpoint" in done.err


def test_another_torch_is_refused(
    cli: Cli, options: list[object], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", "99.0")
    done = cli("sample", *options, "--out", whole)
    assert done.status == 2
    assert "99.0" in done.err


def test_samples_of_unknown_origin_are_not_added_to(cli: Cli, options: list[object], whole: Path) -> None:
    (whole / "manifest.json").unlink()
    done = cli("sample", *options, "--out", whole)
    assert done.status == 2
    assert "no manifest.json says how they were made" in done.err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": 3}', "\x00"], ids=repr)
def test_a_damaged_manifest_is_refused(cli: Cli, options: list[object], whole: Path, text: str) -> None:
    (whole / "manifest.json").write_text(text)
    done = cli("sample", *options, "--out", whole)
    assert done.status == 2
    assert "is no manifest of ddpm-fast sample" in done.err


def test_png_files_and_the_grid_show_the_samples(cli: Cli, options: list[object], whole: Path, tmp_path: Path) -> None:
    pixels = to_uint8(torch.from_numpy(samples(whole)))[:, 0].numpy()
    options[-1] = "png"
    assert cli("sample", *options, "--out", tmp_path / "png").status == 0
    files = sorted((tmp_path / "png").glob("*.png"))
    assert [file.name for file in files] == [f"sample-{i:05}.png" for i in range(10)]
    for file, expected in zip(files, pixels, strict=True):
        with Image.open(file) as image:
            assert image.mode == "L"
            assert np.array_equal(np.asarray(image), expected)
    before = contents(tmp_path / "png")
    files[6].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert cli("sample", *options, "--out", tmp_path / "png").out.endswith(": 2 shards made, 1 were there already\n")
    assert contents(tmp_path / "png") == before

    options[-1] = "grid"
    assert cli("sample", *options, "--out", tmp_path / "grid").status == 0
    assert samples(tmp_path / "grid").tobytes() == samples(whole).tobytes()
    with Image.open(tmp_path / "grid" / "grid.png") as image:
        # 10 images of 8 pixels, each shown as 64, in 4 columns and 3 rows with gaps of 2.
        assert image.size == (4 * 66 + 2, 3 * 66 + 2)
        seventh = np.asarray(image)[66 + 2 : 66 + 66, 2 * 66 + 2 : 2 * 66 + 66]
    assert np.array_equal(seventh, pixels[6].repeat(8, 0).repeat(8, 1))


def test_colours_are_kept(cli: Cli, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "rgb.safetensors", in_channels=3)
    common = ["sample", "-n", 2, "--steps", 2, "--micro-batch", 2, "--checkpoint", path]
    assert cli(*common, "--format", "npy", "--out", tmp_path / "npy").status == 0
    assert cli(*common, "--format", "png", "--out", tmp_path / "png").status == 0
    expected = to_uint8(torch.from_numpy(samples(tmp_path / "npy")))[1].permute(1, 2, 0).numpy()
    with Image.open(tmp_path / "png" / "sample-00001.png") as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), expected)


def test_other_channels_have_no_picture(cli: Cli, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "two.safetensors", in_channels=2)
    common = ["sample", "-n", 2, "--steps", 2, "--checkpoint", path, "--out", tmp_path / "s"]
    done = cli(*common, "--format", "png")
    assert done.status == 2
    assert "1 or 3 channels, these samples have 2" in done.err


def test_classes_are_drawn_in_turn(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_checkpoint(tmp_path / "classes.safetensors", num_classes=3)
    seen = []
    forward = UNet.forward

    def record(self: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        assert y is not None
        seen.append(y.tolist())
        return forward(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", record)
    common = ["sample", "-n", 5, "--steps", 1, "--micro-batch", 4, "--threads", 1, "--checkpoint", path]
    assert cli(*common, "--out", tmp_path / "s").status == 0
    assert seen == [[0, 1, 2, 0], [1, 2, 0, 1]]


def test_the_prediction_is_the_checkpoints(cli: Cli, tmp_path: Path) -> None:
    metadata = {"prediction": "v", "training": {"dataset": "folder", "image_size": 4}}
    path = write_checkpoint(tmp_path / "v.safetensors", metadata)
    assert cli("sample", "-n", 8, "--checkpoint", path, "--format", "npy", "--out", tmp_path / "s").status == 0
    torch.set_num_threads(1)
    model, schedule, _ = load_checkpoint(path)
    expected = df.Sampler(model, schedule, prediction="v").sample((8, 1, 4, 4), seed=0)
    assert samples(tmp_path / "s").tobytes() == expected.contiguous().numpy().tobytes()


def test_the_images_size_has_to_be_known(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    path = write_checkpoint(tmp_path / "bare.safetensors", metadata={})
    common = ["sample", "-n", 2, "--steps", 2, "--format", "npy", "--out", tmp_path / "s"]
    done = cli(*common, "--checkpoint", path)
    assert done.status == 2
    assert "give --image-size" in done.err
    assert cli(*common, "--checkpoint", path, "--image-size", 12).status == 0
    assert samples(tmp_path / "s").shape == (2, 1, 12, 12)
    done = cli(*common, "--checkpoint", checkpoint, "--image-size", 12)
    assert done.status == 2
    assert "makes images of 8x8 pixels, not 12x12" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solver", "magic"], "solver must be one of"),
        (["--steps", "41"], "steps must be between 1 and the schedule's 40"),
        (["--steps", "five"], "'five' is not understood"),
        (["--eta", "0.5"], "eta is a parameter of solver='ddim'"),
        (["--solver", "ddim", "--eta", "2"], "eta must lie in [0, 1]"),
        (["--checkpoint", "missing.safetensors"], "missing.safetensors"),
        (["--out", __file__], "File exists"),
        (["--shard-size", "6"], "--shard-size must be a multiple of --micro-batch 4, got 6"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    ],
    ids=lambda value: " ".join(Path(v).name for v in value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(
    cli: Cli, options: list[object], tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = cli("sample", *options, "--out", tmp_path / "s", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("gpus", "message"), [(0, "this torch sees no GPU"), (1, "process 1 of this machine has no GPU: it has 1")]
)
def test_a_gpu_that_is_not_there_is_refused(
    cli: Cli, options: list[object], monkeypatch: pytest.MonkeyPatch, gpus: int, message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = cli("sample", *options, "--device", "cuda")
    assert done.status == 2
    assert message in done.err


def test_a_truncated_checkpoint_is_refused(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    done = cli("sample", "--checkpoint", cut, "--out", tmp_path / "s")
    assert done.status == 2
    assert "damaged or truncated" in done.err


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "x"}, "must be integers"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "got 2 of 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "got -1 of 2"),
    ],
    ids=str,
)
def test_wrong_ranks_are_refused(
    cli: Cli, options: list[object], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = cli("sample", *options)
    assert done.status == 2
    assert message in done.err


def test_without_torchrun_there_is_one_process() -> None:
    assert share({}) == (0, 1)
    assert share({"RANK": "3", "WORLD_SIZE": "8"}) == (3, 8)


def test_an_error_in_one_thread_ends_the_others(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = UNet.forward

    def fail(self: UNet, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(int(t[0]))
        if len(calls) == 4:
            raise ValueError("the network\nfailed")
        return forward(self, x, t, y)

    monkeypatch.setattr(UNet, "forward", fail)
    done = cli("sample", *options, "--steps", 40, "--threads", 2, "--out", tmp_path / "s")
    assert done.status == 2
    assert done.err == "ddpm-fast: the network failed\n"
    assert len(calls) < 3 * 40
    assert sorted(contents(tmp_path / "s")) == ["manifest.json"]


@pytest.mark.parametrize("full", ["manifest.json", "samples-00004.npy", ".samples-00004.npy.sha256", "grid.png"])
def test_a_full_disk_loses_no_finished_shard(
    cli: Cli, options: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """/dev/full fails every write as a full disk does."""
    options[-1] = "grid"
    assert cli("sample", *options, "--out", tmp_path / "whole").status == 0
    monkeypatch.setattr(os, "getpid", lambda: 7)
    (folder := tmp_path / "s").mkdir()
    for name in (f".{full}.tmp", f".{full}.7.tmp"):
        (folder / name).symlink_to("/dev/full")
    done = cli("sample", *options, "--threads", 1, "--out", folder)
    assert (done.status, done.out) == (2, "")
    assert f"{full}: No space left on device" in done.err
    assert done.err.count("\n") == 1
    for name in (f".{full}.tmp", f".{full}.7.tmp"):
        (folder / name).unlink(missing_ok=True)
    there = {path: path.stat().st_mtime_ns for path in finished(folder)}
    assert len(there) == {"manifest.json": 0, "grid.png": 0}.get(full, 1)
    assert cli("sample", *options, "--out", folder).status == 0
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert contents(folder) == contents(tmp_path / "whole")


def test_the_shipped_checkpoint_is_the_default(cli: Cli, tmp_path: Path) -> None:
    assert cli("sample", "-n", 2, "--steps", 2, "--micro-batch", 2, "--format", "npy", "--out", tmp_path).status == 0
    x = samples(tmp_path)
    assert x.shape == (2, 1, 28, 28)
    assert np.isfinite(x).all()
    assert SHIPPED.stat().st_size <= 5_000_000
