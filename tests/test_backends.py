"""Which backend a call uses."""

from __future__ import annotations

import contextlib

import pytest
import torch

import ddpm_fast as df
from ddpm_fast import backends


def test_the_extension_is_there() -> None:
    assert df.available_backends() == ["reference", "cpu"]
    assert backends.missing["cpu"] is None


def test_the_best_backend_is_chosen_and_float64_is_the_references() -> None:
    assert backends.choose(torch.empty(1)) == "cpu"
    assert backends.choose(torch.empty(1, dtype=torch.bfloat16)) == "cpu"
    assert backends.choose(torch.empty(1, dtype=torch.float64)) == "reference"
    assert backends.choose(torch.empty(1, device="meta")) == "reference"


def test_use_backend_nests_and_restores_after_an_error() -> None:
    with df.use_backend("reference"):
        with contextlib.suppress(RuntimeError), df.use_backend("cpu"):
            assert backends.choose(torch.empty(1)) == "cpu"
            raise RuntimeError("inside")
        assert backends.choose(torch.empty(1)) == "reference"
    assert backends.choose(torch.empty(1)) == "cpu"


def test_an_unknown_backend_is_named() -> None:
    with (
        pytest.raises(ValueError, match="'nonsense' is not available; available are"),
        df.use_backend("nonsense"),
    ):
        pass


def test_a_forced_backend_refuses_what_it_does_not_take() -> None:
    with df.use_backend("cpu"), pytest.raises(ValueError, match="takes float32, float16 and bfloat16"):
        df.randn((1, 4), dtype=torch.float64)
