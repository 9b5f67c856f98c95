"""Exponential moving average of the weights, by torch's own AveragedModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

_Tensors = tuple[Tensor, ...] | list[Tensor]


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of a model whose parameters follow the model's by ``average += (1 - d) * (weights - average)``.

    Early on, ``d = min(decay, (1 + n) / (10 + n))`` for update number n, counted from 0: the average forgets the random
    start quickly. Call ``update_parameters(model)`` after each step; ``module`` is the copy, in eval mode.

    Args:
        model: the model that is trained; its buffers are copied as they are.
        decay: in [0, 1).

    Raises:
        ValueError: another decay.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay must lie in [0, 1), got {decay}")

    def follow(averages: _Tensors, weights: _Tensors, count: Tensor | int) -> None:
        n = int(count) - 1
        torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1 + n) / (10 + n)))

    average = AveragedModel(model, multi_avg_fn=follow)
    average.module.eval().requires_grad_(False)
    # At a count of 0 torch takes the weights over as they are.
    average.n_averaged.fill_(1)
    return average
