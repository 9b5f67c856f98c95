"""RMSNorm and SiLU on the CUDA backend: shipped host code, and each kernel's PTX under the simulator's checks."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from tests.gpu import cuda_library, gates, simulate
from tests.gpu.ptx import nvcc
from tests.gpu.test_cuda_norm_act import image_accesses
from tests.gpu.triton_runs import assert_rounded_once, moved
from tests.ops.common import same_bits, shape_id
from tests.ops.norms import FLOATS, assert_close, is_laid_out, laid_out, leaves
from tests.ops.test_rms_norm_act import NAMES, parameters, plain

# As in test_cuda_norm_act.py, to which sm_120 is left: the source has nothing that depends on the architecture.
QUICK = [(80, torch.float32), (90, torch.bfloat16)]
TARGETS = [
    pytest.param(a, d, id=f"sm_{a}-{d}", marks=() if (a, d) in QUICK else pytest.mark.slow)
    for a, d in itertools.product(cuda_library.ARCHITECTURES, FLOATS)
]
LAYOUTS = ["contiguous", "channels_last"]

# Fewer channels than a vector, a prime number; one pixel, none; more tiles than one; more samples than 256; more
# columns than threads, and so many channels that a tile is read again; whole vectors, more than four a thread,
# several in a row; any number of dimensions.
SHAPES = [
    (2, 12, 5, 3),
    (1, 199, 17, 19),
    (300, 8, 2, 2),
    (2, 70, 1, 1),
    (1, 1, 20, 21),
    (3, 48),
    (1, 4096, 3, 3),
    (1, 1104, 4, 4),
    (1, 248, 8, 8),
    (2, 3, 2, 3, 5),
]


def inputs_of(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype), **parameters(shape, dtype)}


def results(inputs: dict[str, Tensor], grad: Tensor, **keywords: Any) -> list[Tensor]:
    """The result and all gradients, inside a simulation."""
    given = leaves(inputs)
    y = df.rms_norm_silu(given["x"], **{n: v for n, v in given.items() if n != "x"}, **keywords)
    return [y.detach(), *torch.autograd.grad(y, list(given.values()), grad)]


def check(inputs: dict[str, Tensor], grad: Tensor, got: list[Tensor], **keywords: Any) -> None:
    truth = leaves({n: v.double() for n, v in inputs.items()})
    z = plain(truth["x"], **{n: v for n, v in truth.items() if n != "x"}, **keywords)
    assert_close(got[0], z.detach())
    assert_rounded_once(got[0], z.detach())
    expected = torch.autograd.grad(z, list(truth.values()), grad.double())
    x, one = truth["x"].detach(), torch.ones(())
    factor = (truth.get("weight", one) * (1 + truth.get("scale", 0 * one))).detach().abs().max()
    reciprocal = math.sqrt(x.shape[1]) / x.norm(dim=1).clamp(min=keywords.get("eps", 1e-12))
    largest = float(factor * grad.abs().max() * reciprocal.max())
    for name, ours, theirs in zip(inputs, got[1:], expected, strict=True):
        # That of x is a difference of two terms, which for one channel are equal; a parameter's is a sum of terms that
        # may come to little.
        floor = 3e-7 * largest if name == "x" else 3e-8 * inputs["x"].numel() / theirs.numel()
        allowed = 1e-5 * theirs.abs().max() + floor + theirs.abs() * torch.finfo(ours.dtype).eps / 2
        error = (ours.double() - theirs).abs()
        assert bool((error <= allowed).all()), f"{name}: {error.max():.3e} of {theirs.abs().max():.3e}"


@pytest.mark.parametrize(("target", "dtype"), TARGETS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_values_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], layout: str, target: int, dtype: torch.dtype
) -> None:
    inputs, grad = inputs_of(shape, layout, dtype), laid_out(torch.randn(shape), layout).to(dtype)
    with simulate.backend("cuda", target):
        got = results(inputs, grad)
        without_gradient = df.rms_norm_silu(**inputs)
    check(inputs, grad, got)
    assert same_bits(without_gradient, got[0])
    assert is_laid_out(got[0], layout)
    assert is_laid_out(got[1], layout)


def strided(tensor: Tensor) -> Tensor:
    """A copy whose elements do not lie side by side."""
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


# float16 differs from bfloat16 in its conversions alone, which one layout shows.
OPTIONS = [*itertools.product(QUICK, LAYOUTS), ((80, torch.float16), "contiguous")]


@pytest.mark.parametrize(("target", "dtype", "layout"), [(a, d, layout) for (a, d), layout in OPTIONS], ids=str)
def test_every_option_in_small_images(target: int, dtype: torch.dtype, layout: str) -> None:
    """Every rest of a vector, in rows of more vectors than a warp has threads and of fewer, in tiles that are read once
    and, as if a block had no shared memory to keep them, again."""
    draw = random.Random(0)
    for k in range(16):
        along, across = draw.choice((8, 16, 40, 256)) + k % 8, draw.choice((3, 9, 40))
        shape = (2, along, across) if layout == "channels_last" else (2, across, along)
        x, grad = laid_out(torch.randn(shape) * 2 + 1, layout), laid_out(torch.randn(shape), layout).to(dtype)
        x[:, :, 1] *= 1e-2  # a norm below the larger eps
        names = tuple(name for name in ("weight", "scale", "shift") if draw.random() < 0.7)
        given = parameters(shape, draw.choice((dtype, torch.float32)), names)
        inputs = {
            "x": moved(x.to(dtype), draw.choice((0, 1))),
            **{name: strided(v) if k % 3 else v for name, v in given.items()},
        }
        keywords = {"eps": draw.choice((1e-12, 0.5)), "activation": draw.choice(("silu", None))}
        with simulate.backend("cuda", target, shared_bytes=(None, 0)[k // 8]):
            got = results(inputs, moved(grad, draw.choice((0, 1))), **keywords)
            without_gradient = df.rms_norm_silu(**inputs, **keywords)
        assert same_bits(without_gradient, got[0])
        check(inputs, grad, got, **keywords)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_activation_are_optional(layout: str) -> None:
    """Of more channels than a block has threads."""
    shape = (1, 300, 3, 2)
    x, grad = laid_out(torch.randn(shape), layout), laid_out(torch.randn(shape), layout)
    for names in itertools.chain.from_iterable(itertools.combinations(NAMES, n) for n in range(len(NAMES) + 1)):
        inputs = {"x": x, **parameters(shape, names=names)}
        with simulate.backend("cuda", 80):
            got = results(inputs, grad, activation=None)
        check(inputs, grad, got, activation=None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_silu_over_its_whole_range(layout: str) -> None:
    shape = (1, 200, 3, 2)
    inputs, grad = inputs_of(shape, layout, torch.float32), laid_out(torch.randn(shape), layout)
    inputs["shift"] = torch.linspace(-110, 110, shape[1])[None]
    with simulate.backend("cuda", 80):
        got = results(inputs, grad)
    check(inputs, grad, got)


@pytest.mark.parametrize("shape", [(35, 40, 3, 3), (1, 2, 96, 90)], ids=shape_id)
def test_gradients_of_parameters_sum_over_more_samples_and_tiles_than_two_rounds_of_a_block(
    shape: tuple[int, ...],
) -> None:
    inputs, grad = inputs_of(shape, "contiguous", torch.float32), torch.randn(shape)
    with simulate.backend("cuda", 80):
        got = results(inputs, grad)
    check(inputs, grad, got)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_below_eps_divides_by_eps(layout: str) -> None:
    inputs, grad = inputs_of((2, 16, 5, 5), layout, torch.float32), laid_out(torch.randn(2, 16, 5, 5), layout)
    inputs["x"][:, :, 1, 2] = 0
    inputs["x"][:, :, 3, 3] *= 1e-3
    for shared_bytes in (None, 0):  # a tile that is kept, and one that is read again
        with simulate.backend("cuda", 80, shared_bytes=shared_bytes):
            got = results(inputs, grad, eps=0.5)
        check(inputs, grad, got, eps=0.5)


@pytest.mark.parametrize(("target", "dtype"), QUICK, ids=[f"sm_{a}-{d}" for a, d in QUICK])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_alignment_and_batch_gives_the_same_bits(layout: str, target: int, dtype: torch.dtype) -> None:
    shape = (3, 40, 8, 8)
    inputs, grad = inputs_of(shape, layout, dtype), laid_out(torch.randn(shape), layout).to(dtype)

    with simulate.backend("cuda", target):
        expected = results(inputs, grad)
        misaligned = results({**inputs, "x": moved(inputs["x"], 3)}, moved(grad, 3))
        one = {n: v if n == "weight" else v[1:2].clone() for n, v in inputs.items()}
        alone = dict(zip(["y", *inputs], results(one, grad[1:2].clone()), strict=True))
    assert all(same_bits(a, b) for a, b in zip(misaligned, expected, strict=True))
    for name, together in zip(["y", *inputs], expected, strict=True):
        assert name == "weight" or same_bits(together[1:2], alone[name]), name
    for options in ({"order": 1}, {"order": 2, "seed": 5}, {"order": 2, "seed": 6, "strict_global": True}):
        with simulate.backend("cuda", target, **options):
            got = results(inputs, grad)
        assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), options
    for approx in (1, -1):
        with simulate.backend("cuda", target, approx=approx):
            check(inputs, grad, results(inputs, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_in_place(layout: str) -> None:
    x, given = laid_out(torch.randn(2, 12, 5, 3), layout), parameters((2, 12))
    with simulate.backend("cuda", 80):
        expected = df.rms_norm_silu(x, **given)
        out, misaligned = torch.full_like(x, torch.nan), moved(torch.full_like(x, torch.nan), 3)
        assert df.rms_norm_silu(x, **given, out=out) is out
        df.rms_norm_silu(x, **given, out=misaligned)
        assert df.rms_norm_silu(x, **given, out=x) is x
    assert all(same_bits(got, expected) for got in (out, misaligned, x))


def test_no_sample_is_no_error() -> None:
    x, weight = torch.randn(0, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    with simulate.backend("cuda", 80):
        df.rms_norm_silu(x, weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_are_read_and_written_once_in_whole_sectors_without_bank_conflicts(layout: str) -> None:
    shape = (1, 64, 16, 16)
    inputs, grad = inputs_of(shape, layout, torch.float32), laid_out(torch.randn(shape), layout)
    with simulate.backend("cuda", 80, trace=1 << 19) as launches:
        results(inputs, grad)
    forward, backward = launches[:2]
    for launch, transfers in ((forward, 2), (backward, 3)):
        images = image_accesses(launch)
        in_global = images[images["kind"] < 2]
        assert int(in_global["size"].sum()) == transfers * inputs["x"].nbytes
        gates.assert_coalesced(in_global, least_bytes=16)
        gates.assert_no_bank_conflicts(images)


@pytest.mark.parametrize(
    "target", [pytest.param(a, marks=() if a == 90 else pytest.mark.slow) for a in cuda_library.ARCHITECTURES]
)
def test_no_register_is_spilled(target: int) -> None:
    csrc = cuda_library.CSRC
    gates.assert_no_spills(
        nvcc.compile_cubin(csrc / "cuda" / "rms_norm_act.cu", target, [f"-I{csrc / 'include'}", f"-I{csrc}"])
    )
