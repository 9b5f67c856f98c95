"""CompVis' latent-diffusion and Stable Diffusion: the DDPM loop, DDIMSampler and PLMSSampler."""

from __future__ import annotations

from typing import ClassVar

from ddpm_fast.modes._mode import check_count
from ddpm_fast.modes.guided import GuidedMode
from ddpm_fast.schedule import NoiseSchedule


class LatentDiffusionMode(GuidedMode):
    """No clip; a draw in each step, at t = 0 and at eta 0 too, and PLMS draws twice in the first.

    DDIM and PLMS end at the abar of timestep 0, not at 1.
    """

    name: ClassVar[str] = "latent-diffusion"
    clip: ClassVar[tuple[float, float] | None] = None
    variance_floor: ClassVar[float | None] = 1e-20

    def choose(self, schedule: NoiseSchedule, steps: int) -> list[int]:
        """Every (T // steps)-th timestep, plus 1: often more of them than asked for.

        Where the 1 would lead past the end of the schedule, at which the original fails, it is left out.
        """
        total = schedule.timesteps
        chosen = list(range(0, total, total // check_count(steps, total)))
        return chosen if chosen[-1] + 1 == total else [t + 1 for t in chosen]

    def final_alpha_cumprod(self, full: NoiseSchedule) -> float:
        return float(full.alphas_cumprod[0])
