"""openai's improved-diffusion, guided-diffusion and GLIDE."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ddpm_fast.modes._mode import Mode, TableRequest
from ddpm_fast.schedule import NoiseSchedule, kept_steps
from ddpm_fast.solvers import SIGMA_SOLVERS, CoefficientTable, ddim_table, ddpm_table, langevin_table


class GuidedMode(Mode):
    """float64 tables cast to float32; a draw in each step, at t = 0 and for DDIM at eta 0 too, and masked there.

    The solvers that are not openai's draw as k-diffusion's do: `euler_ancestral` in every step but the last, the
    others never.

    Attributes:
        variance_floor: what the posterior variance, 0 at the cleanest step, is clipped to there; None for that of the
            next step. Imported tables are clipped already.
    """

    name: ClassVar[str] = "guided"
    solvers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim", "plms", "langevin", *SIGMA_SOLVERS)
    variance_floor: ClassVar[float | None] = None

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
                variance_floor=None if request.kept.is_imported else self.variance_floor,
            )
        if request.solver == "langevin":
            return langevin_table(
                request.kept,
                prediction=request.prediction,
                variance=request.variance,
                snr=request.corrector_snr,
                guidance_scale=request.guidance_scale,
                denoise_last=True,
            )
        ours = request.solver in SIGMA_SOLVERS
        eta = (1.0 if request.solver == "euler_ancestral" else 0.0) if ours else request.eta
        table = ddim_table(
            request.kept,
            prediction=request.prediction,
            variance=request.variance,
            eta=eta,
            guidance_scale=request.guidance_scale,
            final_alpha_cumprod=None if ours else self.final_alpha_cumprod(request.full),
        )
        if ours:
            draws = (*(1,) * (table.steps - 1), 0) if eta else (0,) * table.steps
            table = dataclasses.replace(table, solver=request.solver, draws=draws)
        if request.solver == "plms":  # whose first step asks the network twice, and draws each time
            table = dataclasses.replace(table, solver="plms", draws=(2, *table.draws[1:]))
        return table

    def final_alpha_cumprod(self, full: NoiseSchedule) -> float | None:
        """The abar at the end of DDIM's last step, None for the schedule's own."""
        return None
