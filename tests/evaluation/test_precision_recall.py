"""Precision and recall: cases whose answer is known, and the definition written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ddpm_fast.evaluation import precision_recall


def normal(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_sets_are_precise_and_complete():
    a = normal(100, 5, 0)
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a + 1e6, a[torch.randperm(100)] + 1e6) == (1.0, 1.0)  # a distance of zero is zero


def test_sets_far_apart_are_neither():
    assert precision_recall(normal(100, 5, 0), normal(100, 5, 1) + 100) == (0.0, 0.0)


def test_a_lost_mode_costs_recall_alone():
    real = torch.cat([normal(200, 2, 0), normal(200, 2, 1) + 50])
    generated = torch.cat([real[:200:2], real[:200:2]]) + 1e-3
    precision, recall = precision_recall(generated, real)
    assert precision == 1.0
    assert recall < 0.5


def test_an_invented_mode_costs_precision_alone():
    real = normal(200, 2, 0)
    generated = torch.cat([real + 1e-3, real[:100] + 50])
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(2 / 3)
    assert recall == 1.0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_definition_written_out(k):
    """More rows than a block holds."""
    generated, real = 1.1 * normal(1203, 3, 0) + 0.3, normal(1101, 3, 1)

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = torch.stack([(centres - c).norm(dim=1).sort().values[k] for c in centres])
        return sum(bool(((centres - p).norm(dim=1) <= radii).any()) for p in points) / len(points)

    expected = (covered(generated, real), covered(real, generated))
    assert 0.5 < expected[0] < 1.0
    assert precision_recall(generated, real, k=k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(real, generated, k=k) == pytest.approx(expected[::-1], abs=1e-12)


@pytest.mark.parametrize(
    ("generated", "real", "k", "error", "message"),
    [
        (torch.zeros(5), torch.zeros(5, 2), 3, ValueError, "generated must hold"),
        (torch.zeros(5, 2), torch.zeros(3, 2), 3, ValueError, "real must hold more than k = 3"),
        (torch.zeros(5, 2).long(), torch.zeros(5, 2), 3, ValueError, "generated must hold"),
        (torch.zeros(5, 2), torch.zeros(5, 3), 3, ValueError, "same number of features, got 2 and 3"),
        (torch.zeros(5, 2), torch.full((5, 2), float("inf")), 3, ValueError, "real holds values that are not finite"),
        (torch.zeros(5, 2), torch.zeros(5, 2), 0, ValueError, "k must be at least 1, got 0"),
        (torch.zeros(5, 2), torch.zeros(5, 2), 1.0, TypeError, "k must be an int, got float"),
    ],
    ids=["vector", "few", "integers", "features", "inf", "k0", "k-float"],
)
def test_rejects(generated, real, k, error, message):
    with pytest.raises(error, match=message):
        precision_recall(generated, real, k=k)
