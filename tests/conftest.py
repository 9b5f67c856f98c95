"""What the tests share: every test of an op runs on every backend that is available."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ddpm_fast as df


@pytest.fixture(params=df.available_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with df.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same seed and number of threads, whatever ran before it."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
