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
        monkeypatch.setattr(quantile, "_CHUNK", 768)
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
    x = torch.randn(9, 1581)
    x[:, 198:] += 1000
    agrees(x, 0.125)  # half-way between values that are far apart


def test_infinity_and_nan(way: str) -> None:
    x = torch.randn(9, 1581)
    x[8, 7], x[8, 1580] = torch.inf, -torch.inf
    for sample in range(8):  # wherever it lies in a thread's elements, eight of 256
        x[sample, 256 * (sample % 6) + 35 * sample] = torch.nan
    for q in (0.5, 1.0):
        agrees(x, q)


def test_a_sample_ends_anywhere_in_a_block(way: str) -> None:
    """A comparison with the end that is off by one is seen where the end is that of the elements that it guards, and
    an element too many where no sample follows."""
    for size in range(7 * 256 + 1, 8 * 256, 33):
        agrees(torch.randn(1, size), 0.5)


@pytest.mark.slow
def test_64_bit_counts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantile, "_ALONE", 0)
    monkeypatch.setattr(quantile, "_CHUNK", 768)
    monkeypatch.setattr(quantile, "_INT32", 0)
    agrees(torch.randn(2, 1581), 0.995)


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
    x, out, expected = torch.randn(2, 3, 64, 64), torch.empty(2), torch.empty(2)
    with simulate.backend("triton") as launches:
        ABS_QUANTILE["triton"](x, 0.995, out)
        ABS_QUANTILE["triton"](torch.empty(0, 3), 0.995, torch.empty(0))
    ABS_QUANTILE["reference"](x, 0.995, expected)
    assert same_bits(out, expected)
    assert [launch.kernel for launch in launches] == ["abs_quantile_kernel"]
