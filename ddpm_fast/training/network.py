"""Calling the network that is trained or measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..schedule import NoiseSchedule


@lru_cache(maxsize=64)
def _network_times(schedule: NoiseSchedule, device: torch.device) -> Tensor | None:
    times = schedule.network_times
    return None if torch.equal(times, torch.arange(schedule.timesteps)) else times.to(device)


def network_time(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """What a network gets as t at these timesteps: their numbers in the schedule that this one was respaced from."""
    times = _network_times(schedule, t.device)
    return t if times is None else times[t]


def call_network(
    model: Callable[..., Any], x_t: Tensor, time: Tensor, kwargs: Mapping[str, Any], channels: int
) -> Tensor:
    """The tensor that the network returns, or the ``.sample`` of its output: ``(N, channels, *)``.

    Raises:
        TypeError: it returned nothing of the kind.
        ValueError: a tensor of another shape.
    """
    output = model(x_t, time, **kwargs)
    tensor = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"the model must return a tensor, or an output with .sample, it returned {type(output).__name__}"
        )
    expected = (x_t.shape[0], channels, *x_t.shape[2:])
    if tensor.shape != expected:
        raise ValueError(f"the model must return {expected}, it returned {tuple(tensor.shape)}")
    return tensor
