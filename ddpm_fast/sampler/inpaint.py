"""Inpainting: the known part of the images, noised to the level of the state and put into it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule

BLENDS = ("before", "after", "repaint")


class Inpainting:
    """What a run keeps of known images.

    - "before": before each step the state's known part is replaced by the known images noised to the step's
      timestep (latent-diffusion's DDIM).
    - "after": the same behind each step, at that step's timestep still (latent-diffusion's DDPM).
    - "repaint": behind each step, at the timestep that it leads to; then, `resample` - 1 times, noise is added
      to go back to the step's timestep and the step is made again (Lugmayr et al. 2022, algorithm 1). The last
      step, which leads to the images, is made once.

    Args:
        mask: float32, of the samples' shape; 1 where `known` is kept.
        known: float32 ``(N, C, *)``.
        blend, resample: as above.
        full, positions: the schedule and the numbers in it of the steps that are made, ascending.
    """

    def __init__(
        self,
        mask: Tensor,
        known: Tensor,
        blend: str,
        resample: int,
        full: NoiseSchedule,
        positions: tuple[int, ...],
    ) -> None:
        self.mask, self.rest, self.known = mask, 1.0 - mask, known
        self.blend, self.resample = blend, resample
        levels = torch.stack([full.sqrt_alphas_cumprod, full.sqrt_one_minus_alphas_cumprod], dim=1)[list(positions)]
        below = torch.cat([torch.tensor([[1.0, 0.0]], dtype=torch.float64), levels[:-1]])
        kept = levels[:, 0] / below[:, 0]  # sqrt(1 - beta) of the step back up
        up = torch.stack([kept, (1.0 - kept**2).clamp(min=0.0).sqrt()], dim=1)
        self.levels, self.below, self.up = (
            table.flip(0).float().to(known.device).unbind() for table in (levels, below, up)
        )

    def repetitions(self, i: int) -> int:
        """How often step i is made."""
        return self.resample if i + 1 < len(self.levels) else 1

    def extras(self, draws: tuple[int, ...], stochastic: bool) -> int:
        """How many draws a run makes besides the `draws` of its steps."""
        if self.blend != "repaint":
            return len(draws)
        counts = [self.repetitions(i) for i in range(len(draws))]
        again = sum(count - 1 for count, d in zip(counts, draws, strict=True) if d) if stochastic else 0
        return sum(2 * count - 1 for count in counts) + again

    def put(self, x: Tensor, noise: Tensor, i: int, below: bool = False) -> None:
        """Replace the known part of `x` by the known images, noised to step i's timestep or the one below."""
        signal, deviation = (self.below if below else self.levels)[i]
        noised = signal * self.known + deviation * noise
        x.copy_(noised * self.mask + self.rest * x)

    def back(self, x: Tensor, noise: Tensor, i: int) -> None:
        """Noise `x` from where step i leads to back to step i's timestep."""
        signal, deviation = self.up[i]
        x.copy_(signal * x + deviation * noise)
