"""The annotated diffusion model, Hugging Face's article: Ho et al. 2020, algorithm 2, as it is printed."""

from __future__ import annotations

from typing import ClassVar

import torch

from ddpm_fast.modes import _float32
from ddpm_fast.modes._mode import Mode, TableRequest
from ddpm_fast.schedule import NoiseSchedule, kept_steps
from ddpm_fast.solvers import CoefficientTable, make_table


class AnnotatedMode(Mode):
    """``sqrt(1 / alpha) * (x - beta * eps / sqrt(1 - abar))`` with float32 tables; no clip, no draw at t = 0."""

    name: ClassVar[str] = "annotated"
    solvers: ClassVar[tuple[str, ...]] = ("ddpm",)
    clip: ClassVar[tuple[float, float] | None] = None

    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """The article has no way to make fewer steps: as in "guided"."""
        return kept_steps(steps, None, schedule.timesteps)

    def table(self, request: TableRequest) -> CoefficientTable:
        """The article's step is linear in x and eps, and takes the place of x0 and of the mean:

        "x0" = 1 * x - beta / sqrt(1 - abar) * eps, mean = sqrt(1 / alpha) * "x0" + 0 * x.

        Where something is done to x0, the same coefficients go by way of the true one.
        """
        if request.prediction != "epsilon" or request.variance != "fixed_small":
            raise ValueError(
                f"reference='annotated' has prediction='epsilon' and variance='fixed_small' only, "
                f"got {request.prediction!r} and {request.variance!r}; use reference='guided'"
            )
        schedule = request.kept
        # Every table is float32, as in the article; what is made of them for the kernel is float64.
        betas = schedule.betas.float()
        alphas = 1.0 - betas
        abar = _float32.alphas_cumprod(schedule)
        previous = torch.cat([torch.ones(1), abar[:-1]])
        root = torch.sqrt(1.0 - abar).double()
        recip = torch.sqrt(1.0 / alphas).double()
        sigma = torch.sqrt(betas * (1.0 - previous) / (1.0 - abar))
        sigma[0] = 0.0
        ones, zeros = torch.ones_like(root), torch.zeros_like(root)
        from_output = betas.double() / root
        x0_from_x = abar.double().rsqrt()
        x0_from_output = root * x0_from_x
        tail = [sigma.double(), zeros, zeros, torch.full_like(root, request.guidance_scale)]
        if request.needs_x0:
            mean_from_x0 = recip * from_output / x0_from_output
            columns = [x0_from_x, x0_from_output, mean_from_x0, recip - mean_from_x0 * x0_from_x, *tail]
            x0_rows = None
        else:
            columns = [ones, from_output, recip, zeros, *tail]
            x0_rows = torch.stack([x0_from_x, x0_from_output, ones, zeros, *tail], dim=1).flip(0).float()
        return make_table(
            "ddpm",
            schedule,
            request.prediction,
            request.variance,
            columns,
            sigma,
            draws=(*(1,) * (schedule.timesteps - 1), 0),
            x0_rows=x0_rows,
        )
