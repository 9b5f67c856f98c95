"""What a step does besides the network: one kernel, the least memory traffic, and nothing read on the host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.counting import Counter, Counts, per_step
from benchmarks.loops import LATENTS, LOOPS, Loop, Mark, Network

# Kernels that touch images, images read and written. Guidance on a batch of 2N takes a kernel more, which doubles the
# state: 1 read, 2 written. With a learned variance the output has 2C channels, an image more; of the unconditional
# output they are counted too, though the kernel does not read them.
OURS = {
    "guided-diffusion, fixed_small": (1, 3),
    "guided-diffusion, learned_range": (1, 4),
    "GLIDE, guidance": (2, 6 + 3),
    "lucidrains": (1, 3),
    "CompVis DDIM, guidance": (2, 4 + 3),
    "diffusers DDPM": (1, 3),
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name.replace(" ", "-"))
def test_a_step_costs_what_the_documentation_says(loop: Loop) -> None:
    ours, original = per_step(loop.ours, loop.shape), per_step(loop.theirs, loop.shape)
    kernels, transfers = OURS[loop.name]
    assert ours == Counts(kernels, transfers, small=0, host_reads=0)
    assert original.kernels >= 7 * kernels
    assert original.transfers > 4 * transfers
    assert loop.error() <= loop.tolerance


def test_guidance_in_two_calls_is_one_kernel_and_four_transfers() -> None:
    schedule = df.NoiseSchedule.linear(1000)

    def run(mark: Mark) -> Tensor:
        network = Network(torch.zeros(LATENTS), mark)
        sampler = df.Sampler(network, schedule, steps=4, guidance_scale=2.0)
        # Keywords that only one of the two has cannot be one batch.
        return sampler.sample(LATENTS, model_kwargs={"y": torch.ones(4)}, uncond_kwargs={})

    counter = Counter(LATENTS)
    with counter:
        run(counter.mark)
    # Two marks a step: between the calls nothing happens, and after the second the step.
    assert counter.stretches[-4:-2] == [Counts(0, 0, 0, 0), Counts(1, 4, 0, 0)]


@pytest.mark.parametrize(
    ("operation", "kernels", "transfers"),
    [
        (lambda x, y: x * y, 1, 3),
        (lambda x, y: x * 2.0, 1, 2),
        (lambda x, y: x * torch.ones(4, 1, 1, 1), 1, 2),
        (lambda x, y: x * torch.ones(4, 1, 1, 1).expand(x.shape), 1, 2),
        (lambda x, y: x.mul_(y), 1, 3),
        (lambda x, y: torch.mul(x, 2.0, out=y), 1, 2),
        (lambda x, y: x.copy_(y), 1, 2),
        (lambda x, y: torch.randn_like(x), 1, 1),
        (lambda x, y: x.normal_(), 1, 1),
        (lambda x, y: torch.cat([x, y]), 1, 4),
        (lambda x, y: torch.cat([x, y])[:4].mul(2.0), 2, 6),
        (lambda x, y: x[:2].reshape(2, 3, 8, 8).expand(2, 2, 3, 8, 8).transpose(0, 1), 0, 0),
        (lambda x, y: torch.empty_like(x), 0, 0),
        (lambda x, y: torch.ones(4).sqrt(), 0, 0),
    ],
    ids=[
        "product",
        "scalar",
        "broadcast",
        "expanded",
        "in-place",
        "out",
        "copy",
        "randn_like",
        "normal_",
        "cat",
        "half-of-it",
        "views",
        "allocation",
        "small",
    ],
)
def test_counter(operation, kernels, transfers) -> None:
    x, y = torch.randn(2, 4, 3, 8, 8)
    counter = Counter((4, 3, 8, 8))
    with counter:
        operation(x, y)
    (counts,) = counter.stretches
    assert (counts.kernels, counts.transfers, counts.host_reads) == (kernels, transfers, 0)


def test_counter_sees_reads_on_the_host() -> None:
    table = torch.arange(10.0)
    counter = Counter((4, 3, 8, 8))
    with counter:
        float(table[3])
        counter.mark()
        table[torch.tensor(3)]
    assert [counts.host_reads for counts in counter.stretches] == [1, 1]
