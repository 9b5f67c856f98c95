"""The quantile of each sample's magnitudes, which dynamic thresholding needs, against torch.quantile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, assert_equal, laid_out, largest_error, shape_id
from benchmarks.harness import Case
from ddpm_fast.ops import abs_quantile

SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), (4, 3, 256, 256)]
Q = 0.995


def eager(x: Tensor) -> Tensor:
    """As Imagen's implementations write it."""
    return torch.quantile(x.flatten(1).abs(), Q, dim=1)


def check(x: Tensor) -> float:
    got = abs_quantile(x, Q)
    with df.use_backend("reference"):
        assert_equal(got, abs_quantile(x, Q), "the reference backend")
    error = largest_error(got, expected := eager(x))
    # torch.lerp may fuse its multiplication and addition.
    assert error <= 3e-7 * float(expected.max()), f"{error} from torch.quantile"
    return error


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_abs_quantile(measure: Callable[[Case], None], shape: tuple[int, ...], layout: str) -> None:
    x = laid_out(torch.randn(shape), layout)
    copy = torch.empty_like(x)
    measure(
        Case(
            what="quantile of magnitudes",
            shape=shape,
            layout=layout,
            ours=lambda: abs_quantile(x, Q),
            peers={f"eager {name}": partial(eager, laid_out(x, name)) for name in LAYOUTS},
            floors={"copy_": lambda: copy.copy_(x)},
            check=lambda: check(x),
        )
    )
