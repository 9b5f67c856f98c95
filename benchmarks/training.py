"""Training steps: ours, and those that lucidrains' and diffusers' trainers make of the same network in eager PyTorch.

The optimiser (torch's fused AdamW), the clipping and the average (torch's AveragedModel) are the same on all sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks.eager import EagerDiffusion, gathered
from ddpm_fast._memory import kept_memory
from ddpm_fast.nn import UNet, UNetConfig, eager_copy
from ddpm_fast.training import TrainConfig, averaged_model, diffusion_loss

# The network of the shipped checkpoint.
CONFIG = UNetConfig(
    in_channels=1,
    base_channels=24,
    channel_mult=(1, 2, 4),
    num_res_blocks=1,
    attention_levels=(2,),
    num_heads=2,
    num_groups=8,
)
SCHEDULE = df.NoiseSchedule.linear(1000)

Loss = Callable[[nn.Module, Tensor], Tensor]


def network(config: UNetConfig = CONFIG) -> UNet:
    """With random weights, none of them zero: the branches that training starts from zero would cost less."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = UNet(config)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model


def our_network() -> UNet:
    """As `ddpm-fast train` sets it up."""
    model = network()
    model.set_conv_mode(TrainConfig().conv_mode)
    return model


def eager_network(layout: str) -> nn.Module:
    """The same weights on PyTorch's own operations, in a layout."""
    model = UNet(replace(CONFIG, channels_last=layout == "channels_last"))
    model.load_state_dict(network().state_dict())
    return eager_copy(model)


def our_loss() -> Loss:
    steps = count()
    return lambda model, images: diffusion_loss(model, SCHEDULE, images, seed=0, step=next(steps)).mean()


def lucidrains_loss() -> Loss:
    """denoising_diffusion_pytorch's p_losses: images to [-1, 1], buffers gathered, the mean error weighed by ones."""
    eager, loss_weight = EagerDiffusion(SCHEDULE), torch.ones(1000)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        x0 = images.float() / 255 * 2 - 1
        t = torch.randint(0, 1000, (len(x0),))
        x_t, noise = eager.q_sample(x0, t)
        error = F.mse_loss(model(x_t, t), noise, reduction="none").flatten(1).mean(1)
        return (error * gathered(loss_weight, t, error)).mean()

    return loss


def diffusers_loss() -> Loss:
    """diffusers' unconditional training script: its scheduler's add_noise, the error of a float output."""
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)

    def loss(model: nn.Module, images: Tensor) -> Tensor:
        x0 = images.float() / 127.5 - 1
        noise = torch.randn(x0.shape)
        t = torch.randint(0, 1000, (len(x0),)).long()
        output = model(scheduler.add_noise(x0, noise, t), t)
        return F.mse_loss(output.float(), noise.float())

    return loss


def step(model: nn.Module, loss: Loss, images: Tensor) -> Callable[[], float]:
    """One optimiser step, made again at each call."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    average = averaged_model(model, 0.999)

    def run() -> float:
        value = loss(model, images)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        return value.item()

    return run


def with_kept_memory(run: Callable[[], float]) -> Callable[[], float]:
    """As `train` runs its steps."""

    def kept() -> float:
        with kept_memory():
            return run()

    return kept


LOSSES = {"lucidrains": lucidrains_loss, "diffusers": diffusers_loss}
LAYOUTS = ("contiguous", "channels_last")


def contestant(name: str, images: Tensor) -> Callable[[], float]:
    """By name: "ours", or a trainer and a layout such as "diffusers channels_last"."""
    if name == "ours":
        return with_kept_memory(step(our_network(), our_loss(), images))
    trainer, layout = name.split()
    return step(eager_network(layout), LOSSES[trainer](), images)


PEERS = [f"{trainer} {layout}" for trainer in LOSSES for layout in LAYOUTS]
