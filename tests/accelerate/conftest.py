"""What the tests of accelerate share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ddpm_fast as df
from ddpm_fast.accelerate import norms


@pytest.fixture(autouse=True)
def _on_a_backend() -> Iterator[None]:
    """By name: without the extension accelerated models would run as before."""
    with df.use_backend("cpu"):
        yield


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of the fused op took in, in order: "norm", "norm+silu", "embedding+norm+modulation+silu" ..."""
    seen: list[str] = []
    op = norms.group_norm_silu

    def spy(x, num_groups, weight, bias, eps, *, scale, shift, activation, embedding):
        modulated = scale is not None or shift is not None
        parts = ["embedding"] * (embedding is not None) + ["norm"] + ["modulation"] * modulated
        seen.append("+".join([*parts, *["silu"] * (activation is not None)]))
        return op(
            x, num_groups, weight, bias, eps, scale=scale, shift=shift, activation=activation, embedding=embedding
        )

    monkeypatch.setattr(norms, "group_norm_silu", spy)
    return seen
