"""q_sample with its noise, against the eager forward process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, assert_equal, laid_out, largest_error, shape_id
from benchmarks.eager import EagerDiffusion
from benchmarks.harness import Case, Target

SCHEDULE = df.NoiseSchedule.linear(1000)
EAGER = EagerDiffusion(SCHEDULE)
SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), (128, 3, 32, 32), (4, 3, 256, 256)]


def check(x0: Tensor, t: Tensor) -> float:
    x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=3)
    with df.use_backend("reference"):
        assert_equal(x_t, df.q_sample(x0, t, SCHEDULE, seed=3)[0], "the reference backend")
    error = largest_error(x_t, EAGER.q_sample(x0, t, noise)[0])
    assert error < 2e-6, f"{error} from eager with the same noise"
    return error


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=["float32", "uint8"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_q_sample(measure: Callable[[Case], None], shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    x0 = laid_out(images if dtype == torch.uint8 else images.float() / 127.5 - 1, layout)
    t = torch.randint(0, 1000, shape[:1])
    out = torch.empty_like(x0)
    measure(
        Case(
            what="q_sample incl. noise",
            shape=shape,
            dtype=dtype,
            layout=layout,
            ours=lambda: df.q_sample(x0, t, SCHEDULE, seed=3),
            peers={f"eager {name}": partial(EAGER.q_sample, laid_out(x0, name), t) for name in LAYOUTS},
            floors={"copy_": lambda: out.copy_(x0)},
            check=lambda: check(x0, t),
            target=Target(3.5, 6.0),
        )
    )
