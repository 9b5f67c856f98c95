"""The loops that people run, without their network, against the Sampler for each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.counting import per_step
from benchmarks.harness import Case
from benchmarks.loops import LOOPS, STEPS, Loop, nothing


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.name.replace(" ", "-"))
def test_loop(measure: Callable[[Case], None], loop: Loop) -> None:
    def check() -> float:
        error = loop.error()
        assert error <= loop.tolerance, f"{error} from the original with the same noise"
        return error

    before, after = per_step(loop.original, loop.shape), per_step(loop.ours, loop.shape)
    x, out = torch.randn(loop.shape), torch.empty(loop.shape)
    measure(
        Case(
            what="original loop, a step",
            shape=loop.shape,
            note=f"{loop.name}; kernels {before.kernels} -> {after.kernels}",
            ours=loop.ours(nothing),
            peers={"original": loop.original(nothing)},
            floors={"copy_": lambda: [out.copy_(x) for _ in range(STEPS)]},
            check=check,
            steps=STEPS,
        )
    )
