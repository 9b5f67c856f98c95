"""Triton's noising, executed from its PTX: the reference's bits with the noise given or made on the way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference import noising as reference
from ddpm_fast.backends.triton import _layout
from ddpm_fast.ops.noising import NOISING, NOISING_RANDOM
from tests.gpu import simulate
from tests.gpu.triton_runs import SEED, STREAM, blank, drawn_for, moved, under_every_schedule
from tests.ops.common import laid_out, same_bits, shape_id

COEFFICIENTS = df.NoiseSchedule.linear(1000).noising_coefficients(torch.device("cpu"))

# shape, layout, x0's dtype, elements behind an aligned address
MADE = [
    ((6, 3, 32, 16), "contiguous", torch.float32, 0),
    ((6, 4, 17, 17), "channels_last", torch.float16, 1),
    ((6, 3, 12, 20), "channels_last", torch.uint8, 0),
    ((2, 3, 5, 7, 9), "contiguous", torch.bfloat16, 0),
]
# ... and the noise's layout and dtype
GIVEN = [
    (((2, 3, 32, 48), "contiguous", torch.bfloat16, 0), "contiguous", torch.float32),
    (((2, 3, 17, 19), "channels_last", torch.float32, 0), "contiguous", torch.float64),
    (((2, 3, 17, 19), "contiguous", torch.uint8, 1), "channels_last", torch.float16),
    (((300, 3, 5), "contiguous", torch.float16, 0), "channels of more", torch.float32),
]

Case = tuple[tuple[int, ...], str, torch.dtype, int]


def case_id(case: Case) -> str:
    shape, layout, dtype, offset = case
    return f"{shape_id(shape)}-{layout}-{str(dtype)[6:]}-{'misaligned' if offset else 'aligned'}"


def images(case: Case) -> tuple[Tensor, Tensor]:
    shape, layout, dtype, offset = case
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8) if dtype == torch.uint8 else torch.randn(shape).to(dtype)
    x0 = laid_out(x0, layout) if len(shape) == 4 else x0
    return moved(x0, offset), torch.randint(0, 1000, shape[:1])


def makes_the_noise(case: Case, target: int) -> None:
    x0, t = images(case)
    dtype = torch.float32 if x0.dtype == torch.uint8 else x0.dtype
    ids, step = drawn_for(x0.shape[0])

    def run() -> tuple[Tensor, Tensor]:
        out, noise = blank(x0, dtype, case[3]), blank(x0, dtype, case[3])
        NOISING_RANDOM["triton"](x0, t, COEFFICIENTS, SEED, ids, step, STREAM, out, noise)
        return out, noise

    got = under_every_schedule(run, target)
    expected = tuple(torch.empty_like(x) for x in got)
    reference.noising_random(x0, t, COEFFICIENTS, SEED, ids, step, STREAM, *expected)
    assert same_bits(got[0], expected[0])
    assert same_bits(got[1], expected[1])


@pytest.mark.parametrize("case", MADE, ids=case_id)
def test_made_noise_and_the_state_have_the_references_bits(case: Case) -> None:
    makes_the_noise(case, target=90)


def test_a_sample_ends_anywhere_in_a_tile() -> None:
    """As in the test of that name of the noise: a tile has 252 pixels of 4 channels."""
    for eighth in range(8):
        makes_the_noise(((2, 4, 253 + 32 * eighth, 1), "channels_last", torch.float16, 1), target=90)


@pytest.mark.slow
@pytest.mark.parametrize("case", MADE, ids=case_id)
@pytest.mark.parametrize("target", [80, 120])
def test_made_noise_on_other_architectures(target: int, case: Case) -> None:
    makes_the_noise(case, target)


def takes_the_noise(case: Case, layout: str, dtype: torch.dtype, target: int) -> None:
    x0, t = images(case)
    if layout == "channels of more":
        noise = torch.randn(x0.shape[0], x0.shape[1] + 2, *x0.shape[2:]).to(dtype)[:, 1:-1]
    else:
        noise = laid_out(torch.randn(x0.shape).to(dtype), layout)

    def run() -> tuple[Tensor]:
        out = blank(x0, torch.float32 if x0.dtype == torch.uint8 else x0.dtype)
        NOISING["triton"](x0, t, COEFFICIENTS, noise, out)
        return (out,)

    (got,) = under_every_schedule(run, target, x0.shape[0])
    expected = torch.empty_like(got)
    reference.noising(x0, t, COEFFICIENTS, noise, expected)
    assert same_bits(got, expected)


@pytest.mark.parametrize(("case", "layout", "dtype"), GIVEN, ids=[f"{case_id(c)}-from-{lay}" for c, lay, _ in GIVEN])
def test_given_noise_makes_the_references_state(case: Case, layout: str, dtype: torch.dtype) -> None:
    takes_the_noise(case, layout, dtype, target=90)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_give_the_same_state(target: int) -> None:
    takes_the_noise(*GIVEN[0], target=target)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(1, len(GIVEN)))
@pytest.mark.parametrize("target", [80, 120])
def test_given_noise_on_other_architectures(target: int, index: int) -> None:
    takes_the_noise(*GIVEN[index], target=target)


@pytest.mark.slow
def test_64_bit_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_INT32_ELEMENTS", 1)
    makes_the_noise(MADE[1], target=90)
    takes_the_noise(*GIVEN[2], target=90)


def test_no_sample_launches_nothing() -> None:
    x0, t = torch.empty(0, 3, 4, 4), torch.empty(0, dtype=torch.int64)
    with simulate.backend("triton") as launches:
        NOISING["triton"](x0, t, COEFFICIENTS, x0, x0.clone())
        NOISING_RANDOM["triton"](x0, t, COEFFICIENTS, SEED, None, torch.tensor([0]), 2, x0.clone(), x0.clone())
    assert not launches
