"""Triton's denoising step, executed from its PTX: the reference's bits for every way a step can be made."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference import denoise as reference
from ddpm_fast.backends.triton import _layout
from ddpm_fast.ops.denoise import DENOISE
from ddpm_fast.solvers import ddpm_table
from tests.gpu import gates, simulate
from tests.gpu.triton_runs import ARCHITECTURES, SEED, STREAM, blank, drawn_for, moved, under_every_schedule
from tests.ops.common import laid_out, same_bits, shape_id

SCHEDULE = df.NoiseSchedule.linear(1000)


@dataclass(frozen=True)
class Case:
    """One way to make a step: what the network gives, in which dtype and layout, and what becomes of it."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    output_layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    prediction: str = "epsilon"
    variance: str = "fixed"
    noise: str = "seed"  # "seed", "given" or "none"
    guided: bool = False
    bound: str = "clip"  # "clip", "threshold" or "none"
    wants_x0: bool = False
    offset: int = 0

    def __str__(self) -> str:
        parts = [shape_id(self.shape), self.layout, f"from-{self.output_layout}", str(self.dtype)[6:], self.prediction]
        parts += [self.variance, self.noise, self.bound, *["guided"] * self.guided, *["x0"] * self.wants_x0]
        return "-".join([*parts, *["misaligned"] * bool(self.offset)])


CASES = [
    Case((7, 3, 32, 16), wants_x0=True),
    Case(
        (7, 3, 32, 16),
        "channels_last",
        "channels_last",
        torch.bfloat16,
        "v",
        "learned_range",
        guided=True,
        wants_x0=True,
    ),
    Case((2, 3, 17, 19), "channels_last", "contiguous", torch.float16, "x_prev", "learned", wants_x0=True, offset=1),
    Case((2, 3, 32, 48), "contiguous", "contiguous", torch.bfloat16, "x0", "learned_range", "given", True, "threshold"),
    Case((3, 3, 9, 11), "contiguous", "channels_last", torch.float16, "v", "fixed", "none", False, "none", True),
    Case((300, 3, 5), "contiguous", "contiguous", torch.float32, "x_prev", "fixed", "seed", True, "threshold", True),
    Case((2, 70, 5, 7), "channels_last", "channels_last", torch.float32, "epsilon", "learned", bound="threshold"),
    Case((1, 2, 5, 7, 9), "contiguous", "contiguous", torch.float64, "x0", "learned", "given", offset=3),
]
MORE_CASES = [
    Case(
        (2, 4, 16, 16), "channels_last", "channels_last", torch.float16, prediction, variance, noise, guided, bound, x0
    )
    for prediction, variance, noise, guided, bound, x0 in (
        ("epsilon", "fixed", "given", True, "none", False),
        ("x0", "fixed", "seed", False, "clip", True),
        ("v", "learned", "none", True, "threshold", True),
        ("x_prev", "learned_range", "given", False, "none", True),
        ("epsilon", "learned_range", "seed", True, "clip", False),
    )
]


def agrees(case: Case, target: int, zeros: bool = False) -> None:
    """zeros: of either sign in all inputs, and for the bounds."""
    shape, samples = case.shape, case.shape[0]
    learned = "fixed_small" if case.variance == "fixed" else case.variance
    rows = ddpm_table(SCHEDULE, variance=learned, prediction=case.prediction, guidance_scale=3.0).rows
    ids, index = drawn_for(samples)
    index[-1] = 999  # the last step, which draws nothing
    wide = shape if case.variance == "fixed" else (samples, 2 * shape[1], *shape[2:])

    def lay(tensor: Tensor, layout: str) -> Tensor:
        return laid_out(tensor, layout) if len(shape) == 4 else tensor

    def values(shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(shape).copysign(torch.randn(shape)) if zeros else torch.randn(shape)

    x_t = moved(lay(values(shape), case.layout), case.offset)
    predicted = values(wide)
    predicted[:, shape[1] :, ..., ::2] *= 60  # logarithms of variances, also where the exponential is clamped
    output = moved(lay(predicted.to(case.dtype), case.output_layout), case.offset)
    unconditional = lay(values(wide).to(case.dtype), case.output_layout) if case.guided else None
    noise = lay(torch.randn(shape), case.output_layout) if case.noise == "given" else None
    threshold = 1 + torch.rand(samples) if case.bound == "threshold" else None
    bounds = (0.0, -0.0) if zeros else (-1.0, 0.9)
    clip = bounds if case.bound == "clip" else (None, None)
    seed = SEED if case.noise == "seed" else None
    arguments = (
        x_t, output, unconditional, rows, index, reference.PREDICTIONS.index(case.prediction),
        reference.VARIANCES.index(case.variance), *clip, threshold, noise, seed, ids, STREAM,
    )  # fmt: skip

    def step() -> tuple[Tensor, ...]:
        out, x0 = blank(x_t, offset=case.offset), blank(x_t) if case.wants_x0 else None
        DENOISE["triton"](*arguments, out, x0)
        return (out,) if x0 is None else (out, x0)

    got = under_every_schedule(step, target, samples)
    expected, expected_x0 = torch.empty_like(x_t), torch.empty_like(x_t)
    reference.denoise(*arguments, expected, expected_x0)
    assert same_bits(got[0], expected)
    assert not case.wants_x0 or same_bits(got[1], expected_x0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_references_step(case: Case) -> None:
    agrees(case, target=90)


@pytest.mark.parametrize("case", [case for case in CASES if case.bound == "clip" and case.wants_x0], ids=str)
def test_a_zero_at_a_bound_keeps_its_sign(case: Case) -> None:
    agrees(case, target=90, zeros=True)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_make_the_same_step(target: int) -> None:
    agrees(CASES[1], target=target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    agrees(case, target=target)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[2], CASES[4]], ids=str)
def test_64_bit_offsets_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_INT32_ELEMENTS", 1)
    agrees(case, target=90)


def simple_step(x_t: Tensor, output: Tensor, out: Tensor, index: Tensor, variance: int = 0) -> None:
    rows = ddpm_table(SCHEDULE, variance="learned" if variance else "fixed_small").rows
    DENOISE["triton"](x_t, output, None, rows, index, 0, variance, -1.0, 1.0, None, None, SEED, None, 1, out, None)


def test_in_place_and_with_one_index_for_all() -> None:
    x_t, e, index = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([3])
    out, state = torch.full_like(x_t, torch.nan), x_t.clone()
    with simulate.backend("triton"):
        simple_step(x_t, e, out, index)
        simple_step(state, e, state, index)
    assert same_bits(out, state)


def test_a_sample_alone_has_the_bits_it_has_in_a_batch() -> None:
    x_t, e, rows = torch.randn(9, 3, 16, 16), torch.randn(9, 3, 16, 16), ddpm_table(SCHEDULE).rows
    out, alone = torch.empty_like(x_t), torch.empty(1, 3, 16, 16)
    with simulate.backend("triton"):
        simple_step(x_t, e, out, torch.tensor([3]))
        DENOISE["triton"](
            x_t[7:8], e[7:8], None, rows, torch.tensor([3]), 0, 0, -1.0, 1.0, None, None, SEED, torch.tensor([7]), 1,
            alone, None,
        )  # fmt: skip
    assert same_bits(alone, out[7:8])


def test_the_last_step_leaves_a_mean_of_minus_zero() -> None:
    x_t = torch.full((1, 1, 2, 4), -0.0)
    out = torch.zeros_like(x_t)
    with simulate.backend("triton"):
        simple_step(x_t, torch.zeros_like(x_t), out, torch.tensor([999]), 0)
    assert torch.signbit(out).all()


def test_nan_and_infinity_pass_through_as_in_the_reference() -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5]).reshape(1, 1, 2, 2)
    for x_t, output, variance in (
        (torch.zeros(1, 1, 2, 2), special, 0),
        (special, torch.ones_like(special), 0),
        (torch.ones_like(special), torch.cat([special, special.flip(3)], 1), 1),
    ):
        out, expected = torch.zeros_like(x_t), torch.zeros_like(x_t)
        with simulate.backend("triton"):
            simple_step(x_t, output, out, torch.tensor([5]), variance)
        rows = ddpm_table(SCHEDULE, variance="learned" if variance else "fixed_small").rows
        reference.denoise(
            x_t, output, None, rows, torch.tensor([5]), 0, variance, -1.0, 1.0, None, None, SEED, None, 1, expected,
            None,
        )  # fmt: skip
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.nan_to_num(), expected.nan_to_num())


def test_no_sample_launches_nothing() -> None:
    x_t = torch.empty(0, 3, 4, 4)
    with simulate.backend("triton") as launches:
        simple_step(x_t, x_t, x_t.clone(), torch.tensor([1]))
    assert not launches


def test_a_step_moves_three_images() -> None:
    x_t, e = torch.randn(2, 4, 32, 32), torch.randn(2, 4, 32, 32)
    with simulate.backend("triton") as launches:
        simple_step(x_t, e, torch.empty_like(x_t), torch.tensor([1]))
    # A thread reads the row, the index and the seed besides its four elements of x_t and of the output.
    scalars = 8 * 4 + 8 + 8
    gates.assert_traffic(launches[0].stats, 8 * x_t.numel(), 4 * x_t.numel(), extra=x_t.numel() // 4 * scalars)
