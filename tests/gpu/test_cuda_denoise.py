"""CUDA's denoising step, executed from its PTX: the reference's bits for every way a step can be made."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference import denoise as reference
from ddpm_fast.ops import denoise
from ddpm_fast.ops.denoise import DENOISE
from ddpm_fast.solvers import ddpm_table

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
from .triton_runs import MANY, SEED, STREAM, blank, drawn_for, moved

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
    bound: str = "clip"  # "clip", "zeros" (to which it clips), "threshold", "both" of these two, or "none"
    wants_x0: bool = False
    offset: int = 0
    other_dtype: torch.dtype | None = None  # of the unconditional output and the noise given, where not the usual ones
    in_place: bool = False

    def __str__(self) -> str:
        parts = [shape_id(self.shape), self.layout, f"from-{self.output_layout}", str(self.dtype)[6:], self.prediction]
        parts += [self.variance, self.noise, self.bound, *["guided"] * self.guided, *["x0"] * self.wants_x0]
        parts += [] if self.other_dtype is None else [f"others-{str(self.other_dtype)[6:]}"]
        return "-".join([*parts, *["misaligned"] * bool(self.offset), *["in-place"] * self.in_place])


LAST = "channels_last"
CASES = [
    Case((7, 3, 32, 16)),
    Case((2, 3, 32, 48), LAST, LAST, torch.bfloat16, "v", "fixed", guided=True, in_place=True),
    Case((7, 3, 32, 24), LAST, LAST, torch.bfloat16, "v", "learned_range", guided=True),
    Case((1, 3, 17, 19), guided=True, noise="given", wants_x0=True),
    Case((2, 3, 17, 19), LAST, "contiguous", torch.float16, "x_prev", "learned", wants_x0=True, offset=1),
    Case((2, 3, 32, 48), "contiguous", "contiguous", torch.bfloat16, "x0", "learned_range", "given", True, "threshold"),
    Case((3, 3, 9, 11), "contiguous", LAST, torch.float16, "v", "fixed", "none", False, "none", True),
    Case((3, 3, 9, 11), LAST, LAST, torch.bfloat16, "x_prev", "learned", "seed", True, "threshold", True, offset=1),
    Case((3, 4, 8, 8), LAST, LAST, torch.bfloat16, "x0", wants_x0=True),
    Case((2, 5, 7, 9), LAST, LAST, torch.bfloat16, "epsilon", guided=True, bound="threshold", wants_x0=True),
    Case((2, 3, 10, 24), LAST, LAST, torch.bfloat16, "x0", bound="threshold", wants_x0=True, offset=1),
    Case((2, 3, 10, 24), LAST, LAST, torch.bfloat16, "x_prev", guided=True, wants_x0=True, offset=1),
    Case((2, 5, 7, 9), LAST, LAST, torch.bfloat16, "v", bound="none", in_place=True),
    Case((300, 3, 5), "contiguous", "contiguous", torch.float32, "x_prev", "fixed", "seed", True, "threshold", True),
    Case((2, 300, 3, 3), LAST, LAST, torch.float32, "epsilon", "learned", bound="threshold"),
    Case((1, 2, 5, 7, 9), "contiguous", "contiguous", torch.float16, "x0", "learned", "given", offset=3, in_place=True),
    Case(
        (2, 3, 16, 16),
        "contiguous",
        "contiguous",
        torch.float16,
        noise="given",
        guided=True,
        other_dtype=torch.bfloat16,
    ),
]
MORE_CASES = [
    Case((2, 4, 16, 16), LAST, LAST, torch.float16, prediction, variance, noise, guided, bound, x0, in_place=guided)
    for prediction, variance, noise, guided, bound, x0 in (
        ("epsilon", "fixed", "given", True, "none", False),
        ("x0", "fixed", "seed", False, "clip", True),
        ("v", "learned", "none", True, "threshold", True),
        ("x_prev", "learned_range", "given", False, "none", True),
        ("epsilon", "learned_range", "seed", True, "clip", False),
    )
]


@dataclass(frozen=True)
class Kernel:
    """A compiled variant: of plain outputs of a dtype, or None for those of any dtype and order."""

    tiled: bool
    dtype: torch.dtype | None

    def __str__(self) -> str:
        return f"{'tiles' if self.tiled else 'flat'}-{'general' if self.dtype is None else str(self.dtype)[6:]}"


FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = [Kernel(tiled, dtype) for tiled in (False, True) for dtype in (*FLOATS, None)]
# Every rest of a vector, with all of the noise's rare words; more channels than a tile has.
SMALL = [(7, 3, 2, 4), (7, 3, 3, 3), (7, 3, 2, 5), (7, 3, 1, 11)]
MANY_CHANNELS = (1, 258, 2, 2)
# More samples, and pixels or elements of each, than a GPU of one multiprocessor takes in one go; more channels.
LOOPS = {False: [(34, 3, 19, 19)], True: [(34, 5, 21, 21), (1, 8208, 1, 2)]}


def ways(kernel: Kernel, shapes: Sequence[tuple[int, ...]], count: int) -> list[Case]:
    """Steps that a kernel makes, as many as there are shapes or more: every other choice is drawn."""
    draw, cases = random.Random(0), []
    for k in range(count):
        learned, general = draw.choice(reference.VARIANCES), kernel.dtype is None
        bound = draw.choice(("clip", "zeros", "threshold", "both", "none"))
        layout = LAST if kernel.tiled else "contiguous"
        # In the same order an output is not plain for its dtype's sake.
        other = draw.choice(("contiguous", LAST)) if general else layout
        in_order = other == layout
        dtypes = (draw.sample(FLOATS, 2) if in_order else draw.choices(FLOATS, k=2)) if general else [kernel.dtype] * 2
        cases.append(
            Case(
                shapes[k % len(shapes)],
                layout,
                other,
                dtypes[0] or torch.float32,
                reference.PREDICTIONS[k % 4],
                "fixed" if kernel.tiled and not general else learned,
                "seed" if kernel.tiled else draw.choice(("seed", "given", "none")),
                draw.random() < 0.5 or (general and in_order),
                bound,
                bound in ("zeros", "both") or draw.random() < 0.5,
                draw.choice((0, 0, 1)),
                dtypes[1] if general else None,
                draw.random() < 0.5,
            )
        )
    return cases


def lay(tensor: Tensor, layout: str) -> Tensor:
    return laid_out(tensor, layout) if tensor.dim() == 4 else tensor


def table() -> Tensor:
    """Coefficients that no two of are alike. The range of the logarithms of the variances ends just behind where the
    exponential is clamped, and sigma leaves of that something that float32 holds."""
    rows = torch.randn(1000, 8)
    rows[:, 4] = torch.rand(1000) / 1000
    rows[-1, 4] = 0  # the last step, which draws nothing
    rows[:, 5:7] = torch.tensor([-174.05, 176.05])
    return rows


def agrees(case: Case, target: int, processors: int | None = None, once: bool = False) -> None:
    """once: under one schedule of the threads."""
    shape, samples = case.shape, case.shape[0]
    rows, zero = table(), torch.rand(case.shape) < 0.2
    ids, index = drawn_for(samples)
    if samples > 1:
        index[-1] = 999
        zero[-1] = False  # without noise -0 stays -0; the reference adds 0
    wide = shape if case.variance == "fixed" else (samples, 2 * shape[1], *shape[2:])

    def drawn(shape: tuple[int, ...]) -> Tensor:
        """Where the mean comes to zero, the noise alone shows. Behind it, variances: at the ends of their range, and
        logarithms that the exponential takes or is clamped for."""
        values = torch.randn(shape)
        values[:, : case.shape[1]][zero] *= 0.0  # of either sign
        variances = values[:, case.shape[1] :]
        variances.copy_(torch.where(torch.rand_like(variances) < 0.5, variances.sign(), 60 * variances))
        return values

    x_t = moved(lay(drawn(shape), case.layout), case.offset)
    output = moved(lay(drawn(wide).to(case.dtype), case.output_layout), case.offset)
    other = case.other_dtype or case.dtype
    unconditional = lay(drawn(wide).to(other), case.output_layout) if case.guided else None
    noise = None
    if case.noise == "given":
        noise = lay(torch.randn(shape).to(case.other_dtype or torch.float32), case.output_layout)
    threshold = 1 + torch.rand(samples) if case.bound in ("threshold", "both") else None
    clip = {"clip": (-1.0, 0.9), "zeros": (0.0, -0.0), "both": (0.0, -0.0)}.get(case.bound, (None, None))
    seed = SEED if case.noise == "seed" else None
    options = (
        output, unconditional, rows, index, reference.PREDICTIONS.index(case.prediction),
        reference.VARIANCES.index(case.variance), *clip, threshold, noise, seed, ids, STREAM,
    )  # fmt: skip

    def step() -> tuple[Tensor, ...]:
        x0 = blank(x_t, offset=case.offset) if case.wants_x0 else None
        out = moved(x_t, case.offset) if case.in_place else blank(x_t, offset=case.offset)
        DENOISE["cuda"](out if case.in_place else x_t, *options, out, x0)
        return (out,) if x0 is None else (out, x0)

    got = under_every_schedule(step, target, processors, MANY if once else samples)
    expected, expected_x0 = torch.empty_like(x_t), torch.empty_like(x_t)
    reference.denoise(x_t, *options, expected, expected_x0)
    assert same_bits(got[0], expected)
    assert not case.wants_x0 or same_bits(got[1], expected_x0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_references_step(case: Case) -> None:
    agrees(case, target=90)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_way_to_make_a_step(kernel: Kernel) -> None:
    for case in ways(kernel, [*SMALL, MANY_CHANNELS], 60):
        agrees(case, target=90, once=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_loops_where_there_is_more_work_than_threads(kernel: Kernel) -> None:
    for case in ways(kernel, LOOPS[kernel.tiled], len(LOOPS[kernel.tiled])):
        agrees(case, target=90, processors=ONE_PROCESSOR, once=True)


@pytest.mark.parametrize("target", [80, 120])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_other_architectures_make_the_same_step(case: Case, target: int) -> None:
    agrees(case, target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    agrees(case, target)


def test_one_index_serves_all_samples_and_ids_default_to_the_batchs() -> None:
    x_t, output, rows = torch.randn(3, 3, 4, 4), torch.randn(3, 3, 4, 4), ddpm_table(SCHEDULE).rows
    with simulate.backend("cuda"):
        got = denoise(x_t, output, rows, torch.tensor([17]), seed=3)
    with df.use_backend("reference"):
        assert same_bits(got, denoise(x_t, output, rows, torch.tensor([17]), seed=3))


def test_the_last_step_leaves_a_mean_of_minus_zero() -> None:
    x_t, output, rows = torch.full((1, 8), -0.0), torch.zeros(1, 8), ddpm_table(SCHEDULE).rows
    with simulate.backend("cuda"):
        got = denoise(x_t, output, rows, torch.tensor([999]), seed=3)
    assert torch.signbit(got).all()
    with df.use_backend("reference"):
        assert same_bits(got, denoise(x_t, output, rows, torch.tensor([999]), seed=3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-41, -0.0], ids=str)
def test_unusual_values_pass_as_in_the_reference(value: float) -> None:
    """NaN and infinity are neither clipped away nor spread; a subnormal state is not flushed to zero."""
    x_t, output, rows = torch.full((1, 8), value), torch.full((1, 8), 0.5), ddpm_table(SCHEDULE).rows
    output[0, :4] = value
    for clip in (None, (-1.0, 1.0)):
        with simulate.backend("cuda"):
            got = denoise(x_t, output, rows, torch.tensor([17]), clip=clip)
        with df.use_backend("reference"):
            expected = denoise(x_t, output, rows, torch.tensor([17]), clip=clip)
        assert torch.allclose(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_row_outside_the_table_stops_the_kernel(kernel: Kernel) -> None:
    layout, other = (LAST, "contiguous") if kernel.tiled else ("contiguous", LAST)
    x_t = laid_out(torch.randn(1, 3, 2, 2), layout)
    output = laid_out(torch.randn(1, 3, 2, 2), layout if kernel.dtype else other).to(kernel.dtype)
    rows, seed = ddpm_table(SCHEDULE).rows, SEED if kernel.tiled else None
    for index in (-1, 1000):
        with simulate.backend("cuda"), pytest.raises(RuntimeError, match="trap"):
            DENOISE["cuda"](
                x_t, output, None, rows, torch.tensor([index]), 0, 0, None, None, None, None, seed, None, 1,
                torch.empty_like(x_t), None,
            )  # fmt: skip


def test_refuses_what_it_does_not_take() -> None:
    x, rows, index = torch.randn(2, 3, 4, 4), ddpm_table(SCHEDULE).rows, torch.tensor([5])

    def step(
        x_t: Tensor,
        output: Tensor,
        threshold: Tensor | None = None,
        out: Tensor | None = None,
        noise: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> None:
        out = torch.empty_like(x_t) if out is None else out
        DENOISE["cuda"](x_t, output, None, rows, index, 0, 0, None, None, threshold, noise, seed, None, 1, out, None)

    with simulate.backend("cuda"):
        with pytest.raises(RuntimeError, match="model_output has 2 samples of 3 channels of 8 pixels"):
            step(x, x[:, :, :2])
        with pytest.raises(RuntimeError, match="model_output has a dtype that the kernels do not read"):
            step(x, x.double())
        with pytest.raises(RuntimeError, match="model_output must be float32, float16 or bfloat16"):
            step(x, x.byte())
        with pytest.raises(RuntimeError, match="noise is given or drawn from a seed, not both"):
            step(x, x, noise=x, seed=SEED)
        with pytest.raises(RuntimeError, match="x_t must be contiguous or channels_last"):
            step(x[..., ::2], x[..., ::2].contiguous())
        with pytest.raises(RuntimeError, match="threshold must be a contiguous float32 tensor of 2 elements"):
            step(x, x, torch.ones(3))
        with pytest.raises(RuntimeError, match="out must have the dtype and layout of the other results"):
            step(x, x, out=laid_out(x, LAST))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_operation_is_rounded_on_its_own(target: int) -> None:
    gates.assert_rounded_operations(ptx_of("denoise", target))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_registers_and_accesses(target: int) -> None:
    """The last template argument of a kernel is whether it is a general one, the one before whether it has tiles."""
    has_room("denoise", target, blocks=3, kernels="Lb0ELb0E")
    has_room("denoise", target, blocks=2)
    is_vectorised("denoise", target)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory(dtype: torch.dtype, layout: str) -> None:
    """Three transfers of an image: the state and the output in, the new state out."""
    x_t = laid_out(torch.randn(1, 3, 32, 32), layout)
    output, out = laid_out(torch.randn(1, 3, 32, 32).to(dtype), layout), torch.empty_like(x_t)
    rows, index = ddpm_table(SCHEDULE).rows, torch.tensor([17])
    launch = traced(
        lambda: DENOISE["cuda"](x_t, output, None, rows, index, 0, 0, -1.0, 1.0, None, None, SEED, None, 1, out, None)
    )
    assert launch.stats["st_bytes"] == bytes_of(launch, "st.global") == out.nbytes
    assert bytes_of(launch, "ld.global") == x_t.nbytes + output.nbytes
    is_coalesced(launch)
