"""Whole loops with the networks that people have: ours accelerated, against what they run today.

`--compiled` adds torch.compile with freezing and max-autotune, which takes minutes to compile.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import ddpm_fast as df
from benchmarks import networks
from benchmarks.common import rms_error
from benchmarks.eager import EagerDiffusion
from benchmarks.harness import Case, Target
from benchmarks.whole_loops import diffusers_scheduler, network_alone, plain_loop
from tests.third_party.lucidrains import import_package

Measure = Callable[[Case], None]

STEPS = 2


@dataclass(frozen=True)
class Net:
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    target: dict[int, Target]  # by the number of images


NETS = {
    "CIFAR-10 DDPM (diffusers, 35.7M)": Net(networks.cifar, (3, 32, 32), {4: Target(2.2, 2.6), 16: Target(2.4, 2.8)}),
    "annotated article, 28x28": Net(networks.article, (1, 28, 28), {16: Target(2.5, 3.5)}),
}
CASES = [(name, samples) for name, net in NETS.items() for samples in net.target]


def output(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    y = model(x, t)
    return y.sample if hasattr(y, "sample") else y


def called(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return partial(output, model)


def compiled(model: nn.Module) -> nn.Module:
    options: dict[str, Any] = {"freezing": True, "max_autotune": True}
    return torch.compile(model, options=options)  # type: ignore[return-value]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0].split(' ')[0]}-{case[1]}")
def test_network(measure: Measure, quick: bool, pytestconfig: pytest.Config, case: tuple[str, int]) -> None:
    name, samples = case
    net = NETS[name]
    if quick and samples > 4 and net.shape[0] == 3:
        pytest.skip("--quick draws no large batch")
    shape = (samples, *net.shape)
    eager = net.make()
    eager_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    ours = df.accelerate(copy.deepcopy(eager), channels_last=True)
    schedule = df.NoiseSchedule.linear(1000)
    respaced = schedule.respace(STEPS)
    timesteps = respaced.timestep_map.tolist()
    diffusion = EagerDiffusion(respaced)
    sampler = df.Sampler(called(ours), schedule, steps=STEPS)

    def run(network: nn.Module) -> Tensor:
        return plain_loop(called(network), diffusion, timesteps, torch.randn(shape), None)

    peers: dict[str, Callable[[], object]] = {
        "eager contiguous": partial(run, eager),
        "eager channels_last": partial(run, eager_last),
    }
    if isinstance(eager, diffusers.UNet2DModel):
        pipeline = diffusers.DDPMPipeline(eager, diffusers_scheduler(STEPS))
        pipeline.set_progress_bar_config(disable=True)
        peers["DDPMPipeline"] = lambda: pipeline(samples, num_inference_steps=STEPS, output_type="np")
    else:
        theirs = import_package().GaussianDiffusion(eager, image_size=net.shape[1], timesteps=STEPS)
        peers["lucidrains"] = lambda: theirs.sample(samples)
    if pytestconfig.getoption("--compiled"):
        peers["compiled"] = partial(run, compiled(copy.deepcopy(eager)))
        peers["compiled channels_last"] = partial(run, compiled(copy.deepcopy(eager_last)))

    def check() -> float:
        x, t = torch.randn(shape), torch.arange(samples) * 30
        exact = output(networks.in_float64(eager), x.double(), t)
        error = rms_error(output(ours, x, t), exact)
        allowed = rms_error(output(eager_last, x, t), exact)
        assert error <= allowed, f"rms error {error:.2e}, eager's is {allowed:.2e}"
        return error

    measure(
        Case(
            what="whole loop, a step",
            shape=shape,
            note=name,
            ours=lambda: sampler.sample(shape, seed=3),
            peers=peers,
            floors={"network alone": partial(network_alone, called(ours), timesteps, torch.randn(shape))},
            check=check,
            target=net.target[samples],
            steps=STEPS,
        )
    )
