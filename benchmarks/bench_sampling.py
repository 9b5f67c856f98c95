"""Whole loops: a plain one against Sampler, with a network and with one that does nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks.common import assert_equal, largest_error, shape_id
from benchmarks.eager import EagerDiffusion
from benchmarks.harness import Case
from benchmarks.whole_loops import diffusers_loop, diffusers_scheduler, network_alone, plain_loop
from ddpm_fast.cli.network import SHIPPED, open_network
from ddpm_fast.nn import UNet, UNetConfig, eager_copy


def fashion_mnist() -> tuple[UNet, str]:
    """The shipped network, or one of its architecture with random weights."""
    if SHIPPED.exists():
        return open_network(None).model.eval(), "the shipped network"
    config = UNetConfig(
        in_channels=1,
        base_channels=24,
        channel_mult=(1, 2, 4),
        num_res_blocks=1,
        attention_levels=(2,),
        num_heads=2,
        num_groups=8,
    )
    model = UNet(config).eval()
    for parameter in model.parameters():
        if not parameter.any():  # the branches that training starts from zero would hide an error in them
            nn.init.normal_(parameter, std=0.02)
    return model, "random weights"


def contiguous_copy(model: UNet) -> UNet:
    copy = UNet(replace(model.config, channels_last=False))
    copy.load_state_dict(model.state_dict())
    return copy.eval()


@pytest.mark.parametrize("samples", [1, 4, 16, 64])
def test_fashion_mnist(measure: Callable[[Case], None], quick: bool, samples: int) -> None:
    if quick and samples > 1:
        pytest.skip("--quick samples one image")
    steps = 2 if quick else 5
    model, whose = fashion_mnist()
    shape = (samples, 1, 28, 28)
    schedule = df.NoiseSchedule.linear(1000).respace(steps)
    timesteps = schedule.timestep_map.tolist()
    eager = EagerDiffusion(schedule)
    plain = {"plain loop": eager_copy(contiguous_copy(model)), "plain loop, channels_last": eager_copy(model)}
    sampler = df.Sampler(model, df.NoiseSchedule.linear(1000), steps=steps)
    start, noise = torch.randn(shape), torch.randn(steps, *shape)

    def check() -> float:
        got = sampler.sample(shape, x_T=start, noise=noise)
        error = max(
            largest_error(got, plain_loop(network, eager, timesteps, start, noise)) for network in plain.values()
        )
        assert error < 1e-3, f"{error} from the plain loop with the same noise"
        return error

    def run_plain(network: nn.Module) -> Tensor:
        return plain_loop(network, eager, timesteps, torch.randn(shape), None)

    scheduler = diffusers_scheduler(steps)

    measure(
        Case(
            what="sampling, a step",
            shape=shape,
            note=whose,
            ours=lambda: sampler.sample(shape, seed=3),
            peers={
                **{name: partial(run_plain, network) for name, network in plain.items()},
                "diffusers": lambda: diffusers_loop(plain["plain loop"], scheduler, torch.randn(shape)),
            },
            floors={"network alone": lambda: network_alone(model, timesteps, start)},
            check=check,
            steps=steps,
        )
    )


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (16, 3, 32, 32), (64, 1, 28, 28)], ids=shape_id)
def test_loop_alone(measure: Callable[[Case], None], quick: bool, shape: tuple[int, ...]) -> None:
    steps = 3 if quick else 50
    output = 0.1 * torch.randn(shape)
    schedule = df.NoiseSchedule.linear(1000).respace(steps)
    timesteps = schedule.timestep_map.tolist()
    eager = EagerDiffusion(schedule)

    def nothing(x: Tensor, t: Tensor) -> Tensor:
        return output

    scheduler = diffusers_scheduler(steps)
    sampler = df.Sampler(nothing, df.NoiseSchedule.linear(1000), steps=steps)
    start, noise = torch.randn(shape), torch.randn(steps, *shape)

    def check() -> float:
        got = sampler.sample(shape, x_T=start, noise=noise)
        assert_equal(got, plain_loop(nothing, eager, timesteps, start, noise), "the plain loop")
        return 0.0

    measure(
        Case(
            what="loop alone (empty network), a step",
            shape=shape,
            ours=lambda: sampler.sample(shape, seed=3),
            peers={
                "plain loop": lambda: plain_loop(nothing, eager, timesteps, torch.randn(shape), None),
                "diffusers": lambda: diffusers_loop(nothing, scheduler, torch.randn(shape)),
            },
            check=check,
            steps=steps,
        )
    )
