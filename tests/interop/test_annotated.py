"""The article's schedules, to the bit."""

from __future__ import annotations

import pytest
import torch

from ddpm_fast.interop.annotated import schedule
from tests.originals import annotated


@pytest.mark.parametrize("timesteps", [200, 300, 1000])
@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid"])
def test_schedules_are_bit_equal(name, timesteps):
    assert torch.equal(schedule(name, timesteps).betas.float(), annotated.betas(name, timesteps))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("cos", 10), ValueError, "name must be one of linear, cosine, quadratic, sigmoid, got 'cos'"),
        (("linear", 1.5), TypeError, "timesteps must be an int, got float"),
        (("linear", 0), ValueError, "timesteps must be at least 1, got 0"),
    ],
    ids=str,
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        schedule(*arguments)
