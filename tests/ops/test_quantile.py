"""The quantile of magnitudes: torch.quantile's, on every backend the same bits, and without its limit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ddpm_fast as df
from ddpm_fast.backends.reference.quantile import rank_of
from ddpm_fast.ops import abs_quantile
from ddpm_fast.ops.quantile import ABS_QUANTILE

from .common import SHAPES_AND_LAYOUTS, bits_of_torchs_quantile, laid_out, same_bits, shape_and_layout_id

QUANTILES = [0.0, 0.1, 0.5, 0.95, 0.995, 0.9999, 1.0]


@bits_of_torchs_quantile
@pytest.mark.parametrize("case", SHAPES_AND_LAYOUTS, ids=shape_and_layout_id)
def test_is_torchs_quantile(backend: str, case: tuple[tuple[int, ...], str]) -> None:
    x = laid_out(torch.randn(case[0]), case[1])
    for q in QUANTILES:
        got, expected = abs_quantile(x, q), torch.quantile(x.flatten(1).abs(), q, dim=1)
        assert got.shape == (x.shape[0],)
        # The rank is torch's to the bit. torch.lerp may fuse its multiplication and addition: one rounding more here.
        torch.testing.assert_close(got, expected, rtol=2.0**-23, atol=0)
        with df.use_backend("reference"):
            assert same_bits(got, abs_quantile(x, q))


@pytest.mark.parametrize("q", QUANTILES)
def test_is_the_exact_quantile_but_for_the_rounding_of_its_rank(backend: str, q: float) -> None:
    x = torch.randn(3, 3 * 32 * 32)
    exact = torch.quantile(x.double().abs(), q, dim=1)
    gaps = x.double().abs().sort(dim=1).values.diff(dim=1).amax(dim=1)
    # The rank and q are float32, and the value is.
    assert ((abs_quantile(x, q) - exact).abs() <= 2.0**-22 * x.shape[1] * gaps + 2.0**-22 * exact).all()


@pytest.mark.parametrize("q", QUANTILES)
def test_float64_is_the_references(q: float) -> None:
    x = torch.randn(3, 1001, dtype=torch.float64)
    expected = torch.quantile(x.abs(), q, dim=1)
    torch.testing.assert_close(abs_quantile(x, q), expected, rtol=2.0**-52, atol=0)


@bits_of_torchs_quantile
@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=40),
    q=st.floats(0.0, 1.0),
)
def test_any_values_are_torchs(values: list[float], q: float) -> None:
    x = torch.tensor([values, values[::-1]], dtype=torch.float32)
    got, expected = abs_quantile(x, q), torch.quantile(x.abs(), q, dim=1)
    # Subnormal differences lose their last bit in torch's fused lerp, too.
    torch.testing.assert_close(got, expected, rtol=2.0**-22, atol=2.0**-149, equal_nan=True)
    with df.use_backend("reference"):
        assert torch.equal(got.nan_to_num(-1.0), abs_quantile(x, q).nan_to_num(-1.0))


def test_samples_may_be_larger_than_torchs_limit(backend: str) -> None:
    size = (1 << 24) + 3
    x = torch.arange(size, dtype=torch.float32).div_(size).neg_().unsqueeze(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(x, 0.5, dim=1)
    assert abs_quantile(x, 0.25).item() == pytest.approx(0.25, rel=2.0**-23)


def test_the_rank_is_computed_in_the_values_dtype() -> None:
    assert rank_of(0.995, 3073, torch.float32) == (3056, 0.64013671875)
    below, weight = rank_of(0.995, 3073, torch.float64)
    assert below == 3056
    assert weight == pytest.approx(0.64, abs=1e-9)
    assert rank_of(1.0, 1 << 25, torch.float32) == ((1 << 25) - 1, 0.0)


def test_a_nan_is_the_result_of_its_sample_alone(backend: str) -> None:
    x = torch.randn(3, 3, 8, 8)
    x[1, 2, 3, 4] = math.nan
    assert abs_quantile(x, 0.9).isnan().tolist() == [False, True, False]


def test_other_layouts_and_no_samples(backend: str) -> None:
    x = torch.randn(3, 4, 6, 5)
    assert same_bits(abs_quantile(x.transpose(1, 2), 0.7), abs_quantile(x, 0.7))
    assert same_bits(abs_quantile(x[:, :2], 0.7), abs_quantile(x[:, :2].contiguous(), 0.7))
    assert abs_quantile(torch.empty(0, 3), 0.5).shape == (0,)


def test_one_and_two_threads_give_the_same() -> None:
    x = torch.randn(7, 5000)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(abs_quantile(x, 0.9))
    assert same_bits(*results)


def test_gradients_are_those_of_torchs_quantile() -> None:
    x = torch.randn(3, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: abs_quantile(x, 0.85), x)
    (got,) = torch.autograd.grad(abs_quantile(x, 0.85).sum(), x)
    (expected,) = torch.autograd.grad(torch.quantile(x.abs(), 0.85, dim=1).sum(), x)
    torch.testing.assert_close(got, expected)


def test_opcheck(backend: str) -> None:
    torch.library.opcheck(ABS_QUANTILE[backend], (torch.randn(2, 3, 4), 0.9, torch.empty(2)))


def test_compiles_in_one_graph(backend: str) -> None:
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(lambda x: abs_quantile(x, 0.9) * 2, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x), abs_quantile(x, 0.9) * 2)


@pytest.mark.parametrize(
    ("x", "q", "error", "message"),
    [
        (torch.ones(2, 3).half(), 0.5, ValueError, "x must be float32 or float64, not torch.float16"),
        (torch.ones(3), 0.5, ValueError, r"x must be \(N, \*\) with at least one element a sample"),
        (torch.ones(3, 0), 0.5, ValueError, r"x must be \(N, \*\) with at least one element a sample"),
        (torch.ones(2, 3), 1.5, ValueError, r"q must lie in \[0, 1\], not 1.5"),
        (torch.ones(2, 3), math.nan, ValueError, r"q must lie in \[0, 1\], not nan"),
        (torch.ones(2, 3), "0.5", TypeError, "q must be a real number, not str"),
        (torch.ones(2, 3), True, TypeError, "q must be a real number, not bool"),
    ],
    ids=["dtype", "1-D", "empty samples", "q above 1", "q NaN", "q a string", "q a bool"],
)
def test_errors(x: torch.Tensor, q: float, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        abs_quantile(x, q)
