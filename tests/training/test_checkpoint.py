"""Model files: what comes back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ddpm_fast.nn import UNet
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.training import load_checkpoint, save_checkpoint
from ddpm_fast.training.files import write_atomically

SCHEDULE = NoiseSchedule.cosine(50)


@pytest.fixture
def model() -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(
            in_channels=1, base_channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(), num_groups=4
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> None:
    """Change tensors or metadata of a file, as another program might have written it."""
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def test_round_trip(tmp_path: Path, model: UNet) -> None:
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, model, SCHEDULE, metadata={"prediction": "epsilon", "note": [1, 2]})
    loaded, schedule, metadata = load_checkpoint(path)
    assert metadata == {"prediction": "epsilon", "note": [1, 2]}
    assert schedule.betas.equal(SCHEDULE.betas)
    assert loaded.config == model.config
    assert not loaded.training
    assert all(a.equal(b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    assert loaded(x, t).equal(model.requires_grad_(False)(x, t))
    assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_in_half_precision_loaded_in_float32(tmp_path: Path, model: UNet, dtype: torch.dtype) -> None:
    full, half = tmp_path / "full", tmp_path / "half"
    save_checkpoint(full, model, SCHEDULE)
    save_checkpoint(half, model, SCHEDULE, dtype=dtype)
    assert half.stat().st_size < 0.75 * full.stat().st_size
    loaded, schedule, _ = load_checkpoint(half)
    assert schedule.betas.equal(SCHEDULE.betas)
    for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert a.dtype == torch.float32
        assert a.equal(b.to(dtype).float())


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=lambda n: f"{n}-bytes")
def test_truncated(tmp_path: Path, model: UNet, kept: int) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, model, SCHEDULE)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_checkpoint(path)


def _drop(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], Any]:
    return lambda tensors, metadata: tensors.pop(name)


def _header(**changes: Any) -> Callable[[dict[str, torch.Tensor], dict[str, str]], Any]:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata["header"] = json.dumps({**json.loads(metadata["header"]), **changes})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("model.conv_in.weight"), r"missing \['conv_in.weight'\]"),
        (_drop("schedule.betas"), "schedule.betas is missing"),
        (lambda t, m: t.update({"model.extra": torch.zeros(1)}), r"unexpected \['extra'\]"),
        (lambda t, m: t.update({"model.conv_in.weight": torch.zeros(8, 1, 1, 1)}), "conv_in.weight has shape"),
        (lambda t, m: m.clear(), "not one that ddpm_fast wrote"),
        (lambda t, m: m.update(version="99"), "format version 99"),
        (lambda t, m: m.update(kind="training"), "holds a 'training' checkpoint"),
        (lambda t, m: m.update(header="{"), "no readable JSON header"),
        (_header(architecture="DiT"), "architecture 'DiT'"),
        (_header(unet={"depth": 4}), "no valid UNet config"),
        (_header(unet={"in_channels": 3, "base_channels": 32}), "does not fit the architecture"),
    ],
    ids=[
        "missing", "no-betas", "unexpected", "shape", "foreign", "version", "kind", "json", "architecture", "config",
        "other-unet",
    ],
)  # fmt: skip
def test_refuses_what_does_not_fit(tmp_path: Path, model: UNet, change: Callable[..., Any], message: str) -> None:
    path = tmp_path / "m"
    save_checkpoint(path, model, SCHEDULE)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "nothing")


def test_refuses_to_save(tmp_path: Path, model: UNet) -> None:
    path = tmp_path / "m"
    with pytest.raises(TypeError, match="UNet"):
        save_checkpoint(path, torch.nn.Linear(1, 1), SCHEDULE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype"):
        save_checkpoint(path, model, SCHEDULE, dtype=torch.int8)
    with pytest.raises(ValueError, match="respaced"):
        save_checkpoint(path, model, SCHEDULE.respace(10))
    model.conv_in.weight.data[0] = 1e5
    with pytest.raises(ValueError, match=r"conv_in.weight is not finite in torch.float16"):
        save_checkpoint(path, model, SCHEDULE, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text("old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_text() == "old"
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
