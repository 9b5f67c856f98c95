"""`ddpm-fast train`: the options reach the trainer, and an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_fast.cli.evaluate import read_samples
from ddpm_fast.cli.network import open_network
from ddpm_fast.cli.train import configuration
from ddpm_fast.sampler import Sampler
from ddpm_fast.training import TrainConfig, load_checkpoint, trainer

from .conftest import Outcome

Cli = Callable[..., Outcome]
SMALL = ["--dataset", "digits", "--base-channels", 8, "--batch-size", 8, "--warmup", 2, "--checkpoint-every", 2]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainConfig, Any, dict[str, Any]]]:
    """What the trainer is called with, in place of training."""
    seen = []

    def record(config: TrainConfig, output: Any, **options: Any) -> None:
        seen.append((config, output, options))
        raise ValueError("recorded")

    monkeypatch.setattr("ddpm_fast.training.train", record)
    return seen


def test_a_run_leaves_a_checkpoint_that_sample_takes(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = cli("train", *SMALL, "--steps", 3, "--out", run)
    assert done.status == 0
    assert done.out.startswith(f"wrote {run / 'model.safetensors'} (loss ")
    assert len((run / "log.jsonl").read_text().splitlines()) == 1
    arguments = ["-n", 2, "--steps", 2, "--checkpoint", run / "model.safetensors", "--out", tmp_path / "s"]
    assert cli("sample", *arguments).status == 0
    assert (tmp_path / "s" / "grid.png").is_file()


def test_a_learned_variance_and_self_conditioning_reach_the_samples(cli: Cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--variance", "learned_range", "--loss", "hybrid", "--self-condition"]
    assert cli("train", *SMALL, "--steps", 2, *options, "--out", run).status == 0
    network = open_network(run / "model.safetensors")
    assert (network.variance, network.model.config.self_condition) == ("learned_range", True)
    arguments = ["-n", 2, "--steps", 3, "--checkpoint", run / "model.safetensors", "--out", tmp_path / "s"]
    assert cli("sample", *arguments, "--format", "npy", "--micro-batch", 2).status == 0
    sampler = Sampler(network.model.eval(), network.schedule, steps=3, variance="learned_range", self_condition=True)
    torch.testing.assert_close(read_samples(tmp_path / "s"), sampler.sample((2, 1, 8, 8)), rtol=1e-4, atol=1e-4)
    refused = cli("demo", "--checkpoint", run / "model.safetensors", "--steps", 2, "--out", tmp_path / "d")
    assert refused.status == 2
    bound = cli(
        "eval", "--dataset", "digits", "--bpd", "-n", 3, "--steps", 4, "--checkpoint", run / "model.safetensors"
    )
    assert bound.status == 0


def test_an_interrupted_run_goes_on_to_the_same_weights(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("train", *SMALL, "--steps", 6, "--out", tmp_path / "whole").status == 0
    advance = trainer._Run.advance

    def interrupted(run: trainer._Run, skip: bool) -> float:
        if run.step == 3:
            raise KeyboardInterrupt
        return advance(run, skip)

    monkeypatch.setattr(trainer._Run, "advance", interrupted)
    done = cli("train", *SMALL, "--steps", 6, "--out", tmp_path / "cut")
    assert done.status == 130
    assert "--resume goes on" in done.err
    assert done.err.count("\n") == 1
    monkeypatch.undo()

    refused = cli("train", *SMALL, "--steps", 6, "--out", tmp_path / "cut")
    assert refused.status == 2
    assert "go on with --resume" in refused.err
    other = cli("train", *SMALL, "--steps", 7, "--out", tmp_path / "cut", "--resume")
    assert other.status == 2
    assert "steps: 6 there, 7 now" in other.err

    assert cli("train", *SMALL, "--steps", 6, "--out", tmp_path / "cut", "--resume").status == 0
    whole, cut = (load_checkpoint(tmp_path / name / "model.safetensors")[0].state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_diverged_training_is_a_failed_check(cli: Cli, tmp_path: Path) -> None:
    done = cli("train", *SMALL, "--steps", 9, "--learning-rate", "1e30", "--warmup", 0, "--out", tmp_path)
    assert done.status == 1
    assert "loss" in done.err
    assert done.err.count("\n") == 1


def test_options_reach_the_trainer(cli: Cli, settings: list[Any], tmp_path: Path) -> None:
    options: dict[str, tuple[Any, str]] = {
        "--data": (str(tmp_path), "data_folder"),
        "--image-size": (16, "image_size"),
        "--steps": (77, "steps"),
        "--batch-size": (5, "batch_size"),
        "--learning-rate": (0.25, "learning_rate"),
        "--warmup": (9, "warmup_steps"),
        "--ema-decay": (0.5, "ema_decay"),
        "--schedule": ("cosine", "schedule"),
        "--timesteps": (123, "timesteps"),
        "--prediction": ("v", "prediction"),
        "--loss": ("huber", "loss"),
        "--variance": ("learned_range", "variance"),
        "--weighting": ("min_snr", "weighting"),
        "--timestep-sampler": ("loss_second_moment", "timestep_sampler"),
        "--offset-noise": (0.125, "offset_noise"),
        "--precision": ("bfloat16", "precision"),
        "--conv-mode": ("strict", "conv_mode"),
        "--accumulate": (5, "accumulate"),
        "--seed": (6, "seed"),
    }
    arguments = [part for name, (value, _) in options.items() for part in (name, value)]
    network = ["--base-channels", 24, "--channel-mult", "1,3", "--dropout", 0.125]
    attention = ["--dataset", "digits"]
    switches = ["--flip", "--resume", "--self-condition", "--gradient-checkpointing", "--skip-unreadable"]
    handling = ["--checkpoint-every", 11, "--on-nan", "skip"]
    cli("train", *attention, *arguments, *network, *switches, *handling, "--out", tmp_path)
    ((config, output, given),) = settings
    assert {field: getattr(config, field) for _, field in options.values()} == {
        field: value for value, field in options.values()
    }
    assert config.flip
    assert config.gradient_checkpointing
    assert (config.unet.self_condition, config.unet.learned_variance) == (True, True)
    assert (given["on_nan"], given["unreadable"]) == ("skip", "skip")
    assert config.dataset == "digits"
    assert (config.unet.base_channels, config.unet.channel_mult, config.unet.dropout) == (24, (1, 3), 0.125)
    assert output == tmp_path
    assert given["resume"]
    assert given["checkpoint_every"] == 11


@pytest.mark.parametrize("dataset", ["digits", "fashion-mnist", "folder"])
def test_every_data_set_has_a_network_that_suits_it(dataset: str) -> None:
    config = configuration(dataset, {"base_channels": None, "dropout": 0.1}, {"steps": 3})
    assert config.unet.in_channels == (3 if dataset == "folder" else 1)
    assert {"digits": 8, "fashion-mnist": 28, "folder": 32}[dataset] % config.unet.size_multiple == 0
    assert config.unet.dropout == 0.1
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset fashion-mnist needs --data"),
        (["--dataset", "folder"], "--dataset folder needs --data"),
        (["--data", "nowhere"], "nowhere"),
        (["--dataset", "folder", "--data", "."], "needs image_size"),
        (["--dataset", "digits", "--data", "."], "takes no folder"),
        (["--dataset", "digits", "--loss", "l3"], "loss must be one of"),
        (["--dataset", "digits", "--loss", "hybrid"], "loss='hybrid' trains a learned variance"),
        (["--dataset", "digits", "--weighting", "snr"], "weighting must be one of"),
        (["--dataset", "digits", "--timestep-sampler", "even"], "timestep_sampler must be one of"),
        (["--dataset", "digits", "--precision", "half"], "precision must be one of"),
        (["--dataset", "digits", "--conv-mode", "quick"], "conv_mode must be one of"),
        (["--dataset", "digits", "--accumulate", 3], "accumulate must divide batch_size 64"),
        (["--dataset", "digits", "--on-nan", "go"], "on_nan must be one of"),
        (["--dataset", "digits", "--prediction", "x_prev"], "prediction must be one of"),
        (["--dataset", "digits", "--schedule", "flat"], "flat"),
        (["--dataset", "digits", "--channel-mult", "1,two"], "--channel-mult must be integers"),
        (["--dataset", "digits", "--base-channels", 9], "base_channels"),
        (["--dataset", "digits", "--batch-size", 5000], "batch_size 5000 exceeds the 1797 images"),
        (["--dataset", "digits", "--ema-decay", 1], "ema_decay must lie in [0, 1)"),
    ],
    ids=lambda value: " ".join(map(str, value)) or "nothing" if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_status_2(cli: Cli, tmp_path: Path, arguments: list[object], message: str) -> None:
    done = cli("train", "--steps", 1, "--out", tmp_path / "run", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()
