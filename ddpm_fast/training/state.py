"""The state of an unfinished run: what the next optimiser step depends on, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import load_exactly, read_tensors, write_tensors

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: str | Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.AdamW,
    others: dict[str, Tensor],
    header: dict[str, Any],
) -> None:
    """Write weights, averaged weights, AdamW's moments and other tensors, with a JSON-serialisable header."""
    write_tensors(path, "training", _tensors(model, ema, optimizer, others), header)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and header. Raises as :func:`read_tensors`."""
    return read_tensors(path, "training")


def restore_state(
    path: str | Path,
    tensors: dict[str, Tensor],
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.AdamW,
    others: dict[str, Tensor],
) -> None:
    """Put tensors read by :func:`read_state` back, all bits as they were. Raises ValueError where they do not fit."""
    load_exactly(path, _tensors(model, ema, optimizer, others), tensors, "training state")


def start_moments(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Make what AdamW itself would create at its first step, so that there is something to save before it."""
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }


def _tensors(
    model: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW, others: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Everything by the name it has in the file."""
    moments = {
        f"optimizer.{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    averages = {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    return {**weights, **averages, **moments, **others}
