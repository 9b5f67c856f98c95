"""The training loop: it learns, and an interruption leaves no trace."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_fast.nn import Conv3x3, UNetConfig
from ddpm_fast.training import ImageData, TrainConfig, averaged_model, load_checkpoint, train
from ddpm_fast.training.files import read_tensors, write_tensors
from ddpm_fast.training.trainer import LOG_FILE, MODEL_FILE, STATE_FILE

UNET = UNetConfig(
    in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), num_groups=4
)
CONFIG = TrainConfig(dataset="digits", unet=UNET, timesteps=100, steps=10, batch_size=8, warmup_steps=3, seed=4)


class Interrupted(Exception):
    pass


def synthetic(count: int = 35, channels: int = 1) -> ImageData:
    """Bars at random places. 35 images are four batches of 8 an epoch and a rest of 3."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(count, channels, 8, 8, dtype=torch.uint8)
    labels = torch.randint(6, (count,), generator=generator)
    for i, column in enumerate(labels.tolist()):
        images[i, :, :, column : column + 2] = 255
    return ImageData(images, labels)


def with_classes(count: int) -> TrainConfig:
    return dataclasses.replace(CONFIG, unet=dataclasses.replace(UNET, num_classes=count))


def with_dropout(share: float) -> UNetConfig:
    return dataclasses.replace(UNET, dropout=share)


def everything(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind, less its clock."""
    tensors, header = read_tensors(folder / STATE_FILE, "training")
    del header["seconds"]
    model, _ = read_tensors(folder / MODEL_FILE, "model")
    rows = [json.loads(line) for line in (folder / LOG_FILE).read_text().splitlines()]
    for row in rows:
        del row["seconds"]
    return {"state": tensors, "model": model, "header": header, "log": rows}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["header"] == b["header"]
    assert a["log"] == b["log"]
    for key in ("state", "model"):
        assert a[key].keys() == b[key].keys()
        assert [name for name in a[key] if not torch.equal(a[key][name], b[key][name])] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"flip": True, "lr_decay": "cosine", "prediction": "v", "loss": "huber"},
        {"unet": dataclasses.replace(UNET, dropout=0.3, num_classes=6, time_embedding="scale_shift")},
        {
            "unet": dataclasses.replace(UNET, learned_variance=True, self_condition=True),
            "variance": "learned_range",
            "loss": "hybrid",
            "timesteps": 3,  # few, so that the sampler has seen enough of each before the interruption
            "timestep_sampler": "loss_second_moment",
            "weighting": "p2",
            "offset_noise": 0.1,
            "accumulate": 2,
            "precision": "bfloat16",
            "gradient_checkpointing": True,
        },
    ],
    ids=["plain", "flip-cosine-v-huber", "dropout-classes", "hybrid-and-every-other-option"],
)
@pytest.mark.parametrize("stop", [5, 7], ids=lambda n: f"stop{n}")
def test_resumes_bit_for_bit(tmp_path: Path, stop: int, changes: dict[str, Any]) -> None:
    config = dataclasses.replace(CONFIG, **changes)
    data = synthetic()
    options: dict[str, Any] = {"data": data, "log_every": 3, "checkpoint_every": 5}
    train(config, tmp_path / "straight", **options)

    def interrupt(step: int, loss: float) -> None:
        if step == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, tmp_path / "broken", **options, callback=interrupt)
    torch.manual_seed(123)  # another process would have another generator
    train(config, tmp_path / "broken", **options, resume=True)
    assert_same(everything(tmp_path / "straight"), everything(tmp_path / "broken"))


def test_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=90, batch_size=16, learning_rate=3e-3, ema_decay=0.9)
    result = train(config, tmp_path, data=synthetic(64), log_every=30)
    losses = [row["loss"] for row in result.log]
    assert [row["step"] for row in result.log] == [30, 60, 90]
    # Predicting zero scores 1; the bars leave little to guess.
    assert losses[-1] < 0.3
    assert losses[-1] < losses[0]
    # The file holds the averaged weights.
    loaded, schedule, metadata = load_checkpoint(tmp_path / MODEL_FILE)
    assert schedule.timesteps == 100
    assert (metadata["prediction"], metadata["step"]) == ("epsilon", 90)
    assert TrainConfig.from_dict(metadata["training"]) == config
    averaged, _ = read_tensors(tmp_path / STATE_FILE, "training")
    for name, weight in loaded.state_dict().items():
        assert weight.equal(averaged[f"ema.{name}"])
        assert weight.equal(result.model.state_dict()[name])


def test_every_image_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def spy(model: nn.Module, schedule: object, x0: torch.Tensor, t: object, **options: object) -> torch.Tensor:
        seen.append(x0[:, 0, 0, 0].clone())
        return sum(p.sum() for p in model.parameters()) * torch.zeros(len(x0))

    monkeypatch.setattr("ddpm_fast.training.trainer.diffusion_loss", spy)
    images = torch.arange(35, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(35, 1, 8, 8).contiguous()
    train(dataclasses.replace(CONFIG, steps=8), tmp_path, data=ImageData(images, None))
    first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
    assert first.unique().numel() == second.unique().numel() == 32
    assert not first.equal(second)


def test_seeds_differ(tmp_path: Path) -> None:
    results = [
        train(dataclasses.replace(CONFIG, steps=1, seed=seed), tmp_path / str(i), data=synthetic()).model
        for i, seed in enumerate((1, 1, 2))
    ]
    first, again, other = (model.conv_in.weight for model in results)
    assert first.equal(again)
    assert not first.equal(other)


def test_learning_rate() -> None:
    config = dataclasses.replace(CONFIG, steps=103, warmup_steps=3, learning_rate=0.9)
    assert [config.learning_rate_at(step) for step in range(4)] == pytest.approx([0.3, 0.6, 0.9, 0.9])
    assert config.learning_rate_at(102) == 0.9
    linear = dataclasses.replace(config, lr_decay="linear")
    assert [linear.learning_rate_at(step) for step in (3, 53, 102)] == pytest.approx([0.9, 0.45, 0.009])
    cosine = dataclasses.replace(config, lr_decay="cosine")
    assert [cosine.learning_rate_at(step) for step in (3, 53)] == pytest.approx([0.9, 0.45])
    assert 0 < cosine.learning_rate_at(102) < 0.001


def test_average() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = averaged_model(model, 0.5)
    nn.init.ones_(model.weight)
    expected = 0.0
    for step in range(12):
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay)
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert not average.module.weight.requires_grad
    with pytest.raises(ValueError, match="decay"):
        averaged_model(model, 1.0)


def test_config_round_trips_through_json() -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG
    with pytest.raises(ValueError, match="epochs"):
        TrainConfig.from_dict({"epochs": 3})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "imagenet"), ("loss", "l3"), ("loss", "hybrid"), ("variance", "small"),
        ("variance", "learned_range"),
        ("weighting", "snr"), ("timestep_sampler", "even"), ("precision", "float16"), ("accumulate", 3),
        ("conv_mode", "quick"),
        ("accumulate", 0), ("offset_noise", -0.1), ("prediction", "x_prev"), ("lr_decay", "step"), ("steps", 0),
        ("batch_size", 2.0), ("seed", -1), ("timesteps", True), ("learning_rate", 0.0), ("learning_rate", float("nan")),
        ("gradient_clip", -1.0), ("weight_decay", -1.0), ("ema_decay", 1.0),
        ("unet", dataclasses.replace(UNET, learned_variance=True)),
    ],
    ids=lambda v: None if isinstance(v, UNetConfig) else str(v),
)  # fmt: skip
def test_bad_configs_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="output" if field == "unet" else field):
        dataclasses.replace(CONFIG, **{field: value})


def test_refuses_other_runs_and_other_data(tmp_path: Path) -> None:
    data = synthetic()
    train(CONFIG, tmp_path, data=data)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(CONFIG, tmp_path, data=data)
    with pytest.raises(ValueError, match=r"another config: batch_size: 8 there, 16 now, seed: 4 there, 5 now"):
        train(dataclasses.replace(CONFIG, batch_size=16, seed=5), tmp_path, data=data, resume=True)
    with pytest.raises(ValueError, match="another data"):
        train(CONFIG, tmp_path, data=ImageData(data.images.flip(0), None), resume=True)
    # The same data elsewhere is the same run, and no checkpoint tells where it was.
    train(dataclasses.replace(CONFIG, data_folder="elsewhere"), tmp_path, data=data, resume=True)
    assert "data_folder" not in load_checkpoint(tmp_path / MODEL_FILE)[2]["training"]
    (tmp_path / STATE_FILE).write_bytes((tmp_path / STATE_FILE).read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or truncated"):
        train(CONFIG, tmp_path, data=data, resume=True)


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (CONFIG, synthetic(channels=3), "images must be uint8"),
        (CONFIG, ImageData(synthetic().images.float(), None), "images must be uint8"),
        (CONFIG, synthetic(7), "batch_size 8 exceeds the 7 images"),
        (CONFIG, ImageData(synthetic().images[..., :7], None), "multiples of 2"),
        (with_classes(6), ImageData(synthetic().images, None), "no labels"),
        (with_classes(5), synthetic(), "labels must"),
    ],
    ids=["channels", "float", "few", "size", "no-labels", "label-range"],
)  # fmt: skip
def test_refuses_data_that_does_not_fit(tmp_path: Path, config: TrainConfig, data: ImageData, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["log_every", "checkpoint_every", "on_nan"])
def test_bad_options(tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        train(CONFIG, tmp_path, data=synthetic(), **{option: 0})


def test_a_batch_in_parts_has_the_gradient_of_the_whole(tmp_path: Path) -> None:
    """The same noise, so that the weights differ by roundings alone, which Adam's division makes larger."""
    whole, parts = (
        train(dataclasses.replace(CONFIG, steps=3, accumulate=n), tmp_path / str(n), data=synthetic()) for n in (1, 4)
    )
    assert whole.log[0]["loss"] == pytest.approx(parts.log[0]["loss"], rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # three steps of at most 4e-4 each


def test_checkpointed_gradients_are_the_same_bits(tmp_path: Path) -> None:
    states = []
    for again in (False, True):
        config = dataclasses.replace(CONFIG, steps=3, gradient_checkpointing=again, unet=with_dropout(0.2))
        states.append(train(config, tmp_path / str(again), data=synthetic()).model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_mode_of_the_convolutions_is_that_of_the_trained_network_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def modes(model: nn.Module) -> set[str]:
        return {module.mode for module in model.modules() if isinstance(module, Conv3x3)}

    seen: set[str] = set()

    def spy(model: nn.Module, schedule: object, x0: torch.Tensor, t: object, **options: object) -> torch.Tensor:
        seen.update(modes(model))
        return sum(p.sum() for p in model.parameters()) * torch.zeros(len(x0))

    monkeypatch.setattr("ddpm_fast.training.trainer.diffusion_loss", spy)
    result = train(dataclasses.replace(CONFIG, steps=1, conv_mode="strict"), tmp_path, data=synthetic())
    assert seen == {"strict"}
    assert modes(result.model) == {"exact"}


def test_bfloat16_learns(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, steps=60, batch_size=16, learning_rate=3e-3, precision="bfloat16")
    log = train(config, tmp_path, data=synthetic(64), log_every=30).log
    assert log[-1]["loss"] < 0.5 < log[0]["loss"]
    weights, _ = read_tensors(tmp_path / STATE_FILE, "training")
    assert all(weight.dtype == torch.float32 for name, weight in weights.items() if name.startswith("model."))


def test_a_run_of_before_the_newer_fields_goes_on(tmp_path: Path) -> None:
    train(dataclasses.replace(CONFIG, steps=2), tmp_path, data=synthetic())
    tensors, header = read_tensors(tmp_path / STATE_FILE, "training")
    for field in ("variance", "weighting", "accumulate", "precision", "conv_mode"):
        del header["config"][field]
    del header["config"]["unet"]["self_condition"], header["averaged"]
    header["interval"].pop()
    write_tensors(tmp_path / STATE_FILE, "training", tensors, header)
    train(dataclasses.replace(CONFIG, steps=2), tmp_path, data=synthetic(), resume=True)
