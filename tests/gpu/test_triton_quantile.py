"""Triton's radix selection, executed from its PTX: the reference's quantile bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_fast.backends.triton import quantile
from ddpm_fast.ops.quantile import ABS_QUANTILE
from tests.gpu import simulate
from tests.gpu.triton_runs import ARCHITECTURES, under_every_schedule
from tests.ops.common import laid_out, same_bits

ALONE, SHARED_OUT = "alone", "shared out"


@pytest.fixture(params=[ALONE, SHARED_OUT])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small blocks and shares, so that every loop makes more than one trip."""
    monkeypatch.setattr(quantile, "_BLOCK", 256)
    if request.param == SHARED_OUT:
        monkeypatch.setattr(quantile, "_ALONE", 0)
        monkeypatch.setattr(quantile, "_CHUNK", 700)
    return str(request.param)


def agrees(x: Tensor, q: float, target: int = 90) -> None:
    def run() -> tuple[Tensor]:
        out = torch.full((x.shape[0],), torch.nan)
        ABS_QUANTILE["triton"](x, q, out)
        return (out,)

    (got,) = under_every_schedule(run, target)
    expected = torch.empty_like(got)
    ABS_QUANTILE["reference"](x, q, expected)
    assert torch.equal(got.isnan(), expected.isnan())
    assert same_bits(got.nan_to_num(), expected.nan_to_num())


def test_is_the_references_quantile(way: str) -> None:
    x = torch.randn(3, 3, 17, 31)
    for q in (0.0, 0.37, 0.995, 1.0):
        agrees(x, q)
    agrees(laid_out(x, "channels_last"), 0.5)
    agrees(torch.randint(-3, 4, (2, 1581)).float(), 0.6)  # values many times over
    agrees(torch.zeros(2, 1581), 0.9)
    agrees(torch.randn(2, 1581) * 1e-40, 0.9)  # subnormal
    agrees(torch.randint(0, 0x7F800001, (2, 1581), dtype=torch.int32).view(torch.float32), 0.3)  # of every size


def test_infinity_and_nan(way: str) -> None:
    x = torch.randn(9, 1581)
    x[8, 7], x[8, 1580] = torch.inf, -torch.inf
    for sample in range(7):  # wherever it lies in a thread's elements
        x[sample, 5 + 197 * sample] = torch.nan
    for q in (0.5, 1.0):
        agrees(x, q)


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_architecture(way: str, target: int) -> None:
    agrees(torch.randn(2, 1581), 0.995, target)
    agrees(torch.randn(2, 1), 0.995, target)
    agrees(torch.randn(300, 5), 0.5, target)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures(target: int) -> None:
    agrees(torch.randn(2, 1581), 0.995, target)


def test_small_samples_take_one_launch() -> None:
    out = torch.empty(2)
    with simulate.backend("triton") as launches:
        ABS_QUANTILE["triton"](torch.randn(2, 3, 64, 64), 0.995, out)
        ABS_QUANTILE["triton"](torch.empty(0, 3), 0.995, torch.empty(0))
    assert [launch.kernel for launch in launches] == ["abs_quantile_kernel"]
