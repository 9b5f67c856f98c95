"""Normal noise, against torch.randn and against torch's filling of a buffer that exists."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import ddpm_fast as df
from benchmarks.common import LAYOUTS, assert_equal, shape_id
from benchmarks.harness import Case, Target

SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), (4, 3, 256, 256), (16, 3, 256, 256)]
VARIANTS = [(torch.float32, "contiguous"), (torch.float32, "channels_last"), (torch.bfloat16, "contiguous")]


def check(out: torch.Tensor) -> float:
    df.randn(out.shape, seed=3, out=out)
    with df.use_backend("reference"):
        assert_equal(out, df.randn(out.shape, seed=3, out=torch.empty_like(out)), "the reference backend")
    assert abs(float(out.float().mean())) < 5 / out.numel() ** 0.5
    assert abs(float(out.float().square().mean()) - 1) < 8 / out.numel() ** 0.5
    return 0.0


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{str(v[0]).removeprefix('torch.')}-{v[1]}")
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_buffer_filled(
    measure: Callable[[Case], None], shape: tuple[int, ...], variant: tuple[torch.dtype, str]
) -> None:
    dtype, layout = variant
    out, other = (torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[layout]) for _ in range(2))
    measure(
        Case(
            what="normal noise",
            shape=shape,
            dtype=dtype,
            layout=layout,
            note="out=",
            ours=lambda: df.randn(shape, seed=3, out=out),
            peers={
                "torch.randn": lambda: torch.randn(shape, dtype=dtype),
                "normal_": lambda: other.normal_(),
            },
            floors={"fill_": lambda: other.fill_(1.0)},
            check=lambda: check(out),
            target=Target(2.4, 4.0),
        )
    )


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_new_tensor(measure: Callable[[Case], None], shape: tuple[int, ...]) -> None:
    measure(
        Case(
            what="normal noise",
            shape=shape,
            note="new tensor",
            ours=lambda: df.randn(shape, seed=3, device=torch.get_default_device()),
            peers={"torch.randn": lambda: torch.randn(shape)},
            check=lambda: check(torch.empty(shape)),
            target=Target(2.4, 4.0),
        )
    )
