"""openai's improved-diffusion, guided-diffusion and GLIDE."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ddpm_fast.modes._mode import Mode, TableRequest
from ddpm_fast.schedule import NoiseSchedule, kept_steps
from ddpm_fast.solvers import CoefficientTable, ddim_table, ddpm_table


class GuidedMode(Mode):
    """float64 tables cast to float32; a draw in each step, at t = 0 and for DDIM at eta 0 too, and masked there."""

    name: ClassVar[str] = "guided"
    solvers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim", "plms")

    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """One section of `space_timesteps`."""
        return kept_steps(steps, None, schedule.timesteps)

    def table(self, request: TableRequest) -> CoefficientTable:
        """The posterior's coefficients, or DDIM's with the epsilon that belongs to the clipped x0."""
        if request.solver == "ddpm":
            return ddpm_table(
                request.kept,
                prediction=request.prediction,
                variance=request.variance,
                guidance_scale=request.guidance_scale,
            )
        table = ddim_table(
            request.kept,
            prediction=request.prediction,
            variance=request.variance,
            eta=request.eta,
            guidance_scale=request.guidance_scale,
            final_alpha_cumprod=self.final_alpha_cumprod(request.full),
        )
        if request.solver == "plms":  # whose first step asks the network twice, and draws each time
            table = dataclasses.replace(table, solver="plms", draws=(2, *table.draws[1:]))
        return table

    def final_alpha_cumprod(self, full: NoiseSchedule) -> float:
        """The abar at the end of DDIM's last step."""
        return 1.0
