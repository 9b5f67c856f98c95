"""The Frechet distance against closed forms and against the textbook formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from ddpm_fast.evaluation import frechet_distance


def gaussian(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 5), (1000, 50, 30), (40, 60, 30)])
def test_textbook_formula(n: int, m: int, d: int) -> None:
    a, b = gaussian(n, d, 0), gaussian(m, d, 1) + 0.5
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(cov_a + cov_b - 2 * root)
    # sqrtm of a product of covariances with a condition number of up to 1e6 keeps about 9 digits.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_equal_sets_have_no_distance() -> None:
    a = gaussian(500, 20, 0)
    # Squares of rounding errors of the covariance's root, whose norm is about 20.
    assert 0 <= frechet_distance(a, a) < 1e-24
    assert 0 <= frechet_distance(a, a[torch.randperm(500)]) < 1e-24


def test_shift_and_scale() -> None:
    a = gaussian(400, 6, 0)
    assert frechet_distance(a, a + 3.0) == pytest.approx(6 * 9.0, rel=1e-12)
    centred = a - a.mean(0)
    variance = centred.square().sum().item() / 399
    assert frechet_distance(centred, 1.001 * centred) == pytest.approx(1e-6 * variance, rel=1e-9)


def test_large_mean_costs_no_accuracy() -> None:
    a, b = gaussian(400, 6, 0), gaussian(400, 6, 1)
    # Adding 1e6 rounds the features to 1e-10.
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-7)


def test_singular_covariances() -> None:
    """Features that are always zero, and fewer rows than features."""
    a, b = gaussian(300, 4, 0), gaussian(300, 4, 1)
    padded = [torch.nn.functional.pad(x, (3, 2)) for x in (a, b)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    few = gaussian(3, 10, 2)
    assert 0 <= frechet_distance(few, few) < 1e-24
    # A point mass: the distance is the other set's variance and the difference of the means.
    point = torch.zeros(2, 4, dtype=torch.float64)
    assert frechet_distance(a, point) == pytest.approx((a.var(0).sum() + a.mean(0).square().sum()).item(), rel=1e-12)


def test_symmetric() -> None:
    a, b = gaussian(100, 8, 0), gaussian(200, 8, 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), "a must hold"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "b must hold"),
        (torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2), "a must hold"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "same number of features, got 2 and 3"),
        (torch.zeros(5, 2), torch.full((5, 2), float("nan")), "b holds values that are not finite"),
    ],
    ids=["vector", "one-row", "integers", "features", "nan"],
)
def test_rejects(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)
