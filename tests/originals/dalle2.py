"""DALL-E 2's loops, written out in plain PyTorch from its paper (Ramesh et al. 2022).

Where the paper is silent, the arithmetic is that of dalle2-pytorch: float32 buffers of float64 tables, the l2 clamp of
the prior's x0, the upper bound of a learned variance from a float32 beta, a draw in each step, which t = 0 masks.
Guidance is the paper's, which is GLIDE's: of epsilon alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Guided = Callable[[Tensor, Tensor], Tensor]
"""The network's output for a state and its timesteps, guidance included."""


class NoiseScheduler:
    def __init__(self, betas: Tensor) -> None:
        abar = torch.cumprod(1.0 - betas, dim=0)
        previous = F.pad(abar[:-1], (1, 0), value=1.0)
        variance = betas * (1.0 - previous) / (1.0 - abar)
        self.betas = betas.float()
        self.sqrt_recip_alphas_cumprod = torch.sqrt(1.0 / abar).float()
        self.sqrt_recipm1_alphas_cumprod = torch.sqrt(1.0 / abar - 1).float()
        self.sqrt_alphas_cumprod = torch.sqrt(abar).float()
        self.sqrt_one_minus_alphas_cumprod = torch.sqrt(1.0 - abar).float()
        self.posterior_log_variance_clipped = torch.log(variance.clamp(min=1e-20)).float()
        self.posterior_mean_coef1 = (betas * torch.sqrt(previous) / (1.0 - abar)).float()
        self.posterior_mean_coef2 = ((1.0 - previous) * torch.sqrt(1.0 - betas) / (1.0 - abar)).float()

    def read(self, table: Tensor, k: int, x: Tensor) -> Tensor:
        return table.gather(-1, torch.full((len(x),), k)).reshape(len(x), *(1,) * (x.dim() - 1))

    def q_sample(self, x0: Tensor, k: int, noise: Tensor) -> Tensor:
        return (
            self.read(self.sqrt_alphas_cumprod, k, x0) * x0
            + self.read(self.sqrt_one_minus_alphas_cumprod, k, x0) * noise
        )

    def stepped(self, x: Tensor, x0: Tensor, k: int, log_variance: Tensor, z: Tensor) -> Tensor:
        mean = self.read(self.posterior_mean_coef1, k, x) * x0 + self.read(self.posterior_mean_coef2, k, x) * x
        return mean + float(k != 0) * (0.5 * log_variance).exp() * z


def prior_loop(
    scheduler: NoiseScheduler, predict_x0: Guided, x: Tensor, noise: Iterator[Tensor], scale: float
) -> Tensor:
    """Embeddings from x_T; the network predicts x0."""
    for k in reversed(range(len(scheduler.betas))):
        with torch.no_grad():
            x0 = F.normalize(predict_x0(x, torch.full((len(x),), k)), dim=-1) * scale
            log_variance = scheduler.read(scheduler.posterior_log_variance_clipped, k, x)
            x = scheduler.stepped(x, x0, k, log_variance, next(noise))
    return F.normalize(x, dim=-1) * scale / scale


def decoder_loop(
    scheduler: NoiseScheduler, output: Guided, x: Tensor, noise: Iterator[Tensor], timesteps: list[int]
) -> Tensor:
    """Images from x_T; the network predicts epsilon and the place of the log variance between its bounds."""
    channels = x.shape[1]
    for k in reversed(range(len(scheduler.betas))):
        with torch.no_grad():
            both = output(x, torch.full((len(x),), timesteps[k]))
            epsilon, values = both[:, :channels], both[:, channels:]
            x0 = (
                scheduler.read(scheduler.sqrt_recip_alphas_cumprod, k, x) * x
                - scheduler.read(scheduler.sqrt_recipm1_alphas_cumprod, k, x) * epsilon
            ).clamp(-1.0, 1.0)
            low = scheduler.read(scheduler.posterior_log_variance_clipped, k, x)
            high = scheduler.read(torch.log(scheduler.betas), k, x)
            fraction = (values + 1) * 0.5
            x = scheduler.stepped(x, x0, k, fraction * high + (1 - fraction) * low, next(noise))
    return x
