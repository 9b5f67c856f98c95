"""The loops that whole-loop benchmarks compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks.eager import EagerDiffusion

Network = Callable[[Tensor, Tensor], Tensor]


@torch.inference_mode()
def plain_loop(model: Network, eager: EagerDiffusion, timesteps: list[int], x: Tensor, noise: Tensor | None) -> Tensor:
    """The loop of the annotated article and of lucidrains: a step at a time, the noise drawn where it is used.

    `timesteps` are what the network is told, the cleanest first; `noise` takes the place of the draws.
    """
    for i, t in reversed(list(enumerate(timesteps))):
        time = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        z = None if noise is None else noise[len(timesteps) - 1 - i]
        x = eager.p_sample(x, model(x, time), i, z)
    return x


@torch.no_grad()
def diffusers_loop(model: Network, scheduler: DDPMScheduler, x: Tensor) -> Tensor:
    """The loop of diffusers' DDPMPipeline."""
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(x.shape[0])), t, x).prev_sample
    return x


def diffusers_scheduler(steps: int) -> DDPMScheduler:
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace")
    scheduler.set_timesteps(steps)
    return scheduler


@torch.no_grad()
def network_alone(model: Network, timesteps: list[int], x: Tensor) -> None:
    time = torch.zeros(x.shape[0], dtype=torch.long)
    for _ in timesteps:
        model(x, time)
