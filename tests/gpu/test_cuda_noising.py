"""CUDA's q_sample, executed from its PTX: the reference's bits, with the noise given or made on the way."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.reference import noising as reference
from ddpm_fast.ops.noising import NOISING, NOISING_RANDOM

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
    """x0 and where its noise comes from: `noise` is None, and drawn, or the dtype and layout of the one given."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    noise: tuple[torch.dtype, str] | None = None
    x0_layout: str | None = None  # where not x_t's
    x0_dtype: torch.dtype | None = None  # where not x_t's
    offset: int = 0

    def __str__(self) -> str:
        parts = [shape_id(self.shape), self.layout, str(self.dtype)[6:]]
        parts += [] if self.x0_dtype is None else [f"from-{str(self.x0_dtype)[6:]}"]
        parts += [] if self.x0_layout is None else [f"from-{self.x0_layout}"]
        parts += ["drawn"] if self.noise is None else [f"given-{str(self.noise[0])[6:]}-{self.noise[1]}"]
        return "-".join([*parts, *["misaligned"] * bool(self.offset)])


CASES = [
    Case((6, 3, 32, 16)),
    Case((6, 3, 32, 24), "channels_last", torch.bfloat16),
    Case((1, 3, 17, 19)),
    Case((6, 3, 17, 11), "channels_last", torch.float16, offset=1),
    Case((6, 3, 16, 15), "channels_last", torch.uint8),
    Case((2, 3, 9, 11), "channels_last", torch.bfloat16, offset=1),
    Case((2, 4, 8, 8), "channels_last", torch.float16),
    Case((3, 3, 17, 19), "contiguous", torch.uint8, (torch.float32, "contiguous"), offset=1),
    Case((2, 3, 17, 19), "contiguous", torch.bfloat16, (torch.bfloat16, "contiguous")),
    Case((2, 3, 16, 16), "contiguous", torch.float16, (torch.float32, "channels_last")),
    Case((2, 4, 16, 16), "channels_last", torch.float32, (torch.float32, "channels_last"), "contiguous"),
    Case((300, 3, 5), "contiguous", torch.float16),
    Case((1, 2, 5, 7, 9), "contiguous", torch.float32, offset=3),
]
MORE_CASES = [
    Case((2, 300, 3, 3), "channels_last", torch.float32),
    Case((2, 3, 8, 8), "contiguous", torch.uint8, (torch.bfloat16, "channels_last"), "channels_last"),
    Case((5, 3), "contiguous", torch.bfloat16, (torch.float16, "contiguous"), offset=1),
]


@dataclass(frozen=True)
class Kernel:
    """A compiled variant: the dtype of x_t, and whether x0 and the noise may have another, and another order."""

    tiled: bool
    dtype: torch.dtype
    general: bool

    def __str__(self) -> str:
        return f"{'tiles' if self.tiled else 'flat'}-{str(self.dtype)[6:]}-{'general' if self.general else 'plain'}"


FLOATS = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = [Kernel(*options) for options in itertools.product((False, True), FLOATS, (False, True))]
# Every rest of four and of eight elements, with all of the noise's rare words; more channels than a tile has.
SMALL = [(6, 3, 1, pixels) for pixels in range(8, 16)]
MANY_CHANNELS = (1, 258, 2, 2)
# More samples, and pixels or elements of each, than a GPU of one multiprocessor takes in one go; more channels.
LOOPS = {False: [(34, 3, 28, 28)], True: [(34, 5, 21, 21), (1, 8208, 1, 2)]}


def ways(kernel: Kernel, shapes: Sequence[tuple[int, ...]], count: int) -> list[Case]:
    """What a kernel makes x_t of, as many cases as there are shapes or more: every other choice is drawn."""
    draw, cases = random.Random(0), []
    layout, other = ("channels_last", "contiguous") if kernel.tiled else ("contiguous", "channels_last")
    for k in range(count):
        noise = x0_layout = x0_dtype = None
        if kernel.general:
            x0_dtype = draw.choice([*FLOATS, *[torch.uint8] * (kernel.dtype == torch.float32)])
            x0_layout = other if x0_dtype == kernel.dtype else draw.choice((layout, other))
        if not kernel.tiled and k % 2:
            noise = (draw.choice(FLOATS), draw.choice((layout, other))) if kernel.general else (kernel.dtype, layout)
        offset = draw.choice((0, 0, 1))
        cases.append(Case(shapes[k % len(shapes)], layout, kernel.dtype, noise, x0_layout, x0_dtype, offset))
    return cases


def lay(tensor: Tensor, layout: str) -> Tensor:
    return laid_out(tensor, layout) if tensor.dim() == 4 else tensor


def agrees(case: Case, target: int, processors: int | None = None, once: bool = False) -> None:
    """once: under one schedule of the threads."""
    shape, samples, x0_dtype = case.shape, case.shape[0], case.x0_dtype or case.dtype
    is_bytes = x0_dtype == torch.uint8
    drawn = torch.randint(0, 256, shape) if is_bytes else torch.randn(shape)
    x0 = moved(lay(drawn.to(x0_dtype), case.x0_layout or case.layout), case.offset)
    like = lay(torch.empty(shape, dtype=torch.float32 if is_bytes else case.dtype), case.layout)
    t, coefficients = torch.randint(0, 1000, (samples,)), SCHEDULE.noising_coefficients(torch.device("cpu"))
    ids, step = drawn_for(samples)
    given = None
    if case.noise is not None:
        given = moved(lay(torch.randn(shape).to(case.noise[0]), case.noise[1]), case.offset)

    def q_sample() -> tuple[Tensor, ...]:
        x_t = blank(like, offset=case.offset)
        if given is not None:
            NOISING["cuda"](x0, t, coefficients, given, x_t)
            return (x_t,)
        noise = blank(like, offset=case.offset)
        NOISING_RANDOM["cuda"](x0, t, coefficients, SEED, ids, step, STREAM, x_t, noise)
        return x_t, noise

    got = under_every_schedule(q_sample, target, processors, MANY if once else samples)
    expected, noise = torch.empty_like(like), torch.empty_like(like)
    wide = x0 if is_bytes else x0.float()  # the reference would round to x0's dtype first
    if given is not None:
        reference.noising(wide, t, coefficients, given, expected)
    else:
        reference.noising_random(wide, t, coefficients, SEED, ids, step, STREAM, expected, noise)
        assert same_bits(got[1], noise)
    assert same_bits(got[0], expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_references_q_sample(case: Case) -> None:
    agrees(case, target=90)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_source_of_x0_and_noise(kernel: Kernel) -> None:
    for case in ways(kernel, [*SMALL, MANY_CHANNELS], 45):
        agrees(case, target=90, once=True)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_loops_where_there_is_more_work_than_threads(kernel: Kernel) -> None:
    for case in ways(kernel, LOOPS[kernel.tiled], len(LOOPS[kernel.tiled])):
        agrees(case, target=90, processors=ONE_PROCESSOR, once=True)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures_give_the_same(target: int) -> None:
    agrees(CASES[1], target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE_CASES, ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    agrees(case, target)


def test_the_public_function_runs_on_it() -> None:
    x0, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 999])
    with simulate.backend("cuda"):
        x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=5)
    with df.use_backend("reference"):
        expected, same = df.q_sample(x0, t, SCHEDULE, seed=5)
    assert same_bits(x_t, expected)
    assert same_bits(noise, same)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_timestep_outside_the_schedule_stops_the_kernel(kernel: Kernel) -> None:
    layout, other = ("channels_last", "contiguous") if kernel.tiled else ("contiguous", "channels_last")
    x0 = laid_out(torch.randn(1, 3, 2, 2).to(kernel.dtype), other if kernel.general else layout)
    x_t, noise = (laid_out(torch.empty_like(x0), layout) for _ in range(2))
    coefficients, step = SCHEDULE.noising_coefficients(torch.device("cpu")), torch.tensor([1])
    for t in (-1, 1000):
        with simulate.backend("cuda"), pytest.raises(RuntimeError, match="trap"):
            NOISING_RANDOM["cuda"](x0, torch.tensor([t]), coefficients, SEED, None, step, STREAM, x_t, noise)


def test_refuses_what_it_does_not_take() -> None:
    x0, t, table = torch.randn(2, 3, 8, 8), torch.tensor([3, 999]), torch.zeros(1000, 2)
    x_t, step = torch.empty_like(x0), torch.tensor([1])
    with simulate.backend("cuda"):
        with pytest.raises(RuntimeError, match="noise has 2 samples of 3 channels of 32 pixels"):
            NOISING["cuda"](x0, t, table, torch.randn(2, 3, 4, 8), x_t)
        with pytest.raises(RuntimeError, match="coefficients must be a contiguous float32 tensor of 2 columns"):
            NOISING["cuda"](x0, t, table.double(), x0, x_t)
        with pytest.raises(RuntimeError, match="noise must be float32, float16 or bfloat16"):
            NOISING["cuda"](x0, t, table, x0.byte(), x_t)
        with pytest.raises(RuntimeError, match="out must be float32 where x0 is uint8"):
            NOISING["cuda"](x0.byte(), t, table, x0, x_t.half())
        with pytest.raises(RuntimeError, match="out must be float32, float16 or bfloat16"):
            NOISING["cuda"](x0, t, table, x0, x_t.byte())
        with pytest.raises(RuntimeError, match="noise must have the dtype and layout of the other results"):
            NOISING_RANDOM["cuda"](x0, t, table, SEED, None, step, 2, x_t, x_t.half())


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_operation_is_rounded_on_its_own(target: int) -> None:
    gates.assert_rounded_operations(ptx_of("noising", target))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_registers_and_accesses(target: int) -> None:
    """The last template argument of a kernel is whether it is a general one, the one before whether it has tiles."""
    has_room("noising", target, blocks=3, kernels="Lb[01]ELb0E")
    has_room("noising", target, blocks=2)
    is_vectorised("noising", target, "Lb0ELb0E")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory(dtype: torch.dtype, layout: str) -> None:
    """Three transfers of an image: x0 in, x_t and the noise out; or both in, and x_t out."""
    x0 = laid_out(torch.randn(1, 3, 32, 32).to(dtype), layout)
    coefficients = SCHEDULE.noising_coefficients(torch.device("cpu"))
    x_t, noise, zero = torch.empty_like(x0), torch.empty_like(x0), torch.tensor([0])
    drawn = traced(lambda: NOISING_RANDOM["cuda"](x0, zero, coefficients, SEED, None, zero, 2, x_t, noise))
    given = traced(lambda: NOISING["cuda"](x0, zero, coefficients, noise, x_t))
    for launch, read in ((drawn, 1), (given, 2)):
        assert launch.stats["st_bytes"] == bytes_of(launch, "st.global") == (3 - read) * x0.nbytes
        assert bytes_of(launch, "ld.global") == read * x0.nbytes
        is_coalesced(launch)
