"""A mixture of Gaussians under diffusion: scores, likelihoods and marginals in closed form, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast.schedule import NoiseSchedule


class Mixture:
    """``sum_k weights[k] N(means[k], scales[k]^2 I)`` in D dimensions, and what q(x_t | x_0) makes of it.

    An instance is a network: called as ``mixture(x, t)`` with x ``(N, D)`` it returns the expected noise, in x's dtype.
    """

    def __init__(self, schedule: NoiseSchedule, weights: list[float], means: list[list[float]], scales: list[float]):
        self.abar = schedule.alphas_cumprod
        self.weights, self.means, self.scales = (
            torch.tensor(values, dtype=torch.float64) for values in (weights, means, scales)
        )

    def _parts(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """abar ``(N,)``, differences to the means ``(N, K, D)``, variances and joint log densities ``(N, K)``."""
        abar = self.abar[t]
        difference = x.double()[:, None] - abar.sqrt()[:, None, None] * self.means
        variance = abar[:, None] * self.scales**2 + 1.0 - abar[:, None]
        distance = difference.square().sum(-1) / variance
        joint = self.weights.log() - 0.5 * (distance + x.shape[1] * (2.0 * math.pi * variance).log())
        return abar, difference, variance, joint

    def log_density(self, x: Tensor, t: Tensor) -> Tensor:
        """Of x at timestep t, ``(N,)``."""
        return torch.logsumexp(self._parts(x, t)[3], dim=1)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        _, difference, variance, joint = self._parts(x, t)
        share = torch.softmax(joint, dim=1)
        return -(share[..., None] * difference / variance[..., None]).sum(1)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return (-(1.0 - self.abar[t]).sqrt()[:, None] * self.score(x, t)).to(x.dtype)

    def draw(self, count: int, seed: int) -> Tensor:
        """Clean samples, float64 ``(count, D)``."""
        generator = torch.Generator().manual_seed(seed)
        part = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[part] + self.scales[part, None] * z

    def marginal_cdf(self, values: Tensor, direction: Tensor) -> Tensor:
        """The distribution function of the clean samples' projection on a unit vector."""
        z = (values[:, None] - self.means @ direction) / self.scales
        return (self.weights * torch.special.ndtr(z)).sum(1)
