"""CUDA's normal noise, executed from its PTX: the reference's bits on every architecture, in every layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_fast.backends.reference import random as reference
from ddpm_fast.ops.random import NORMAL

from ..ops.common import laid_out, same_bits, shape_id
from . import gates, simulate
from .cuda_runs import (
    ARCHITECTURES,
    ONE_PROCESSOR,
    bytes_of,
    has_room,
    is_coalesced,
    is_vectorised,
    ptx_of,
    traced,
    under_every_schedule,
)
from .triton_runs import MANY, SEED, STREAM, blank, drawn_for

Case = tuple[tuple[int, ...], str, torch.dtype, int]

# (shape, layout, dtype, elements behind an aligned address). Sizes no multiple of a vector or of a block of the noise;
# one element; more channels than a tile has; 1-D, 2-D, 3-D and 5-D; more work than a GPU of one multiprocessor takes in
# one go, in samples, in pixels and in channels.
CASES: list[Case] = [
    ((6, 3, 32, 16), "contiguous", torch.float32, 0),
    ((6, 3, 32, 24), "channels_last", torch.float32, 0),
    ((1, 3, 17, 19), "contiguous", torch.float32, 0),
    ((6, 3, 17, 11), "contiguous", torch.bfloat16, 1),
    ((6, 3, 17, 11), "channels_last", torch.float16, 1),
    ((6, 4, 10, 18), "channels_last", torch.bfloat16, 0),
    ((2, 3, 9, 11), "channels_last", torch.float32, 1),
    ((2, 300, 3, 5), "channels_last", torch.float32, 0),
    ((300, 5), "contiguous", torch.float16, 0),
    ((1, 2, 9, 11, 13), "contiguous", torch.float32, 3),
]
MORE_CASES: list[Case] = [
    ((7,), "contiguous", torch.float16, 0),
    ((2, 1, 1, 1), "contiguous", torch.float32, 0),
    ((2, 3, 700), "contiguous", torch.bfloat16, 0),
    ((1, 257, 7, 3), "channels_last", torch.bfloat16, 0),
]
# Of each kernel: more samples, and pixels or elements of each, than a GPU of one multiprocessor takes in one go; more
# channels; and every rest of a vector, where a comparison with the end that is off by one is seen.
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
LOOPS = {"contiguous": [(34, 3, 28, 28)], "channels_last": [(34, 5, 21, 21), (1, 8208, 1, 2)]}
RESTS = {
    "contiguous": [(6, 3, 1, pixels) for pixels in range(8, 16)],
    "channels_last": [(6, 3, 2, 4), (6, 3, 3, 3), (6, 3, 2, 5), (6, 3, 1, 11), (1, 258, 2, 2)],
}


def case_id(case: Case) -> str:
    shape, layout, dtype, offset = case
    return f"{shape_id(shape)}-{layout}-{str(dtype)[6:]}-{'misaligned' if offset else 'aligned'}"


def agrees(case: Case, target: int, processors: int | None = None, once: bool = False) -> None:
    """once: under one schedule of the threads."""
    shape, layout, dtype, offset = case
    like = torch.empty(shape, dtype=dtype)
    like = laid_out(like, layout) if len(shape) == 4 else like
    ids, step = drawn_for(shape[0])

    def draw() -> tuple[Tensor]:
        out = blank(like, offset=offset)
        NORMAL["cuda"](out, SEED, ids, step, STREAM)
        return (out,)

    (got,) = under_every_schedule(draw, target, processors, MANY if once else shape[0])
    expected = torch.empty_like(got)
    reference.normal(expected, SEED, ids, step, STREAM)
    assert same_bits(got, expected)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_is_the_references_noise(case: Case) -> None:
    agrees(case, target=90)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_loops_where_there_is_more_work_than_threads(layout: str, dtype: torch.dtype) -> None:
    for shape in LOOPS[layout]:
        agrees((shape, layout, dtype, 0), target=90, processors=ONE_PROCESSOR, once=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_rest_of_a_vector(layout: str, dtype: torch.dtype) -> None:
    for shape in RESTS[layout]:
        for offset in (0, 1):
            agrees((shape, layout, dtype, offset), target=90, once=True)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_give_the_same_noise(target: int) -> None:
    agrees(CASES[5], target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=case_id)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    agrees(case, target)


def test_sample_numbers_default_to_the_batchs_and_one_step_serves_all() -> None:
    out, expected = torch.full((3, 9), torch.nan), torch.empty(3, 9)
    step, seed = torch.tensor([7]), torch.tensor([-77])
    with simulate.backend("cuda"):
        NORMAL["cuda"](out, seed, None, step, 0)
    reference.normal(expected, seed, None, step, 0)
    assert same_bits(out, expected)


def test_nothing_to_fill_launches_nothing() -> None:
    with simulate.backend("cuda") as launches:
        for shape in ((0, 3), (3, 0)):
            NORMAL["cuda"](torch.empty(shape), SEED, None, torch.tensor([1]), 0)
    assert not launches


def test_refuses_what_it_does_not_take() -> None:
    step = torch.tensor([1])
    with simulate.backend("cuda"):
        with pytest.raises(RuntimeError, match="out has a dtype that the kernels do not read"):
            NORMAL["cuda"](torch.empty(3, 9, dtype=torch.float64), SEED, None, step, 0)
        with pytest.raises(RuntimeError, match="sample_ids has 2 elements for 3 samples"):
            NORMAL["cuda"](torch.empty(3, 9), SEED, torch.arange(2), step, 0)
        with pytest.raises(RuntimeError, match="step has 2 elements; 1 or 3 are allowed"):
            NORMAL["cuda"](torch.empty(3, 9), SEED, None, torch.arange(2), 0)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_operation_is_rounded_on_its_own(target: int) -> None:
    gates.assert_rounded_operations(ptx_of("random", target))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_registers_and_accesses(target: int) -> None:
    has_room("random", target, blocks=4)
    is_vectorised("random", target, "normal_kernel(If|.*Lb0E)", loads=False)  # tiles of half precision: 8 bytes


@pytest.mark.parametrize("channels", [2, 3, 4, 6, 8, 16, 32])
def test_memory_channels_last(channels: int) -> None:
    out = laid_out(torch.empty(1, channels, 16, 16), "channels_last")
    launch = traced(lambda: NORMAL["cuda"](out, SEED, None, torch.tensor([1]), 1))
    assert bytes_of(launch, "st.global") == out.nbytes
    is_coalesced(launch)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_contiguous(dtype: torch.dtype) -> None:
    out = torch.empty(1, 3, 32, 32, dtype=dtype)
    launch = traced(lambda: NORMAL["cuda"](out, SEED, None, torch.tensor([1]), 1))
    assert bytes_of(launch, "st.global") == out.nbytes
    is_coalesced(launch)
