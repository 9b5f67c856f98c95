"""The terms of the variational bound, and their gradient, against openai's formulas in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from benchmarks.common import LAYOUTS, laid_out, shape_id
from benchmarks.harness import Case
from ddpm_fast.ops import bound_terms
from ddpm_fast.training.tables import bound_coefficients
from tests.originals.bound import Bound

SCHEDULE = df.NoiseSchedule.linear(1000)
SHAPES = [(16, 3, 32, 32), (64, 1, 28, 28), (4, 3, 256, 256)]
CLIP = (-1.0, 1.0)


class Inputs(NamedTuple):
    x0: Tensor
    x_t: Tensor
    output: Tensor
    t: Tensor


Terms = Callable[[Inputs], Tensor]
Measure = Callable[[Case], None]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


class EagerBound(Bound):
    """The formulas in float32: as in openai's code, a table's values become float32 where they are looked up."""

    def read(self, table: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return table[t].float().reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)


def openais(bound: Bound) -> Terms:
    return lambda given: bound.vb_terms_bpd(given.output, given.x0, given.x_t, given.t, CLIP).output


def ours(variance: str) -> Terms:
    coefficients = bound_coefficients(SCHEDULE, "epsilon", variance, torch.float32, torch.device("cpu"))
    kind = "fixed" if variance == "fixed_small" else variance

    def terms(given: Inputs) -> Tensor:
        return bound_terms(given.x0, given.x_t, given.output, given.t, coefficients, variance=kind, clip=CLIP)[0]

    return terms


def drawn(shape: tuple[int, ...], variance: str, *, decoding: bool = False) -> Inputs:
    """8-bit images and an output that is off by a tenth, above timestep 0 or at it, where the term is the decoder's."""
    x0 = torch.randint(0, 256, shape).float() / 127.5 - 1
    t = torch.zeros(shape[0], dtype=torch.int64) if decoding else torch.randint(1, 1000, shape[:1])
    x_t, noise = df.q_sample(x0, t, SCHEDULE, seed=3)
    output = noise + 0.1 * torch.randn(shape)
    if variance == "learned_range":
        output = torch.cat([output, torch.rand(shape) * 2 - 1], dim=1)
    return Inputs(x0, x_t, output, t)


def prepared(given: Inputs, *, layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Inputs:
    x0, x_t, output = (laid_out(image.to(dtype), layout) for image in given[:3])
    return Inputs(x0, x_t, output.detach().requires_grad_(), given.t)


def terms_alone(terms: Terms, given: Inputs) -> Tensor:
    return terms(given)


def gradient(terms: Terms, given: Inputs) -> Tensor:
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(terms(given).mean(), given.output)
    return grad


def largest_relative(got: Tensor, exact: Tensor) -> float:
    """Over the samples, each by its norm."""
    got, exact = (tensor.detach().double().reshape(len(tensor), -1) for tensor in (got, exact))
    return float(((got - exact).norm(dim=1) / exact.norm(dim=1)).max())


def check(variance: str, inputs: Inputs, layout: str) -> float:
    """The largest relative error of a term against float64; it and a gradient's are held to those of eager float32.

    The quarter is for the decoder, where both have the error of a mean that was rounded to float32.
    """
    exact, eager = (openais(kind(SCHEDULE, "epsilon", variance)) for kind in (Bound, EagerBound))
    given, wide = prepared(inputs, layout=layout), prepared(inputs, dtype=torch.float64)
    errors = []
    for run in (terms_alone, gradient):
        expected = run(exact, wide)
        error, allowed = (largest_relative(run(terms, given), expected) for terms in (ours(variance), eager))
        assert error <= 1.25 * allowed, f"{run.__name__}: relative error {error:.2e}, eager's is {allowed:.2e}"
        errors.append(error)
    return errors[0]


def case(
    what: str, inputs: Inputs, variance: str, layout: str, run: Callable[[Terms, Inputs], Tensor], *, grad: bool = False
) -> Case:
    eager, given = openais(EagerBound(SCHEDULE, "epsilon", variance)), prepared(inputs, layout=layout)
    copy = torch.empty_like(given.x_t)
    return Case(
        what=what,
        shape=tuple(inputs.x0.shape),
        layout=layout,
        note=variance,
        ours=partial(run, ours(variance), given),
        peers={f"eager {name}": partial(run, eager, prepared(inputs, layout=name)) for name in LAYOUTS},
        floors={"copy_": lambda: copy.copy_(given.x_t)},
        check=lambda: check(variance, inputs, layout),
        grad=grad,
    )


@layouts
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@shapes
def test_divergence(measure: Measure, shape: tuple[int, ...], variance: str, layout: str) -> None:
    inputs = drawn(shape, variance)
    measure(case("bound, divergence", inputs, variance, layout, terms_alone))


@layouts
@shapes
def test_divergence_and_gradient(measure: Measure, shape: tuple[int, ...], layout: str) -> None:
    inputs = drawn(shape, "learned_range")
    measure(case("bound, divergence and gradient", inputs, "learned_range", layout, gradient, grad=True))


@shapes
def test_decoder(measure: Measure, shape: tuple[int, ...]) -> None:
    inputs = drawn(shape, "fixed_small", decoding=True)
    measure(case("bound, decoder", inputs, "fixed_small", "contiguous", terms_alone))
