"""A whole step of the reverse process with its noise, the network's output given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, assert_equal, laid_out, largest_error, shape_id
from benchmarks.eager import EagerDiffusion
from benchmarks.harness import Case, Target
from ddpm_fast.ops import denoise
from ddpm_fast.solvers import ddpm_table

SCHEDULE = df.NoiseSchedule.linear(1000)
EAGER = EagerDiffusion(SCHEDULE)
GUIDANCE = 3.0
T = 500  # a step in the middle: row T - 1 - t of the table
LARGE = (4, 3, 256, 256)
SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), LARGE]
WHAT: dict[str, tuple[str, Target | None]] = {
    "fixed": ("DDPM step incl. noise", Target(4.0, 8.0)),
    "learned_range": ("DDPM step, learned variance", None),
    "guidance": ("DDPM step, guided", None),
}


def fixed(x: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor | None = None) -> Tensor:
    return EAGER.p_sample(x, output, T, noise)


def learned_range(x: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor | None = None) -> Tensor:
    return EAGER.p_sample_learned_range(x, output, T, noise)


def guided_step(x: Tensor, output: Tensor, unconditional: Tensor, noise: Tensor | None = None) -> Tensor:
    return EAGER.p_sample_guided(x, output, unconditional, GUIDANCE, T, noise)


def check(x: Tensor, output: Tensor, arguments: dict[str, Any], eager: Callable[[Tensor], Tensor]) -> float:
    got = denoise(x, output, **arguments, seed=3)
    with df.use_backend("reference"):
        assert_equal(got, denoise(x, output, **arguments, seed=3), "the reference backend")
    noise = df.randn(x.shape, seed=3, step=int(arguments["index"]), device=x.device)
    error = largest_error(got, eager(noise))
    assert error < 2e-6, f"{error} from eager with the same noise"
    return error


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", WHAT)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_step(measure: Callable[[Case], None], shape: tuple[int, ...], variant: str, layout: str) -> None:
    learned, guided = variant == "learned_range", variant == "guidance"
    x = laid_out(torch.randn(shape), layout)
    output, unconditional = (
        laid_out(torch.randn(shape[0], shape[1] * (2 if learned else 1), *shape[2:]), layout) for _ in range(2)
    )
    arguments: dict[str, Any] = {
        "coefficients": ddpm_table(
            SCHEDULE,
            variance="learned_range" if learned else "fixed_small",
            guidance_scale=GUIDANCE if guided else 1.0,
        ).rows.to(x.device),
        "index": torch.tensor([SCHEDULE.timesteps - 1 - T]),
        "variance": "learned_range" if learned else "fixed",
        "clip": (-1.0, 1.0),
        "unconditional": unconditional if guided else None,
    }
    what, target = WHAT[variant]
    if shape == LARGE and variant == "fixed":
        what, target = f"{what}, 256x256", Target(9.0, 12.0)
    seed, out, copy = torch.tensor([3]), torch.empty_like(x), torch.empty_like(x)

    def eager_in(layout: str) -> Callable[..., Tensor]:
        inputs = (laid_out(tensor, layout) for tensor in (x, output, unconditional))
        return partial({"learned_range": learned_range, "guidance": guided_step}.get(variant, fixed), *inputs)

    measure(
        Case(
            what=what,
            shape=shape,
            layout=layout,
            ours=lambda: denoise(x, output, **arguments, seed=seed, out=out),
            peers={f"eager {name}": eager_in(name) for name in LAYOUTS},
            floors={"copy_": lambda: copy.copy_(x)},
            check=lambda: check(x, output, arguments, eager_in(layout)),
            target=target,
        )
    )
