"""CUDA's quantile, executed from its PTX: the reference's bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ddpm_fast.backends.reference import quantile as reference
from ddpm_fast.ops import abs_quantile
from ddpm_fast.ops.quantile import ABS_QUANTILE

from ..ops.common import laid_out, same_bits, shape_id
from . import gates, simulate
from .cuda_runs import ARCHITECTURES, ONE_PROCESSOR, has_room, is_vectorised, ptx_of, under_every_schedule
from .triton_runs import MANY, moved

# (shape, elements behind an aligned address): several blocks a sample, sizes no multiple of a vector, also of one
# sample alone, which is read by vectors up to its end, with every rest; one element; more samples than a GPU of one
# multiprocessor takes in one go.
CASES = [
    ((2, 3, 64, 70), 0),
    ((3, 3, 17, 19), 1),
    ((1, 3, 17, 18), 0),
    ((1, 3, 17, 19), 0),
    ((2, 331), 0),
    ((300, 5), 0),
    ((2, 1), 0),
]
LOOPS = [((40, 3, 7, 7), 0), ((1, 3, 300, 300), 0)]


def case_id(case: tuple[tuple[int, ...], int]) -> str:
    return f"{shape_id(case[0])}-{'misaligned' if case[1] else 'aligned'}"


def agrees(x: Tensor, q: float, target: int, processors: int | None = None, once: bool = False) -> None:
    """once: under one schedule of the threads."""

    def quantile() -> tuple[Tensor]:
        out = torch.full((x.shape[0],), math.nan)
        ABS_QUANTILE["cuda"](x, q, out)
        return (out,)

    (got,) = under_every_schedule(quantile, target, processors, MANY if once else x.shape[0])
    expected = torch.empty_like(got)
    reference.abs_quantile(x, q, expected)
    assert same_bits(got, expected)


@pytest.mark.parametrize("q", [0.0, 0.3, 0.995, 1.0])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_is_the_references_quantile(case: tuple[tuple[int, ...], int], q: float) -> None:
    agrees(moved(torch.randn(case[0]), case[1]), q, target=90)


@pytest.mark.parametrize("case", LOOPS, ids=case_id)
def test_loops_where_there_is_more_work_than_threads(case: tuple[tuple[int, ...], int]) -> None:
    agrees(torch.randn(case[0]), 0.9, target=90, processors=ONE_PROCESSOR)


def test_magnitudes_of_every_size() -> None:
    """Of any bits but those of NaNs: they fall into all bins."""
    x = torch.randint(0, 0x7F800001, (2, 1001), dtype=torch.int32).view(torch.float32)
    for q in (0.1, 0.5, 0.9):
        agrees(x, q, target=90)


def test_the_value_may_lie_in_any_threads_bins() -> None:
    """Of each sample, one of the three digits tells the values apart; a thread has neighbouring bins of each."""
    thread = torch.arange(255)[:, None]  # there are none but NaNs in the last thread's bins of the first digit
    digit = thread % 3
    bins, each = torch.tensor([2040, 1024, 1024])[digit], torch.tensor([8, 4, 4])[digit]
    first = thread * each
    ends = (
        [(0 * first, first)] * 16 + [(first, first + each)] + [(first + each, bins)] * 24
    )  # of what is below and above
    low, high = (torch.cat(columns, 1) for columns in zip(*ends, strict=True))
    place = (low + torch.rand(255, 41) * (high - low)).long()
    higher, lower = torch.randint(0, 1020, (255, 1)), torch.randint(0, 1024, (255, 41))
    first_digit = torch.where(digit == 0, place, higher)
    second_digit = torch.where(digit == 1, place, torch.where(digit == 0, lower, higher))
    third_digit = torch.where(digit == 2, place, lower.flip(1))
    keys = first_digit << 20 | second_digit << 10 | third_digit
    agrees(keys.int().view(torch.float32)[:, torch.randperm(41)].contiguous(), 0.41, target=90, once=True)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_give_the_same(target: int) -> None:
    agrees(laid_out(torch.randn(2, 3, 16, 16), "channels_last"), 0.7, target)


@pytest.mark.parametrize("values", ["equal", "zeros", "two", "infinite", "subnormal"])
def test_values_that_coincide_or_lie_at_the_end_of_the_range(values: str) -> None:
    x = {
        "equal": torch.full((2, 100), -1.25),
        "zeros": torch.zeros(2, 100) * torch.tensor([[1.0], [-1.0]]),
        "two": torch.tensor([[1.0] * 50 + [-2.0] * 50, [3.0] * 99 + [0.0]]),
        "infinite": torch.tensor([[1.0] * 99 + [-math.inf], [0.5] * 100]),
        "subnormal": torch.arange(202).reshape(2, 101) * 1e-45,
    }[values]
    for q in (0.0, 0.495, 0.5, 0.98):
        agrees(x, q, target=90)


def test_a_nan_is_the_result_of_its_sample_alone() -> None:
    x = torch.randn(3, 3, 8, 8)
    x[1, 2, 3, 4] = math.nan
    with simulate.backend("cuda"):
        got = abs_quantile(x, 0.9)
    assert got.isnan().tolist() == [False, True, False]
    assert same_bits(got[::2].contiguous(), reference.quantile_of_magnitudes(x[::2], 0.9))


def test_refuses_what_it_does_not_take() -> None:
    x = torch.randn(2, 8)
    with simulate.backend("cuda"):
        with pytest.raises(RuntimeError, match="x and out must be float32"):
            ABS_QUANTILE["cuda"](x.half(), 0.5, torch.empty(2))
        with pytest.raises(RuntimeError, match="out must be contiguous and have 2 elements"):
            ABS_QUANTILE["cuda"](x, 0.5, torch.empty(3))
        with pytest.raises(RuntimeError, match="q must lie in"):
            ABS_QUANTILE["cuda"](x, 1.5, torch.empty(2))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_operation_is_rounded_on_its_own(target: int) -> None:
    gates.assert_rounded_operations(ptx_of("quantile", target))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_registers_and_accesses(target: int) -> None:
    has_room("quantile", target, blocks=6)
    is_vectorised("quantile", target, "count|next", stores=False)
