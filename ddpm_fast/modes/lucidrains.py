"""lucidrains' denoising_diffusion_pytorch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ddpm_fast.modes._mode import TableRequest, check_count
from ddpm_fast.modes.guided import GuidedMode
from ddpm_fast.schedule import NoiseSchedule
from ddpm_fast.solvers import CoefficientTable, ddpm_table


class LucidrainsMode(GuidedMode):
    """openai's arithmetic; no draw in the last step, one in every other, for DDIM at eta 0 too."""

    name: ClassVar[str] = "lucidrains"
    solvers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim")
    variance_floor: ClassVar[float | None] = 1e-20

    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """The times of `ddim_sample`: from -1, which is left out, to T - 1, evenly, cut off to whole numbers."""
        total = schedule.timesteps
        times = torch.linspace(-1, total - 1, check_count(steps, total) + 1)
        return [int(t) for t in times.int().tolist()[1:]]

    def table(self, request: TableRequest) -> CoefficientTable:
        """The log of beta, the upper bound of a learned variance, is taken of a float32 beta."""
        if request.solver == "ddpm" and request.variance == "learned_range":
            table = ddpm_table(
                request.kept,
                prediction=request.prediction,
                variance=request.variance,
                guidance_scale=request.guidance_scale,
                log_betas=request.kept.betas.float().log().double(),
                variance_floor=None if request.kept.is_imported else self.variance_floor,
            )
        else:
            table = super().table(request)
        return dataclasses.replace(table, draws=(*table.draws[:-1], 0))
