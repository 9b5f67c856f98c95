"""diffusers' DDPMScheduler and DDIMScheduler. diffusers itself is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ddpm_fast.modes import _float32
from ddpm_fast.modes._mode import Mode, TableRequest
from ddpm_fast.schedule import NoiseSchedule, kept_steps
from ddpm_fast.solvers import CoefficientTable, check_eta, make_table


@dataclass(frozen=True)
class DiffusersMode(Mode):
    """Coefficients derived anew for each step from abar, as the schedulers do it: from a float32 one, in float32.

    DDPM draws where t > 0, DDIM where eta > 0. DDIM uses the network's own epsilon, whether or not x0 was
    clipped, which takes a second kernel where it was; and the timestep that it goes to is T // steps further
    down, whatever the spacing.

    Attributes:
        spacing: "leading", "trailing" or "linspace", for a number of steps.
        inference_steps: the steps whose stride DDIM goes down by, `set_timesteps`' own, of which a run may make a part;
            None for as many as the run makes.
        final_alpha_cumprod: DDIM's abar before timestep 0; None for that of timestep 0.
        clipped_output: `use_clipped_model_output`.
        coefficients: "float32", the schedulers' own, or "float64": the same formulas, exact.
    """

    name: ClassVar[str] = "diffusers"
    solvers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim")

    spacing: str = "leading"
    inference_steps: int | None = None
    final_alpha_cumprod: float | None = 1.0
    clipped_output: bool = False
    coefficients: str = "float32"

    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """The scheduler's spacing."""
        return kept_steps(steps, self.spacing, schedule.timesteps)

    def table(self, request: TableRequest) -> CoefficientTable:
        """The coefficients of `step`, for each timestep that is made."""
        ddim = request.solver == "ddim"
        eta = check_eta(request.eta)
        if request.prediction == "x_prev":
            raise ValueError("reference='diffusers' has no prediction='x_prev': use reference='guided'")
        if ddim and request.variance not in ("fixed_small", "fixed_large"):
            raise ValueError(f"diffusers' DDIM has no variance={request.variance!r}: use reference='guided'")
        if request.variance == "learned":
            raise ValueError(
                "variance='learned' is a variance in diffusers and a log variance here: use 'learned_range' or "
                "reference='guided'"
            )
        all_abar = _float32.alphas_cumprod(request.full)
        if self.coefficients == "float64":
            all_abar = torch.cumprod(1.0 - request.full.betas, dim=0)
        positions = torch.tensor(request.positions)
        abar = all_abar[positions]
        if ddim:
            final = all_abar[0] if self.final_alpha_cumprod is None else torch.tensor(self.final_alpha_cumprod)
            before = positions - request.full.timesteps // (self.inference_steps or len(positions))
            previous = torch.where(before >= 0, all_abar[before.clamp(min=0)], final)
            return self._ddim(request, abar, previous, eta)
        before = torch.cat([torch.tensor([-1]), positions[:-1]])
        previous = torch.where(before >= 0, all_abar[before.clamp(min=0)], torch.ones(()))
        return self._ddpm(request, abar, previous, positions)

    def _ddpm(self, request: TableRequest, abar: Tensor, previous: Tensor, positions: Tensor) -> CoefficientTable:
        beta_prod, beta_prod_previous = 1 - abar, 1 - previous
        alpha = abar / previous
        beta = 1 - alpha
        variance = torch.clamp(beta_prod_previous / beta_prod * beta, min=1e-20)
        draws = positions > 0
        zeros = torch.zeros_like(abar)
        log_min, log_max = zeros, zeros
        if request.variance == "learned_range":
            log_min, log_max = variance.log(), beta.log()
            sigma = draws.float()
        else:
            sigma = draws * (variance if request.variance == "fixed_small" else beta) ** 0.5
        return self._rows(
            request,
            abar,
            mean_from_x0=previous**0.5 * beta / beta_prod,
            mean_from_x=alpha**0.5 * beta_prod_previous / beta_prod,
            sigma=sigma,
            logs=(log_min, log_max),
            draws=draws,
        )

    def _ddim(self, request: TableRequest, abar: Tensor, previous: Tensor, eta: float) -> CoefficientTable:
        beta_prod = 1 - abar
        variance = ((1 - previous) / beta_prod) * (1 - abar / previous)
        sigma = eta * variance**0.5
        direction = (1 - previous - sigma**2) ** 0.5
        zeros = torch.zeros_like(abar)
        root, noise_root = (abar**0.5).double(), (beta_prod**0.5).double()
        mean_from_x0, direction64 = (previous**0.5).double(), direction.double()
        if request.edits_x0 and not self.clipped_output:
            # The epsilon of the output, not of the x0 that was made of it: a part in x_t, a part in the output.
            from_x, from_output = {
                "epsilon": (torch.zeros_like(root), torch.ones_like(root)),
                "x0": (1 / noise_root, -root / noise_root),
                "v": (noise_root, root),
            }[request.prediction]
            mean_from_x = direction64 * from_x
            weight: Tensor | None = direction64 * from_output
        else:
            mean_from_x = direction64 / noise_root
            mean_from_x0 = mean_from_x0 - mean_from_x * root
            weight = None
        return self._rows(
            request,
            abar,
            mean_from_x0=mean_from_x0,
            mean_from_x=mean_from_x,
            sigma=sigma,
            logs=(zeros, zeros),
            draws=torch.full(abar.shape, eta > 0),
            output_weight=weight,
        )

    def _rows(
        self,
        request: TableRequest,
        abar: Tensor,
        *,
        mean_from_x0: Tensor,
        mean_from_x: Tensor,
        sigma: Tensor,
        logs: tuple[Tensor, Tensor],
        draws: Tensor,
        output_weight: Tensor | None = None,
    ) -> CoefficientTable:
        root, noise_root = (abar**0.5).double(), ((1 - abar) ** 0.5).double()
        x0_from_x, x0_from_output = {
            "epsilon": (1 / root, noise_root / root),
            "v": (root, noise_root),
            "x0": (torch.zeros_like(root), torch.zeros_like(root)),
        }[request.prediction]
        log_min, log_max = logs
        columns = [x0_from_x, x0_from_output, mean_from_x0, mean_from_x, sigma, log_min, log_max]
        return make_table(
            request.solver,
            request.kept,
            request.prediction,
            request.variance,
            [*(c.double() for c in columns), torch.full_like(root, request.guidance_scale)],
            sigma,
            draws=tuple(int(d) for d in draws.flip(0)),
            output_weight=None if output_weight is None else output_weight.flip(0).float(),
        )
