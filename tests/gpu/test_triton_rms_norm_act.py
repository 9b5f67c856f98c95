"""Triton's RMSNorm and SiLU, executed from their PTX: values and all gradients against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast.backends.triton import _layout, rms_norm_act
from ddpm_fast.ops.rms_norm_act import RMS_NORM_ACT, RMS_NORM_ACT_BACKWARD
from tests.gpu import gates, simulate
from tests.gpu.triton_runs import (
    ARCHITECTURES,
    assert_close_beside_extremes,
    assert_rounded_once,
    blank,
    moved,
    under_every_schedule,
    with_extremes,
)
from tests.ops.common import same_bits, shape_id
from tests.ops.norms import assert_close, laid_out
from tests.ops.test_rms_norm_act import NAMES, exact, parameters, plain

EPS = 4.0  # above the norms of one pixel in five


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    names: tuple[str, ...] = NAMES
    activation: int = 1
    offset: int = 0

    def __str__(self) -> str:
        parts = [shape_id(self.shape), self.layout, str(self.dtype)[6:], *["silu"] * self.activation, *self.names]
        return "-".join([*parts, *["misaligned"] * self.offset])

    def inputs(self) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.randn(self.shape) * 2 + 1
        x[..., ::5] *= 0.1
        given = parameters(self.shape, self.dtype, self.names)
        if "shift" in given and self.dtype == torch.float32:
            given["shift"] = with_extremes(given["shift"])
        return moved(laid_out(x, self.layout).to(self.dtype), self.offset), given


# Several tiles of pixels and several steps of a program; no power of two of channels; more than 256 samples.
CASES = [
    Case((2, 70, 16, 20), "contiguous", torch.bfloat16),
    Case((2, 250, 17, 9), "channels_last", torch.float32, offset=1),
]
MORE = [
    Case((300, 8, 3, 3), "contiguous", torch.float32, ("weight",)),
    Case((3, 48), "contiguous", torch.float16, activation=0),
    Case((2, 6, 33), "channels_last", torch.bfloat16, ("scale", "shift")),
    Case((1, 20, 2, 13, 5), "channels_last", torch.float16, ()),
    Case((1, 1100, 3, 3), "contiguous", torch.float32),
]


def forward(case: Case, target: int) -> None:
    x, given = case.inputs()
    places = [given.get(name) for name in NAMES]

    def run() -> tuple[Tensor, ...]:
        out, rrms = blank(x, offset=case.offset), torch.full((x.shape[0], x[0, 0].numel()), torch.nan)
        RMS_NORM_ACT["triton"](x, *places, EPS, case.activation, out, rrms)
        return out, rrms

    out, rrms = under_every_schedule(run, target)
    truth = exact(x, **given, eps=EPS, activation="silu" if case.activation else None)
    assert_close_beside_extremes(out, truth)
    assert_rounded_once(out, truth)
    expected = torch.empty(rrms.shape, dtype=torch.float64)
    RMS_NORM_ACT["reference"](x, *places, EPS, case.activation, torch.empty_like(x), expected)
    torch.testing.assert_close(rrms.double(), expected, rtol=5e-7, atol=0)


def backward(case: Case, target: int) -> None:
    x, given = case.inputs()
    places, names = [given.get(name) for name in NAMES], ("x", *case.names)
    rrms, grad = torch.empty(x.shape[0], x[0, 0].numel()), laid_out(torch.randn(x.shape), case.layout).to(x.dtype)
    RMS_NORM_ACT["reference"](x, *places, EPS, case.activation, torch.empty_like(x), rrms)

    def run() -> tuple[Tensor, ...]:
        gradients = {"x": blank(x, offset=case.offset)}
        gradients |= {name: torch.full(given[name].shape, torch.nan) for name in case.names}
        wanted = [gradients.get(name) for name in ("x", *NAMES)]
        RMS_NORM_ACT_BACKWARD["triton"](grad, x, rrms, *places, EPS, case.activation, *wanted)
        return tuple(gradients.values())

    got = under_every_schedule(run, target)
    leaves = {name: value.double().requires_grad_() for name, value in {"x": x, **given}.items()}
    y = plain(leaves["x"], **{name: leaves[name] for name in case.names}, eps=EPS,
              activation="silu" if case.activation else None)  # fmt: skip
    expected = torch.autograd.grad(y, [leaves[name] for name in names], grad.double())
    for name, ours, theirs in zip(names, got, expected, strict=True):
        # As for GroupNorm: a parameter's gradient is a sum of terms that may come to little.
        terms = 0 if name == "x" else expected[0].numel() // theirs.numel()
        allowed = 1e-5 * theirs.abs().max() + terms * 3e-8 + theirs.abs() * torch.finfo(ours.dtype).eps / 2
        assert bool(((ours.double() - theirs).abs() <= allowed).all()), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_float64_rounded_once(case: Case) -> None:
    forward(case, target=90)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_float64(case: Case) -> None:
    backward(case, target=90)


@pytest.mark.parametrize("target", [80, 120])
def test_other_architectures(target: int) -> None:
    forward(CASES[1], target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_case_on_every_architecture(target: int, case: Case) -> None:
    forward(case, target)
    backward(case, target)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_64_bit_offsets_change_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layout, "_INT32_ELEMENTS", 1)
    forward(case, target=90)
    backward(case, target=90)


def test_pixels_below_eps_are_scaled_by_a_constant() -> None:
    x = torch.randn(2, 16, 4, 4)
    x[:, :, 1:] *= 1e-6
    x.requires_grad_()
    with simulate.backend("triton"):
        y = df.rms_norm_silu(x, eps=1e-3)
        (got,) = torch.autograd.grad(y.square().sum(), x)
    assert_close(y.detach(), exact(x.detach(), eps=1e-3))
    leaf = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(leaf, eps=1e-3).square().sum(), leaf)
    assert_close(got, expected, relative=1e-5)


@pytest.mark.parametrize("approx", [1, -1], ids=["above", "below"])
def test_approximate_instructions_may_err_as_documented(approx: int) -> None:
    x, given = CASES[0].inputs()
    with simulate.backend("triton", approx=approx):
        y = df.rms_norm_silu(x, **given)
    assert_close(y, exact(x, **given))


def test_a_sample_alone_has_the_bits_it_has_in_a_batch() -> None:
    x = torch.randn(5, 16, 6, 6)
    with simulate.backend("triton"):
        assert same_bits(df.rms_norm_silu(x)[3:4], df.rms_norm_silu(x[3:4]))


def test_x_is_read_once() -> None:
    x, weight = torch.randn(2, 32, 16, 16), torch.randn(32)
    with simulate.backend("triton") as launches:
        y = df.rms_norm_silu(x, weight)
    assert_close(y, exact(x, weight=weight))
    gates.assert_traffic(launches[0].stats, x.nbytes, x.nbytes, extra=x.nbytes)


def test_without_samples_the_parameters_gradients_are_zero() -> None:
    x, weight = torch.empty(0, 8, 4, 4, requires_grad=True), torch.randn(8, requires_grad=True)
    with simulate.backend("triton") as launches:
        df.rms_norm_silu(x, weight).sum().backward()
    assert not launches
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros(8))


def test_the_plan_covers_a_sample() -> None:
    for channels, pixels in ((1, 1), (70, 320), (131, 153), (1100, 9), (64, 65536)):
        for summed in (False, True):
            tile = rms_norm_act.columns_of(channels, pixels, channels_last=False, itemsize=2, summed=summed)
            assert tile.rows >= channels
            assert tile.steps == 1 or summed
            assert 1 <= tile.num_warps <= 16
