"""`ddpm-fast eval`: samples of a checkpoint, or of a folder, beside real images and noise."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_fast.cli import evaluate
from ddpm_fast.cli.network import open_network
from ddpm_fast.evaluation import load_classifier
from ddpm_fast.training import ImageData, bits_per_dim, load_dataset

from .conftest import Outcome

Cli = Callable[..., Outcome]


def test_samples_drawn_and_samples_read_score_the_same(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = ["-n", 12, "--seed", 1, "--steps", 3, "--checkpoint", checkpoint]
    drawn = cli("eval", "--dataset", "digits", *options)
    assert drawn.status == 0
    rows = [line.split() for line in drawn.out.splitlines()]
    assert [row[:2] for row in rows[1:4]] == [["real", "test"], ["samples", "12"], ["pure", "noise"]]
    assert cli("sample", *options, "--out", tmp_path / "s").status == 0
    read = cli("eval", "--dataset", "digits", "--samples", tmp_path / "s", "--seed", 1)
    assert read == drawn


def test_fashion_mnist_is_measured_with_the_shipped_classifier(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 28, 28), dtype=torch.uint8, generator=generator)
    real = ImageData(images, torch.arange(20) % 10)
    monkeypatch.setattr(evaluate, "real_images", lambda dataset, folder: (real, real))
    seen = []

    def record(*arguments: Any, **options: Any) -> str:
        seen.append(options["classifier"])
        return ""

    monkeypatch.setattr("ddpm_fast.evaluation.evaluate", record)
    assert cli("eval", "--data", tmp_path, "-n", 4, "--steps", 1, "--micro-batch", 4).status == 0
    assert torch.equal(seen[0].out.weight, load_classifier().out.weight)


def test_digits_are_split(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    train, test = evaluate.real_images("digits", None)
    images, labels = load_dataset("digits")
    assert labels is not None
    assert train.labels is not None
    assert test.labels is not None
    assert len(test.images) == 360
    assert torch.equal(torch.cat([train.images, test.images]), images)
    assert torch.equal(torch.cat([train.labels, test.labels]), labels)


def test_the_shards_are_read_in_order(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    common = ["sample", "-n", 7, "--steps", 2, "--micro-batch", 3, "--format", "npy", "--checkpoint", checkpoint]
    assert cli(*common, "--out", tmp_path / "s").status == 0
    x = evaluate.read_samples(tmp_path / "s")
    assert (x.shape, x.dtype) == ((7, 1, 8, 8), torch.float32)
    with open(tmp_path / "s" / "samples-00000.npy", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    done = cli("eval", "--dataset", "digits", "--samples", tmp_path / "s")
    assert done.status == 2
    assert "samples-00000.npy is damaged or unfinished" in done.err
    (tmp_path / "s" / "samples-00003.npy").unlink()
    done = cli("eval", "--dataset", "digits", "--samples", tmp_path / "s")
    assert done.status == 2
    assert "samples-00003.npy is missing" in done.err


def test_bits_per_dimension_of_test_images(cli: Cli, checkpoint: Path) -> None:
    pytest.importorskip("sklearn")
    options = ["--dataset", "digits", "--bpd", "--seed", 3, "--steps", 5, "--checkpoint", checkpoint]
    done = cli("eval", *options, "-n", 7, "--micro-batch", 3)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("bits per dimension of 7 test images, 5 steps")
    shown = {line.split()[0]: float(line.split("+-")[0].split()[-1]) for line in done.out.splitlines()[1:5]}
    images = load_dataset("digits").images[-360:][:7]
    network = open_network(checkpoint)
    exact = bits_per_dim(network.model, network.schedule.respace(5), images, seed=3)
    # Printed to four decimals; the network's own layers round otherwise in another batch.
    assert shown["total"] == pytest.approx(float(exact.total.mean()), rel=1e-4)
    assert shown["L_T,"] == pytest.approx(float(exact.prior.mean()), abs=6e-5)
    assert shown["L_0,"] == pytest.approx(float(exact.vlb[:, -1].mean()), rel=1e-4)
    assert shown["L_1"] == pytest.approx(float(exact.vlb[:, :-1].sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset fashion-mnist needs --data"),
        (["--data", "nowhere"], "nowhere"),
        (["--dataset", "folder", "--data", "."], "eval needs images with labels"),
        (["--dataset", "digits", "--samples", "nowhere"], "holds no manifest.json"),
        (["--dataset", "digits", "--checkpoint", "nowhere"], "nowhere"),
        (["--dataset", "digits", "--inception", "nowhere"], "no Inception weights at nowhere"),
        (["--dataset", "digits", "--inception", __file__], "need torch-fidelity: pip install torch-fidelity"),
        (["--dataset", "digits", "--bpd", "--checkpoint", "nowhere"], "nowhere"),
        (["--dataset", "digits", "-n", "3"], "-n must be at least 4, got 3"),
        (["--dataset", "digits", "--bpd", "--samples", "s"], "leave --samples out"),
        (["--dataset", "digits", "--bpd"], "fashion-mnist.safetensors draws"),
    ],
    ids=lambda value: " ".join(Path(v).name for v in value) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as where it is not installed
    done = cli("eval", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1


def test_pictures_are_no_samples(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    common = ["sample", "-n", 2, "--steps", 2, "--checkpoint", checkpoint, "--out", tmp_path / "s"]
    assert cli(*common, "--format", "png").status == 0
    done = cli("eval", "--dataset", "digits", "--samples", tmp_path / "s")
    assert done.status == 2
    assert "holds PNG files" in done.err


def test_samples_of_another_shape_are_refused(cli: Cli, tmp_path: Path, checkpoint: Path) -> None:
    from .conftest import write_checkpoint

    path = write_checkpoint(tmp_path / "rgb.safetensors", in_channels=3)
    done = cli("eval", "--dataset", "digits", "-n", 4, "--steps", 2, "--checkpoint", path)
    assert done.status == 2
    assert "samples must be uint8 (N, C, H, W) like the training images" in done.err
