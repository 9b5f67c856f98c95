"""RMSNorm, scale and shift, and SiLU: values, gradients, bits and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.nn import RMSNormSiLU
from ddpm_fast.ops.rms_norm_act import RMS_NORM_ACT, RMS_NORM_ACT_BACKWARD

from .common import run_with_isa, same_bits, shape_id
from .norms import FLOATS, assert_close, is_laid_out, laid_out, leaves

NAMES = ("weight", "scale", "shift")

# Fewer channels than a vector, a prime number, more than two vectors; one pixel, none, more than a chunk; more samples
# than 256; any number of dimensions.
SHAPES = [
    (2, 12, 5, 3),
    (2, 64, 9, 9),
    (1, 131, 17, 19),
    (300, 8, 3, 3),
    (2, 70, 1, 1),
    (1, 1, 20, 21),
    (3, 48),
    (2, 6, 33),
    (2, 20, 2, 3, 5),
]


def parameters(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, names: tuple[str, ...] = NAMES
) -> dict[str, Tensor]:
    return {name: torch.randn(shape[1:2] if name == "weight" else shape[:2]).to(dtype) for name in names}


def plain(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-12,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """lucidrains' RMSNorm, scale and shift, and SiLU."""
    pixels = (1,) * (x.dim() - 2)
    y = F.normalize(x, dim=1, eps=eps) * math.sqrt(x.shape[1])
    if weight is not None:
        y = y * weight.reshape(-1, *pixels)
    if scale is not None:
        y = y * (scale.reshape(*scale.shape, *pixels) + 1)
    if shift is not None:
        y = y + shift.reshape(*shift.shape, *pixels)
    return F.silu(y) if activation else y


def exact(x: Tensor, **given: Any) -> Tensor:
    return plain(x.double(), **{name: v.double() if isinstance(v, Tensor) else v for name, v in given.items()})


# ---- Values ----


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_is_float64_rounded_once(
    backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, activation: str | None
) -> None:
    x = laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype)
    for names in ((), ("weight",), ("scale", "shift"), NAMES):
        given = parameters(shape, dtype, names)
        y = df.rms_norm_silu(x, **given, activation=activation)
        assert y.dtype == dtype
        assert is_laid_out(y, layout)
        assert_close(y, exact(x, **given, activation=activation))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_error_is_no_larger_than_eager_pytorchs(backend: str, layout: str) -> None:
    ours = theirs = 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        x, given = laid_out(torch.randn(2, 64, 28, 28), layout), parameters((2, 64))
        truth = exact(x, **given)
        ours += float((df.rms_norm_silu(x, **given) - truth).square().sum())
        theirs += float((plain(x, **given) - truth).square().sum())
    assert ours <= theirs


def test_float16_overflows_nowhere_and_eps_does_not_vanish(backend: str) -> None:
    """Norms beyond float16's 65504, and an eps of which float16 would make 0."""
    x = (torch.randn(2, 64, 4, 4) * 3e4).clamp(-6e4, 6e4).half()
    x[1, :, 2, 2] = 0
    y = df.rms_norm_silu(x)
    assert_close(y, exact(x))
    assert torch.equal(y[1, :, 2, 2], torch.zeros(64).half())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_norm_below_eps_divides_by_eps(backend: str, layout: str) -> None:
    x = laid_out(torch.randn(2, 16, 5, 5), layout)
    x[0, :, 1, 1] *= 1e-6
    y = df.rms_norm_silu(x, eps=1e-3)
    assert_close(y, exact(x, eps=1e-3))
    assert y[0, :, 1, 1].abs().max() < 0.1


def test_not_finite_stays_in_its_pixel(backend: str) -> None:
    for layout in ("contiguous", "channels_last"):
        x = laid_out(torch.randn(2, 20, 6, 6), layout)
        x[1, 3, 2, 2] = torch.nan
        y = df.rms_norm_silu(x)
        assert y[1, :, 2, 2].isnan().all()
        assert y.isnan().sum() == 20


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out_in_place_and_views(backend: str, layout: str) -> None:
    x, given = laid_out(torch.randn(2, 24, 9, 7), layout), parameters((2, 24))
    expected = df.rms_norm_silu(x, **given)
    out = torch.full_like(x, torch.nan)
    assert df.rms_norm_silu(x, **given, out=out) is out
    assert same_bits(out, expected)
    assert same_bits(df.rms_norm_silu(x, **given, out=x), expected)
    wide = laid_out(torch.randn(2, 40, 9, 7), layout)[:, 3:27]
    columns = {
        "weight": torch.randn(48)[::2],
        "scale": torch.randn(2, 48).chunk(2, 1)[1],
        "shift": torch.randn(24, 2).t(),
    }
    assert_close(df.rms_norm_silu(wide, **columns), exact(wide, **columns))


def test_no_sample_is_no_error(backend: str) -> None:
    x, weight = torch.randn(0, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    df.rms_norm_silu(x, weight).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))


# ---- Gradients ----


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_gradients_are_those_of_float64(
    backend: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype, activation: str | None
) -> None:
    inputs = {"x": laid_out(torch.randn(shape) * 2 + 1, layout).to(dtype), **parameters(shape, dtype)}
    grad = laid_out(torch.randn(shape), layout).to(dtype)
    given, truth = leaves(inputs), leaves({name: value.double() for name, value in inputs.items()})
    y = df.rms_norm_silu(given["x"], **{n: given[n] for n in NAMES}, activation=activation)
    got = torch.autograd.grad(y, list(given.values()), grad)
    z = plain(truth["x"], **{n: truth[n] for n in NAMES}, activation=activation)
    expected = torch.autograd.grad(z, list(truth.values()), grad.double())
    x, factor = truth["x"].detach(), (truth["weight"] * (1 + truth["scale"])).detach().abs().max()
    largest = factor * grad.abs().max() * (math.sqrt(shape[1]) / x.norm(dim=1)).max()
    for name, ours, theirs in zip(inputs, got, expected, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        # That of x is a difference of two terms, which for one channel are equal; a parameter's is a sum of terms that
        # may come to little.
        floor = 3e-7 * largest if name == "x" else expected[0].numel() // theirs.numel() * 3e-8
        allowed = 1e-5 * theirs.abs().max() + floor + theirs.abs() * torch.finfo(dtype).eps / 2
        assert bool(((ours.double() - theirs).abs() <= allowed).all()), name
    assert is_laid_out(got[0], layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_below_eps_the_norm_is_a_constant(backend: str, layout: str) -> None:
    x = laid_out(torch.randn(1, 16, 3, 3) * 1e-6, layout).requires_grad_()
    grad = torch.randn(1, 16, 3, 3)
    (got,) = torch.autograd.grad(df.rms_norm_silu(x, eps=1e-3, activation=None), x, grad)
    assert_close(got, grad.double() * 4 / 1e-3)


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "expanded"])
def test_gradients_may_arrive_in_any_layout(backend: str, grad_layout: str) -> None:
    x = laid_out(torch.randn(3, 12, 6, 5), "channels_last").requires_grad_()
    y = df.rms_norm_silu(x)
    grad = torch.randn(3, 12, 1, 1).expand_as(x)
    expected = torch.autograd.grad(y, x, laid_out(grad, "channels_last"), retain_graph=True)[0]
    got = torch.autograd.grad(y, x, grad if grad_layout == "expanded" else laid_out(grad, grad_layout))[0]
    assert same_bits(got, expected)
    assert is_laid_out(got, "channels_last")


@pytest.mark.parametrize("wanted", ["x", *NAMES])
def test_each_gradient_alone(backend: str, wanted: str) -> None:
    inputs = {"x": torch.randn(2, 12, 5, 5), **parameters((2, 12))}
    given = leaves(inputs)
    y = df.rms_norm_silu(given["x"], **{n: given[n] for n in NAMES})
    expected = dict(zip(given, torch.autograd.grad(y.square().sum(), list(given.values())), strict=True))
    alone = {**inputs, wanted: given[wanted]}
    y = df.rms_norm_silu(alone["x"], **{n: alone[n] for n in NAMES})
    assert same_bits(torch.autograd.grad(y.square().sum(), given[wanted])[0], expected[wanted])


@pytest.mark.parametrize("activation", ["silu", None])
def test_gradcheck_in_float64(activation: str | None) -> None:
    inputs = [value.double().requires_grad_() for value in (torch.randn(2, 6, 3, 2), *parameters((2, 6)).values())]

    def function(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return df.rms_norm_silu(x, weight, 1e-12, scale, shift, activation)

    assert torch.autograd.gradcheck(function, inputs)


def test_a_second_derivative_is_refused(backend: str) -> None:
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="rms_norm_silu has no second derivative"):
        torch.autograd.grad(df.rms_norm_silu(x).sum(), x, create_graph=True)


# ---- Bits ----

BITS = """
import hashlib, torch, ddpm_fast as df
torch.set_num_threads({threads})
digest = hashlib.sha256()
for shape in ((2, 12, 5, 3), (1, 70, 40, 40), (3, 131, 6, 5), (2, 48)):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for last in (False, True):
            torch.manual_seed(0)
            x = torch.randn(shape).to(dtype)
            x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
            leaves = [t.requires_grad_() for t in (x, *(torch.randn(s) for s in (shape[1:2], shape[:2], shape[:2])))]
            for activation in ("silu", None):
                y = df.rms_norm_silu(x, leaves[1], 1e-12, leaves[2], leaves[3], activation)
                for result in (y, *torch.autograd.grad(y, leaves, torch.ones_like(y))):
                    digest.update(result.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_bits_are_the_same_on_every_instruction_set_and_number_of_threads() -> None:
    digests = {
        (isa, threads): run_with_isa(isa, BITS.format(threads=threads))
        for isa, threads in (("avx512", 1), ("avx512", 2), ("avx2", 1), ("generic", 1))
    }
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_of_a_sample_do_not_depend_on_its_batch(layout: str) -> None:
    shape = (7, 33, 30, 31)
    x, given = laid_out(torch.randn(shape), layout), parameters(shape)
    grad = laid_out(torch.randn(shape), layout)

    def run(samples: slice) -> list[Tensor]:
        rows = leaves({"x": x[samples], **{n: given[n][samples] for n in ("scale", "shift")}})
        y = df.rms_norm_silu(rows["x"], given["weight"], scale=rows["scale"], shift=rows["shift"])
        return [y, *torch.autograd.grad(y, list(rows.values()), grad[samples])]

    for batched, alone in zip(run(slice(None)), run(slice(4, 5)), strict=True):
        assert same_bits(batched[4:5], alone)


# ---- As an operator of PyTorch's, and as a module ----


def test_operators_pass_opcheck(backend: str) -> None:
    x, given = torch.randn(2, 8, 5, 3), parameters((2, 8))
    out, rrms = torch.empty_like(x), torch.empty(2, 15)
    torch.library.opcheck(RMS_NORM_ACT[backend], (x, *given.values(), 1e-12, 1, out, rrms))
    torch.library.opcheck(RMS_NORM_ACT[backend], (x, None, None, None, 1e-12, 0, out, None))
    RMS_NORM_ACT[backend](x, *given.values(), 1e-12, 1, out, rrms)
    gradients = [torch.empty_like(t) for t in (x, *given.values())]
    grad = torch.randn_like(x)
    torch.library.opcheck(RMS_NORM_ACT_BACKWARD[backend], (grad, x, rrms, *given.values(), 1e-12, 1, *gradients))
    torch.library.opcheck(RMS_NORM_ACT_BACKWARD[backend], (grad, x, rrms, *[None] * 3, 1e-12, 0, *[None] * 4))


def test_traces_whole_forward_and_backward(backend: str) -> None:
    torch._dynamo.reset()

    def function(x: Tensor, **given: Tensor) -> Tensor:
        return df.rms_norm_silu(x * 2, **given)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    given = leaves({"x": torch.randn(2, 8, 5, 3), **parameters((2, 8))})
    grad = torch.randn(2, 8, 5, 3)
    expected = torch.autograd.grad(function(**given), list(given.values()), grad)
    got = torch.autograd.grad(compiled(**given), list(given.values()), grad)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_the_module_is_the_function(backend: str) -> None:
    module = RMSNormSiLU(12)
    torch.nn.init.normal_(module.weight)
    x, given = torch.randn(2, 12, 5, 5), parameters((2, 12), names=("scale", "shift"))
    assert list(module.state_dict()) == ["weight"]
    assert same_bits(module(x, **given), df.rms_norm_silu(x, module.weight, **given))
    bare = RMSNormSiLU(12, 1e-3, affine=False, activation=None)
    assert not bare.state_dict()
    assert same_bits(bare(x), df.rms_norm_silu(x, eps=1e-3, activation=None))
    assert "12, eps=0.001, affine=False, activation=None" in repr(bare)


# ---- Bad input ----

X = torch.zeros(2, 8, 4, 4)
VALUE_ERRORS: dict[str, Callable[[], Any]] = {
    "x must be float32, float16, bfloat16 or float64, not torch.int64": lambda: df.rms_norm_silu(X.long()),
    r"x must be \(N, C, \*\), not of shape \(8,\)": lambda: df.rms_norm_silu(X[0, :, 0, 0]),
    r"one pixel a sample, not shape \(2, 8, 0, 4\)": lambda: df.rms_norm_silu(X[:, :, :0]),
    "eps must be positive and finite, not 0": lambda: df.rms_norm_silu(X, eps=0.0),
    "eps must be at least 1e-18, not 1e-20": lambda: df.rms_norm_silu(X, eps=1e-20),
    r"weight must have shape \(8,\)": lambda: df.rms_norm_silu(X, torch.zeros(1, 8, 1, 1)),
    r"scale must have shape \(2, 8\)": lambda: df.rms_norm_silu(X, scale=torch.zeros(8)),
    "shift must be of x's dtype torch.float32 or float32, not torch.float64": lambda: df.rms_norm_silu(
        X, shift=torch.zeros(2, 8).double()
    ),
    "activation must be 'silu' or None, not 'gelu'": lambda: df.rms_norm_silu(X, activation="gelu"),
    "out must be x itself or share no memory with it": lambda: df.rms_norm_silu(
        (b := torch.zeros(3, 8, 4, 4))[:2], out=b[1:]
    ),
    "num_channels must be at least 1, got 0": lambda: RMSNormSiLU(0),
    "activation must be 'silu' or None, got 'relu'": lambda: RMSNormSiLU(8, activation="relu"),
}
TYPE_ERRORS: dict[str, Callable[[], Any]] = {
    "x must be a tensor": lambda: df.rms_norm_silu([[1.0]]),
    "eps must be a float, not str": lambda: df.rms_norm_silu(X, eps="1e-5"),
    "weight must be a tensor or None, not float": lambda: df.rms_norm_silu(X, 1.0),
    "out must be a tensor or None": lambda: df.rms_norm_silu(X, out=[0.0]),
}


@pytest.mark.parametrize("message", VALUE_ERRORS)
def test_wrong_values_are_named(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VALUE_ERRORS[message]()


@pytest.mark.parametrize("message", TYPE_ERRORS)
def test_wrong_types_are_named(message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TYPE_ERRORS[message]()


def test_out_is_refused_where_a_gradient_is_needed(backend: str) -> None:
    with pytest.raises(RuntimeError, match="out= is for calls without gradients"):
        df.rms_norm_silu(X.clone().requires_grad_(), out=torch.empty_like(X))
