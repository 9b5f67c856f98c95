"""The state of an unfinished run: what the next optimiser step depends on, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .files import load_exactly, read_tensors, take_prefix, write_tensors

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    path: str | Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW, header: dict[str, Any]
) -> None:
    """Write weights, averaged weights and AdamW's moments, with a JSON-serialisable header."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"ema.{name}": tensor for name, tensor in ema.state_dict().items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in _moments(model, optimizer).items()}
    write_tensors(path, "training", tensors, header)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and header. Raises as :func:`read_tensors`."""
    return read_tensors(path, "training")


def restore_state(
    path: str | Path, tensors: dict[str, Tensor], model: nn.Module, ema: nn.Module, optimizer: torch.optim.AdamW
) -> None:
    """Put tensors read by :func:`read_state` back, all bits as they were. Raises ValueError where they do not fit."""
    load_exactly(path, model.state_dict(), take_prefix(tensors, "model."), "weight")
    load_exactly(path, ema.state_dict(), take_prefix(tensors, "ema."), "averaged weight")
    for parameter in model.parameters():
        # What AdamW itself creates at its first step.
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    load_exactly(path, _moments(model, optimizer), take_prefix(tensors, "optimizer."), "optimizer state")


def _moments(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's state by parameter name."""
    return {
        f"{moment}.{name}": optimizer.state[parameter][moment]
        for name, parameter in model.named_parameters()
        for moment in _MOMENTS
    }
