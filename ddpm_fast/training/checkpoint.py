"""Trained networks as single files: safetensors weights, the schedule's betas, and a JSON description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..nn import UNet, UNetConfig
from ..schedule import NoiseSchedule
from .files import load_exactly, read_tensors, take_prefix, write_tensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def save_checkpoint(
    path: str | Path,
    model: UNet,
    schedule: NoiseSchedule,
    *,
    metadata: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a network and its schedule; an existing file is replaced as a whole or not at all.

    Args:
        path: the file to write.
        model: the network; its weights and config are stored.
        schedule: its betas are stored in float64, so that the loaded schedule is the same to the bit.
        metadata: anything JSON can hold, returned by :func:`load_checkpoint`.
        dtype: float32, float16 or bfloat16 to store floating-point weights in; as they are by default.

    Raises:
        TypeError: `model` is not a UNet.
        ValueError: another dtype, a weight that is not finite in it, or a respaced schedule.
    """
    if not isinstance(model, UNet):
        raise TypeError(f"model must be a ddpm_fast.nn.UNet, got {type(model).__name__}")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {_DTYPES}, got {dtype}")
    if not torch.equal(schedule.timestep_map, torch.arange(schedule.timesteps)):
        raise ValueError("a respaced schedule cannot be stored: store the original and respace after loading")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        stored = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        if not torch.isfinite(stored).all():
            raise ValueError(f"weight {name} is not finite in {stored.dtype}")
        tensors[f"model.{name}"] = stored
    tensors["schedule.betas"] = schedule.betas
    header = {"architecture": "UNet", "unet": model.config.to_dict(), "metadata": metadata or {}}
    write_tensors(path, "model", tensors, header)


def load_checkpoint(
    path: str | Path, *, device: torch.device | str = "cpu"
) -> tuple[UNet, NoiseSchedule, dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote.

    Returns:
        The network (float32 whatever the file holds, in eval mode, without gradients, on `device`), the schedule,
        the metadata.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged or truncated, another program's or version's, of another architecture, or weights
            that do not fit the architecture.
    """
    tensors, header = read_tensors(path, "model")
    if header.get("architecture") != "UNet":
        raise ValueError(f"{path}: holds the architecture {header.get('architecture')!r}, this ddpm_fast knows 'UNet'")
    betas = tensors.pop("schedule.betas", None)
    if betas is None:
        raise ValueError(f"{path}: schedule.betas is missing")
    try:
        model = UNet(UNetConfig.from_dict(header["unet"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no valid UNet config in the header: {error}") from error
    load_exactly(path, model.state_dict(), take_prefix(tensors, "model."), "weight")
    model.eval().requires_grad_(False).to(device)
    return model, NoiseSchedule.from_betas(betas), header.get("metadata", {})
