"""The annotated diffusion model, Hugging Face's article: its schedules, in its float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule

_NAMES = ("linear", "cosine", "quadratic", "sigmoid")


def schedule(name: str, timesteps: int) -> NoiseSchedule:
    """The article's schedule `name` ("linear", "cosine", "quadratic" or "sigmoid"), computed in float32 as there.

    NoiseSchedule's own of these names agree with them up to float32's rounding; the cosine there is clipped to
    [0.0001, 0.9999] instead of 0.999.

    Raises:
        TypeError: `timesteps` is no int.
        ValueError: an unknown name, or no timesteps.
    """
    if name not in _NAMES:
        raise ValueError(f"name must be one of {', '.join(_NAMES)}, got {name!r}")
    if isinstance(timesteps, bool) or not isinstance(timesteps, int):
        raise TypeError(f"timesteps must be an int, got {type(timesteps).__name__}")
    if timesteps < 1:
        raise ValueError(f"timesteps must be at least 1, got {timesteps}")
    return NoiseSchedule.from_betas(_betas(name, timesteps))


def _betas(name: str, timesteps: int) -> Tensor:
    start, end = 1e-4, 0.02
    if name == "cosine":
        u = torch.linspace(0, timesteps, timesteps + 1) / timesteps
        abar = torch.cos((u + 0.008) / (1 + 0.008) * math.pi * 0.5) ** 2
        abar = abar / abar[0]
        return torch.clip(1 - abar[1:] / abar[:-1], 0.0001, 0.9999)
    if name == "quadratic":
        return torch.linspace(start**0.5, end**0.5, timesteps) ** 2
    if name == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (end - start) + start
    return torch.linspace(start, end, timesteps)
