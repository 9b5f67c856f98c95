"""Choosing the timesteps of a training batch; all of it a function of the seed, the step and what was learnt so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops import random_timesteps

_FINE = 1 << 30


class UniformTimesteps:
    """Every timestep equally often.

    Args:
        timesteps: T.
    """

    def __init__(self, timesteps: int) -> None:
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1, got {timesteps}")
        self.timesteps = timesteps

    def sample(
        self, samples: int, *, seed: int, step: int = 0, sample_ids: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps int64 ``(N,)``, and the weights ``(N,)`` float32 that make the mean loss an unbiased one: 1."""
        t = random_timesteps(samples, self.timesteps, seed=seed, step=step, sample_ids=sample_ids)
        return t, torch.ones(samples)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the losses ``(N,)`` at timesteps ``(N,)``: nothing."""

    def state(self) -> dict[str, Tensor]:
        """What a run that goes on needs, as tensors to load into."""
        return {}


class LossSecondMoment(UniformTimesteps):
    """Timesteps in proportion to the root of their losses' mean square: the variance of the bound's estimate falls.

    Nichol and Dhariwal 2021, section 3.3, as in improved-diffusion's LossSecondMomentResampler: uniform until each
    timestep has been seen `history` times; then the last `history` losses count, and a share `uniform` is kept even.

    Args:
        timesteps: T.
        history: losses remembered of each timestep.
        uniform: share that is drawn evenly, in (0, 1).
    """

    def __init__(self, timesteps: int, *, history: int = 10, uniform: float = 0.001) -> None:
        super().__init__(timesteps)
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        if not 0.0 < uniform < 1.0:
            raise ValueError(f"uniform must lie in (0, 1), got {uniform}")
        self.uniform = uniform
        self.history = torch.zeros(timesteps, history, dtype=torch.float64)
        self.counts = torch.zeros(timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """float64 ``(T,)``, summing to 1."""
        even = torch.full((self.timesteps,), 1.0 / self.timesteps, dtype=torch.float64)
        weights = self.history.square().mean(1).sqrt()
        if bool((self.counts < self.history.shape[1]).any()) or not bool(weights.any()):
            return even
        return weights / weights.sum() * (1.0 - self.uniform) + self.uniform * even

    def sample(
        self, samples: int, *, seed: int, step: int = 0, sample_ids: Sequence[int] | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps int64 ``(N,)``, and the weights ``1 / (T p(t))`` ``(N,)`` float32."""
        probabilities = self.probabilities()
        u = (random_timesteps(samples, _FINE, seed=seed, step=step, sample_ids=sample_ids).double() + 0.5) / _FINE
        t = torch.searchsorted(probabilities.cumsum(0), u, right=True).clamp(max=self.timesteps - 1)
        return t, (1.0 / (self.timesteps * probabilities[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses ``(N,)`` at timesteps ``(N,)``, in order; those that are not finite are left out."""
        length = self.history.shape[1]
        for number, loss in zip(t.tolist(), losses.detach().double().cpu(), strict=True):
            if not torch.isfinite(loss):
                continue
            count = int(self.counts[number])
            if count == length:
                self.history[number] = torch.cat([self.history[number, 1:], loss[None]])
            else:
                self.history[number, count] = loss
                self.counts[number] = count + 1

    def state(self) -> dict[str, Tensor]:
        """The memory itself: loading into these tensors restores it."""
        return {"history": self.history, "counts": self.counts}


TIMESTEP_SAMPLERS: Mapping[str, type[UniformTimesteps]] = {
    "uniform": UniformTimesteps,
    "loss_second_moment": LossSecondMoment,
}
"""By name, with their defaults."""
