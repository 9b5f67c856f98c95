"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A copy of a model whose parameters follow the model's by ``ema += (1 - d) * (weights - ema)``.

    Early on, ``d = min(decay, (1 + step) / (10 + step))``: the average forgets the random start quickly.

    Args:
        model: the model that is trained; its buffers are copied as they are.
        decay: in [0, 1).
    """

    def __init__(self, model: Model, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """Follow `model` after optimiser step number `step`, counted from 0."""
        weight = 1.0 - min(self.decay, (1 + step) / (10 + step))
        for average, current in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(current, weight)
        for buffer, current_buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            buffer.copy_(current_buffer)
