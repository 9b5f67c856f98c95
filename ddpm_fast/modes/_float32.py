"""The tables of originals that work in float32 from their betas on."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule


def alphas_cumprod(schedule: NoiseSchedule) -> Tensor:
    """float32 ``(T,)``: the original's own where the schedule was read from one, else a float32 product.

    Raises:
        ValueError: a schedule whose levels are no timesteps.
    """
    if schedule.network_times.is_floating_point():
        raise ValueError(f"a {schedule.name} schedule has no float32 betas to start from: use reference='guided'")
    if schedule.is_imported:
        return schedule.alphas_cumprod.float()
    return torch.cumprod(1.0 - schedule.betas.float(), dim=0)
