"""GroupNorm and SiLU on the CUDA backend: shipped host code, and each kernel's PTX under the simulator's checks."""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.ops.norm_act import NORM_ACT
from tests.gpu import cuda_library, gates, simulate
from tests.gpu.ptx import nvcc, sass
from tests.gpu.ptx.build import CACHE, digest
from tests.gpu.ptx.metrics import metrics
from tests.gpu.triton_runs import assert_rounded_once, moved
from tests.ops.common import same_bits, shape_id
from tests.ops.norms import FLOATS, assert_close, is_laid_out, laid_out, leaves
from tests.ops.test_norm_act import HARD, NAMES, case_id, exact, parameters, plain

Case = tuple[tuple[int, ...], int]

# (architecture, dtype): each of both once in every run, since translating a kernel takes seconds; the others are slow.
QUICK = [(80, torch.float32), (90, torch.bfloat16), (120, torch.float16)]
LAYOUTS = ["contiguous", "channels_last"]

CUT: Case = ((1, 2100, 3, 3), 1)  # three launches on every architecture

# Groups whose sizes are no power of two and no multiple of a vector; vectors that reach over channels and over groups;
# pixels no multiple of a vector; more than 256 samples, and more than 16; no spatial dimension, one, three and four; a
# group's tiles in a cluster or, before sm_90, in several launches; so many channels a group that it is cut; one channel
# a group, a warp's lanes of them; more than one trip of each loop.
CASES: list[Case] = [
    ((2, 12, 5, 3), 3),
    ((300, 8, 2, 2), 4),
    ((19, 4, 3), 2),
    ((1, 48, 24, 24), 2),
    CUT,
    ((2, 30, 7, 7), 10),
    ((3, 48), 4),
    ((2, 6, 35), 2),
    ((2, 20, 2, 3, 5), 4),
    ((2, 3, 2, 2, 2, 2), 1),
    ((1, 64, 4, 4), 64),
    ((1, 64, 3), 2),
]


def runs(cases: list[Case], targets: list[tuple[int, torch.dtype]]) -> list[Any]:
    """(case, architecture, dtype); slow where their kernels are not those of every run."""

    def is_quick(case: Case, target: tuple[int, torch.dtype]) -> bool:
        return target in QUICK and (case != CUT or target[0] != 120)

    return [
        pytest.param(
            case,
            *target,
            id=f"{case_id(case)}-sm_{target[0]}-{target[1]}",
            marks=() if is_quick(case, target) else pytest.mark.slow,
        )
        for case, target in itertools.product(cases, targets)
    ]


ALL_TARGETS = list(itertools.product(cuda_library.ARCHITECTURES, FLOATS))


def inputs_of(case: Case, layout: str, dtype: torch.dtype, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    shape = case[0]
    return {"x": laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype), **parameters(shape, dtype, names)}


def results(inputs: dict[str, Tensor], groups: int, grad: Tensor, **keywords: Any) -> list[Tensor]:
    """The result and all gradients, inside a simulation."""
    given = leaves(inputs)
    y = df.group_norm_silu(given["x"], groups, **{n: v for n, v in given.items() if n != "x"}, **keywords)
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), grad)]


def assert_gradients_close(names: tuple[str, ...], got: list[Tensor], truth: list[Tensor]) -> None:
    """The tolerance of the CPU backend's test, for its reasons."""
    for name, ours, theirs in zip(names, got, truth, strict=True):
        terms = 0 if name == "x" else truth[0].numel() // theirs.numel()
        floor = terms * (1e-6 if name == "embedding" else 3e-8)
        allowed = 1e-5 * theirs.abs().max() + floor + theirs.abs() * torch.finfo(ours.dtype).eps / 2
        error = (ours.double() - theirs).abs()
        assert bool((error <= allowed).all()), f"{name}: {error.max():.3e} of {theirs.abs().max():.3e}"


def check(case: Case, inputs: dict[str, Tensor], grad: Tensor, got: list[Tensor], **keywords: Any) -> None:
    truth = leaves({n: v.double() for n, v in inputs.items()})
    z = plain(truth["x"], case[1], **{n: v for n, v in truth.items() if n != "x"}, **keywords)
    assert_close(got[0], z.detach())
    assert_rounded_once(got[0], z.detach())
    assert_gradients_close(tuple(inputs), got[1:], list(torch.autograd.grad(z, list(truth.values()), grad.double())))


# ---- Values ----


@pytest.mark.parametrize(("case", "target", "dtype"), runs(CASES, ALL_TARGETS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_float64(case: Case, layout: str, target: int, dtype: torch.dtype) -> None:
    inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
    with simulate.backend("cuda", target):
        got = results(inputs, case[1], grad)
    check(case, inputs, grad, got)
    assert is_laid_out(got[0], layout)
    assert is_laid_out(got[1], layout)


@pytest.mark.parametrize("target", cuda_library.ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("names", [(), ("weight", "bias"), ("embedding",), ("scale",), ("bias", "shift")], ids=str)
def test_parameters_are_optional(names: tuple[str, ...], layout: str, target: int) -> None:
    case, dtype = ((2, 12, 5, 3), 3), dict(QUICK)[target]
    given, grad = inputs_of(case, layout, dtype, names), laid_out(torch.randn(case[0]), layout).to(dtype)
    if dtype == torch.float32 and "embedding" not in names:
        given["x"] = given["x"] * 0.01 + 100  # a mean whose rounding counts beside the deviation
    for activation, parameter_dtype in (("silu", dtype), (None, torch.float32)):
        inputs = {n: v if n == "x" else v.to(parameter_dtype) for n, v in given.items()}
        with simulate.backend("cuda", target):
            got = results(inputs, case[1], grad, activation=activation)
        check(case, inputs, grad, got, activation=activation)


# In several launches on sm_80, with either layout: more parts than a warp has lanes; two samples of two groups of whole
# vectors; slabs of one group, rows of odd length; as many parts of cut channels. Sizes leave 1, 0, 3 and 2 of a vector.
SPLIT: list[Case] = [((1, 5, 121, 113), 1), ((2, 8, 48, 64), 2), ((1, 262, 9, 9), 2), ((1, 2106, 5, 5), 1)]
# And one that is too large for a cluster.
SEVERAL_LAUNCHES = [*itertools.product(SPLIT, LAYOUTS, [80]), (((1, 38500, 2), 1), "contiguous", 90)]


@pytest.mark.parametrize(
    ("case", "layout", "target"),
    SEVERAL_LAUNCHES,
    ids=[f"{layout}-{case_id(c)}-sm_{a}" for c, layout, a in SEVERAL_LAUNCHES],
)
def test_groups_of_several_launches(case: Case, layout: str, target: int) -> None:
    inputs, grad = inputs_of(case, layout, torch.float32), laid_out(torch.randn(case[0]), layout)
    with simulate.backend("cuda", target) as launches:
        got = results(inputs, case[1], grad)
    assert sum("apply" in launch.kernel for launch in launches) == 2
    check(case, inputs, grad, got)


SPLIT_TARGETS = [
    ("contiguous", 80, torch.float32),
    ("channels_last", 80, torch.float32),
    ("contiguous", 80, torch.bfloat16),  # in a cluster since sm_90
    ("channels_last", 90, torch.bfloat16),
    ("contiguous", 80, torch.float16),
    ("channels_last", 80, torch.float16),
]


@pytest.mark.parametrize(("layout", "target", "dtype"), SPLIT_TARGETS, ids=str)
def test_parameters_of_groups_of_several_launches(layout: str, target: int, dtype: torch.dtype) -> None:
    case: Case = ((2, 2101, 5, 1), 1)
    noise, grad = (laid_out(torch.randn(case[0]), layout) for _ in range(2))
    # A variance that eps counts beside, and in float32 a mean whose rounding counts beside the deviation.
    near_eps = noise * 0.02 + (100 if dtype == torch.float32 else 0)
    grad = grad.to(dtype)
    for names in ((), ("bias", "shift"), ("scale",), ("weight", "bias", "shift", "embedding"), NAMES):
        x = (noise * 2 + 1 if "embedding" in names else near_eps).to(dtype)
        for activation, parameter_dtype in (("silu", dtype), (None, torch.float32)):
            inputs = {"x": x, **parameters(case[0], parameter_dtype, names)}
            with simulate.backend("cuda", target) as launches:
                got = results(inputs, case[1], grad, activation=activation)
            assert sum("apply" in launch.kernel for launch in launches) == 2
            check(case, inputs, grad, got, activation=activation)


@pytest.mark.parametrize("least", [9, 2097], ids=["one launch", "several"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_last_vector_may_hold_any_number_of_channels(dtype: torch.dtype, least: int) -> None:
    for channels in range(least, least + 7):
        case: Case = ((1, channels, 3), 1)
        inputs = inputs_of(case, "channels_last", dtype)
        grad = laid_out(torch.randn(case[0]), "channels_last").to(dtype)
        with simulate.backend("cuda", 90):
            got = results(inputs, case[1], grad)
        check(case, inputs, grad, got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", ["x", *NAMES])
def test_each_gradient_alone(wanted: str, layout: str) -> None:
    case = ((1, 48, 24, 24), 2)
    inputs, grad = inputs_of(case, layout, torch.float32), laid_out(torch.randn(case[0]), layout)
    with simulate.backend("cuda", 80):
        everything = dict(zip(inputs, results(inputs, case[1], grad)[1:], strict=True))
        given = {**inputs, wanted: inputs[wanted].clone().requires_grad_()}
        y = df.group_norm_silu(given["x"], case[1], **{n: given[n] for n in NAMES})
        alone = torch.autograd.grad(y, given[wanted], grad)[0]
    assert same_bits(alone, everything[wanted])


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_lose_no_accuracy(kind: str, layout: str, target: int) -> None:
    dtype = torch.float32 if target == 80 else torch.bfloat16
    shape = (1, 16, 26, 26)
    x = laid_out(HARD[kind](torch.randn(shape)), layout).to(dtype)
    given = parameters(shape, names=("weight", "bias", "scale", "shift"))
    truth = exact(x, 4, **given)
    with simulate.backend("cuda", target):
        y = df.group_norm_silu(x, 4, **given)
    scale = max(1.0, float(truth.abs().max())) if kind.startswith("constant") else float(truth.abs().max())
    # As on the CPU, and half a unit in the last place of a shorter dtype.
    assert float((y - truth).abs().max()) < (1e-5 + (dtype != torch.float32) * torch.finfo(dtype).eps / 2) * scale


@pytest.mark.parametrize(("target", "dtype"), QUICK, ids=[f"sm_{a}-{d}" for a, d in QUICK])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 10, 13, 13), (1, 6, 3), (1, 6, 5), (1, 542)], ids=shape_id)
def test_an_embedding_may_move_the_mean_far(
    shape: tuple[int, ...], target: int, dtype: torch.dtype, layout: str
) -> None:
    """By so much that squares of differences to a value without it, or with another channel's, lose the variance; the
    sums are exact in float32."""
    noise, channels = (torch.randn(shape) * 64).round() / 64, torch.arange(shape[1])[None]
    apart = (32768.0 + 37 * channels) * (-1) ** channels
    for embedding, x in ((32768.0 + channels, noise), (apart, noise - apart.reshape(1, -1, *[1] * len(shape[2:])))):
        x = laid_out(x, layout).to(dtype)
        truth = exact(x, 2, embedding=embedding)
        with simulate.backend("cuda", target):
            y = df.group_norm_silu(x, 2, embedding=embedding)
        assert_close(y, truth, 1e-5)


@pytest.mark.parametrize(("target", "dtype"), QUICK[:2], ids=[f"sm_{a}-{d}" for a, d in QUICK[:2]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_may_differ_in_mean_and_size(layout: str, target: int, dtype: torch.dtype) -> None:
    """On sm_90 in a cluster, before it in several launches."""
    x = torch.randn(1, 2, 91 * 91) + torch.linspace(-3, 3, 91 * 91)
    x = laid_out(x.reshape(1, 2, 91, 91), layout).to(dtype)
    with simulate.backend("cuda", target):
        y = df.group_norm_silu(x, 2)
    assert_close(y, exact(x, 2))


@pytest.mark.parametrize("kind", ["mean 1e3", "mean 1e5", "outlier first pixels", "variance near eps"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_hard_inputs(kind: str, layout: str) -> None:
    x = laid_out(HARD[kind](torch.randn(2, 16, 20, 20)), layout)
    inputs = {"x": x, **parameters(x.shape), "embedding": torch.zeros(2, 16)}
    grad = laid_out(torch.randn(x.shape), layout)
    with simulate.backend("cuda", 80):
        got = results(inputs, 4, grad)[1:]
    truth = leaves({n: v.double() for n, v in inputs.items()})
    z = plain(truth["x"], 4, **{n: truth[n] for n in NAMES})
    expected = torch.autograd.grad(z, list(truth.values()), grad.double())
    for name, ours, theirs in zip(inputs, got, expected, strict=True):
        # 400 terms a channel, each as large as the gradient of x, sum up to the gradient of an embedding.
        scale = theirs.abs().max() if name != "embedding" else expected[0].abs().max() * 400
        assert (ours.double() - theirs).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("shape", [(1, 1001, 4), (1, 2501, 2)], ids=["one launch", "several on sm_80"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("target", "dtype"), QUICK, ids=[f"sm_{a}-{d}" for a, d in QUICK])
def test_silu_over_its_whole_range(target: int, dtype: torch.dtype, layout: str, shape: tuple[int, ...]) -> None:
    """A constant image makes z the shift itself; tolerance as for the CPU's kernel."""
    inputs = {"x": laid_out(torch.zeros(shape), layout).to(dtype)}
    # Both ends of the range in a last vector that is not full.
    both_signs = (-1.0) ** torch.arange(shape[1])
    inputs["shift"] = (torch.linspace(-110, 110, shape[1]) * both_signs).reshape(1, -1).to(dtype)
    grad = laid_out(torch.randn(shape), layout).to(dtype)
    truth = leaves({n: v.double() for n, v in inputs.items()})
    z = plain(truth["x"], 1, shift=truth["shift"])
    gradients = list(torch.autograd.grad(z, list(truth.values()), grad.double()))
    z = z.detach()
    allowed = z.abs() * (3e-7 + 1.4e-8 * truth["shift"].detach().abs()[..., None] + torch.finfo(dtype).eps / 2)
    allowed = allowed + torch.finfo(torch.float32).smallest_normal * 90 + torch.finfo(dtype).smallest_normal
    for approx, offset in ((0, 0), (0, 1), (1, 0), (-1, 0))[: 4 if dtype == torch.float32 else 2]:
        with simulate.backend("cuda", target, approx=approx):
            y, *got = results({**inputs, "x": moved(inputs["x"], offset)}, 1, moved(grad, offset))
        assert bool(((y.double() - z).abs() <= allowed).all())
        if approx == 0:  # the derivative has a sigmoid's last place times z, which is 110 here
            assert_gradients_close(tuple(inputs), got, gradients)


def test_not_finite_is_as_in_eager_pytorch() -> None:
    x = torch.randn(3, 8, 6, 6)
    x[0, 0, 2, 2], x[1, 3, 0, 1], x[2, 7, 5, 5] = torch.inf, -torch.inf, torch.nan
    expected = torch.nn.functional.group_norm(x, 4)
    for layout in LAYOUTS:
        with simulate.backend("cuda", 80):
            y = df.group_norm_silu(laid_out(x, layout), 4, activation=None)
        assert torch.equal(y.isnan(), expected.isnan())


# ---- Layouts, views and out ----


# The second has a group of whole vectors and one more element.
@pytest.mark.parametrize("case", [((2, 24, 8, 8), 3), ((1, 2, 91, 91), 2)], ids=case_id)
@pytest.mark.parametrize(("target", "dtype"), QUICK, ids=[f"sm_{a}-{d}" for a, d in QUICK])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_bit_depends_on_the_alignment(layout: str, target: int, dtype: torch.dtype, case: Case) -> None:
    inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
    with simulate.backend("cuda", target):
        aligned = results(inputs, case[1], grad)
    # 7 elements off, those of the second group, one element further, are aligned, and its results are not.
    for of_x, of_grad in ((7, 7), (7, 1), (1, 7), (0, 1)):
        with simulate.backend("cuda", target):
            misaligned = results({**inputs, "x": moved(inputs["x"], of_x)}, case[1], moved(grad, of_grad))
        assert all(same_bits(a, b) for a, b in zip(aligned, misaligned, strict=True)), (of_x, of_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_result_may_lie_less_aligned_than_the_input(layout: str) -> None:
    for shape, groups in (((2, 24, 8, 8), 3), ((1, 8, 48, 64), 2)):
        x = laid_out(torch.randn(shape), layout)
        out = torch.full((x.numel() + 3,), torch.nan)[3:].as_strided(x.shape, x.stride())
        with simulate.backend("cuda", 80):
            expected = df.group_norm_silu(x, groups)
            df.group_norm_silu(x, groups, out=out)
        assert same_bits(out, expected)


@pytest.mark.parametrize(("layout", "target", "dtype"), SPLIT_TARGETS, ids=str)
def test_no_bit_of_several_launches_depends_on_the_alignment(layout: str, target: int, dtype: torch.dtype) -> None:
    case: Case = ((1, 2104, 5), 1)
    inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
    out = moved(torch.full_like(grad, torch.nan), 1)
    with simulate.backend("cuda", target) as launches:
        aligned = results(inputs, case[1], grad)
        df.group_norm_silu(**inputs, num_groups=case[1], out=out)
        assert sum("apply" in launch.kernel for launch in launches) == 3
        misaligned = [
            results({**inputs, "x": moved(inputs["x"], of_x)}, case[1], moved(grad, of_grad))
            for of_x, of_grad in ((7, 1), (0, 1), (7, 0))
        ]
    assert same_bits(out, aligned[0])
    assert all(same_bits(a, b) for got in misaligned for a, b in zip(aligned, got, strict=True))


@pytest.mark.parametrize("target", [80, 90])
def test_views_are_read_where_they_lie(target: int) -> None:
    dtype = dict(QUICK)[target]
    wide = laid_out(torch.randn(2, 40, 9, 7), "channels_last").to(dtype)
    views = {
        "channels of a larger tensor": torch.randn(2, 40, 9, 7).to(dtype)[:, 3:27],
        "every other sample": torch.randn(4, 24, 9, 7).to(dtype)[::2],
        "expanded samples": torch.randn(1, 24, 9, 7).to(dtype).expand(2, -1, -1, -1),
        "channels of a channels_last tensor": wide[:, 3:27],
    }
    scale, shift = torch.randn(2, 48).to(dtype).chunk(2, dim=1)
    given = {
        "weight": torch.randn(48).to(dtype)[::2],
        "bias": torch.randn(1).expand(24),
        "scale": scale,
        "shift": shift,
        "embedding": torch.randn(24, 2).t(),
    }
    for name, x in views.items():
        with simulate.backend("cuda", target):
            y = df.group_norm_silu(x, 4, **given)
        assert_close(y, exact(x, 4, **given), of=name)


@pytest.mark.parametrize("case", [((2, 12, 5, 3), 3), ((1, 48, 24, 24), 2)], ids=case_id)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", [80, 90])
def test_out_and_in_place(target: int, layout: str, case: Case) -> None:
    inputs = inputs_of(case, layout, dict(QUICK)[target])
    x, given = inputs.pop("x"), inputs
    with simulate.backend("cuda", target):
        expected = df.group_norm_silu(x, case[1], **given)
        out = torch.full_like(x, torch.nan)
        assert df.group_norm_silu(x, case[1], **given, out=out) is out
        assert df.group_norm_silu(x, case[1], **given, out=x) is x
    assert same_bits(out, expected)
    assert same_bits(x, expected)


def test_no_sample_is_no_error() -> None:
    x, weight = torch.randn(0, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    with simulate.backend("cuda", 80):
        df.group_norm_silu(x, 4, weight, embedding=torch.randn(0, 8)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(8))


def test_a_parameter_of_the_other_short_dtype_is_refused() -> None:
    """The kernels are compiled for float32 and x's dtype."""
    x, weight = torch.randn(2, 8, 4, 4).to(torch.float16), torch.ones(8, dtype=torch.bfloat16)
    with simulate.backend("cuda", 80), pytest.raises(RuntimeError, match="weight must be float32 or of x's dtype"):
        NORM_ACT["cuda"](x, 4, weight, None, None, None, None, 1e-5, 1, torch.empty_like(x), None, None)


# ---- Bits ----

# One block a group, its last vector not full; a cluster on sm_90 and three launches before it; a cut group, three
# launches everywhere.
PATHS: list[Case] = [((2, 9, 7, 3), 3), ((1, 48, 24, 24), 2), CUT]
SCHEDULES: list[dict[str, Any]] = [
    {"order": 1},
    {"order": 2, "seed": 5},
    {"order": 2, "seed": 6, "strict_global": True},
]


@pytest.mark.parametrize(("case", "target", "dtype"), runs(PATHS, QUICK))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(case: Case, layout: str, target: int, dtype: torch.dtype) -> None:
    inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
    with simulate.backend("cuda", target):
        expected = results(inputs, case[1], grad)
    for options in SCHEDULES:
        with simulate.backend("cuda", target, **options):
            got = results(inputs, case[1], grad)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), options


@pytest.mark.parametrize("approx", [1, -1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_approximate_instructions_may_err_as_much_as_documented(layout: str, approx: int) -> None:
    for (target, dtype), case in itertools.product(QUICK, PATHS[:2]):
        inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
        with simulate.backend("cuda", target, approx=approx):
            got = results(inputs, case[1], grad)
        check(case, inputs, grad, got)


@pytest.mark.parametrize(("target", "dtype"), QUICK, ids=[f"sm_{a}-{d}" for a, d in QUICK])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", PATHS[:2], ids=case_id)
def test_bits_of_a_sample_do_not_depend_on_its_batch(case: Case, layout: str, target: int, dtype: torch.dtype) -> None:
    (_, *size), groups = case
    shape = (3, *size)
    inputs, grad = inputs_of((shape, groups), layout, dtype), laid_out(torch.randn(shape), layout).to(dtype)
    shared = {"weight", "bias"}
    alone = {n: v if n in shared else v[1:2].clone() for n, v in inputs.items()}
    with simulate.backend("cuda", target):
        together = dict(zip(["y", *inputs], results(inputs, groups, grad), strict=True))
        single = dict(zip(["y", *inputs], results(alone, groups, grad[1:2].clone()), strict=True))
    for name in together.keys() - shared:
        assert same_bits(together[name][1:2], single[name]), name


# ---- What the GPU has to do ----

# Pixels and channels whole vectors, sectors and warps.
ROUND: dict[str, Case] = {"read once": ((1, 64, 16, 16), 8), "split": ((1, 16, 64, 64), 2)}


def traced(case: Case, layout: str, target: int, dtype: torch.dtype) -> list[simulate.Launch]:
    inputs, grad = inputs_of(case, layout, dtype), laid_out(torch.randn(case[0]), layout).to(dtype)
    with simulate.backend("cuda", target, trace=1 << 19) as launches:
        results(inputs, case[1], grad)
    assert all(launch.stats["traced"] <= 1 << 19 for launch in launches)
    return launches


def image_accesses(launch: simulate.Launch) -> npt.NDArray[Any]:
    """The trace of what moves images: to and from global memory by vector.cuh, in shared memory whatever is kept."""
    parsed = cuda_library.library().module(launch.target, launch.kernel).parsed

    def moves(line: int) -> bool:
        file, _, number = parsed.where(line).rpartition("; ")[2].rpartition(":")
        if Path(file).name == "vector.cuh":
            return True
        source = (cuda_library.CSRC / "cuda" / Path(file).name).read_text().splitlines()
        return "kept" in source[int(number) - 1]

    return launch.trace[np.isin(launch.trace["pc"], [n for n in set(launch.trace["pc"].tolist()) if moves(n)])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("path", ROUND)
@pytest.mark.parametrize(("target", "dtype"), QUICK[:2], ids=[f"sm_{a}-{d}" for a, d in QUICK[:2]])
def test_images_move_no_more_than_they_must_in_whole_sectors_without_bank_conflicts(
    target: int, dtype: torch.dtype, path: str, layout: str
) -> None:
    """2 transfers an element forward and 3 backward where a group is read once, 3 and 5 where it is split."""
    case = ROUND[path]
    moved = {False: 0, True: 0}
    launches = traced(case, layout, target, dtype)
    for launch in launches:
        images = image_accesses(launch)
        moved["backward" in launch.kernel] += int(images["size"][images["kind"] < 2].sum())
        for line, access in metrics(images).items():
            if access.name.endswith("global"):
                assert access.efficiency == 1.0, f"{launch.kernel}, PTX line {line}: {access}"
            else:
                assert access.per_request == 1.0, f"{launch.kernel}, PTX line {line}: {access}"
    once = path == "read once" or launches[0].target == 90
    image = math.prod(case[0]) * dtype.itemsize
    assert moved == {False: (2 if once else 3) * image, True: (3 if once else 5) * image}


@pytest.mark.parametrize("file", ["norm_act", "norm_act_backward"])
@pytest.mark.parametrize(
    "target", [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in cuda_library.ARCHITECTURES]
)
def test_no_register_is_spilled_and_images_move_by_128_bits(target: int, file: str) -> None:
    csrc = cuda_library.CSRC
    cubin = nvcc.compile_cubin(csrc / "cuda" / f"{file}.cu", target, [f"-I{csrc / 'include'}", f"-I{csrc}"])
    gates.assert_no_spills(cubin)
    for kernel, code in sass.sass(cubin).items():
        if "combine" not in kernel and "gradients" not in kernel:
            gates.assert_vector_accesses(code)


# ---- Launch configuration ----

FIELDS = ("statistics", "parts", "step", "slab", "slabs", "piece", "cuts", "threads", "shared_bytes", "blocks")
OWN, CLUSTER, GIVEN = 0, 1, 2
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@cache
def plan_library() -> ctypes.CDLL:
    source = Path(__file__).parent / "norm_act_plan.cpp"
    header = cuda_library.CSRC / "cuda" / "norm_act_plan.h"
    out = CACHE / f"norm-act-plan-{digest(source.read_bytes(), header.read_bytes())}.so"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            *cuda_library.CXX,
            "-std=c++17",
            "-O1",
            "-shared",
            "-fPIC",
            f"-I{cuda_library.CSRC}",
            source,
            "-o",
            out,
        ]
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(out))


def plan_of(case: Case, layout: str, size: int, target: int, backward: bool) -> dict[str, int]:
    (samples, channels, *pixels), groups = case
    values = (ctypes.c_int64 * len(FIELDS))()
    sizes = [ctypes.c_int64(n) for n in (samples, channels, math.prod(pixels), groups)]
    last = int(layout == "channels_last")
    plan_library().plan_of(*sizes, last, size, SHARED_BYTES[target], int(target >= 90), int(backward), values)
    return dict(zip(FIELDS, values, strict=True))


@settings(deadline=None)
@given(by=st.integers(1, 2**31 - 1), most=st.integers(0, 2**63 - 1), rest=st.integers(-1, 1))
def test_dividers_are_exact(by: int, most: int, rest: int) -> None:
    """The kernels' arithmetic, next to multiples, where a quotient is wrong first."""
    values = (ctypes.c_uint64 * 4)()
    plan_library().dividers_of(ctypes.c_uint32(by), values)
    for bits, multiplier, shift in ((32, *values[:2]), (64, *values[2:])):
        n = min(max(most % 2 ** (bits - 1) // by * by + rest, 0), 2 ** (bits - 1) - 1)
        assert multiplier < 2**bits
        assert ((n * multiplier >> bits) + n) >> shift == n // by


# Residual blocks of the usual networks, LayerNorm-like groups, and what is too large for anything.
PLANNED: list[Case] = [
    *CASES,
    ((1, 128, 32, 32), 32),
    ((1, 320, 64, 64), 32),
    ((1, 1280, 8, 8), 32),
    ((1, 128, 512, 512), 32),
    ((1, 64, 32, 32), 1),
    ((1, 8192, 2, 2), 1),
    ((1, 4, 4096, 4096), 1),
    ((1, 1 << 20), 1),
]


def all_plans() -> Iterator[tuple[Case, str, int, int, bool, dict[str, int]]]:
    for case, layout, size, target, backward in itertools.product(
        PLANNED, LAYOUTS, (4, 2), SHARED_BYTES, (False, True)
    ):
        yield case, layout, size, target, backward, plan_of(case, layout, size, target, backward)


def test_plans_cover_a_sample_and_are_ones_that_the_device_takes() -> None:
    for case, layout, size, target, _, plan in all_plans():
        (samples, channels, *pixels), groups = case
        told = f"{case} {layout} {size} sm_{target}: {plan}"
        assert plan["threads"] in range(32, 257, 32), told
        assert plan["shared_bytes"] + 1024 <= SHARED_BYTES[target], told
        if plan["statistics"] == CLUSTER:
            assert target >= 90, told
            assert plan["parts"] in (2, 4, 8), told
        assert plan["blocks"] == samples * plan["slabs"] * plan["parts"], told
        if layout == "contiguous":
            elements = channels // groups * math.prod(pixels)
            assert (plan["parts"] - 1) * plan["step"] < elements <= plan["parts"] * plan["step"], told
        else:
            chunks = plan["parts"] // plan["cuts"]
            assert (chunks - 1) * plan["step"] < math.prod(pixels) <= chunks * plan["step"], told
            assert plan["slabs"] * plan["slab"] >= groups, told
            assert plan["piece"] * plan["cuts"] >= plan["slab"] * channels // groups, told


def test_plans_do_not_depend_on_the_batch() -> None:
    for case, layout, size, target, backward, plan in all_plans():
        (_, *sizes), groups = case
        larger = plan_of(((64, *sizes), groups), layout, size, target, backward)
        ignored = {"blocks"}
        assert {k: v for k, v in plan.items() if k not in ignored} == {
            k: v for k, v in larger.items() if k not in ignored
        }, case


def test_large_groups_keep_a_gpu_busy_at_batch_one() -> None:
    """In as many blocks as an H100 has multiprocessors, nearly, however few the groups are."""
    for layout, target in itertools.product(LAYOUTS, SHARED_BYTES):
        for case in [((1, 128, 512, 512), 32), ((1, 64, 128, 128), 1), ((1, 4, 4096, 4096), 1)]:
            plan = plan_of(case, layout, 4, target, False)
            assert plan["blocks"] >= 128, f"{shape_id(case[0])} {layout} sm_{target}: {plan}"


def test_groups_of_usual_networks_are_read_once() -> None:
    for case, target in [(((1, 320, 64, 64), 32), 90), (((1, 128, 32, 32), 32), 80), (((1, 1280, 8, 8), 32), 120)]:
        for layout in LAYOUTS:
            plan = plan_of(case, layout, 2, target, False)
            assert plan["statistics"] in (OWN, CLUSTER), f"{case} {layout} sm_{target}: {plan}"
