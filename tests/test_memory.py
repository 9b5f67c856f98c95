import os
import platform
import resource
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import _memory

LARGE = 24 << 20  # elements: above the thresholds that malloc ever moves to by itself


def page_faults(times: int) -> int:
    """Page faults of filling a large tensor again and again, each time a new one."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(LARGE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture
def _untuned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("this C library has no mallopt")
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    _memory._mallopt.cache_clear()
    yield
    _memory._mallopt.cache_clear()


@pytest.mark.usefixtures("_untuned")
def test_freed_memory_is_used_again() -> None:
    page_faults(2)  # from here on malloc's own thresholds are where they stay
    outside = page_faults(4)
    with _memory.kept_memory():
        page_faults(2)
        with _memory.kept_memory():
            pass
        inside = page_faults(4)
    after = page_faults(4)
    assert inside < outside / 10, (outside, inside)
    assert inside < after / 10, (inside, after)


@pytest.mark.usefixtures("_untuned")
def test_what_the_environment_tunes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    _memory._mallopt.cache_clear()
    page_faults(2)
    with _memory.kept_memory():
        page_faults(2)
        inside = page_faults(4)
    assert inside > 4


def test_a_run_keeps_memory_for_its_length_only() -> None:
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(_memory._users)
        if len(seen) == 4:
            raise ArithmeticError
        return x

    sampler = df.Sampler(model, df.NoiseSchedule.linear(1000), steps=3)
    sampler.sample((1, 1, 2, 2), seed=0)
    assert seen == [1, 1, 1]
    assert _memory._users == 0
    with pytest.raises(ArithmeticError):
        sampler.sample((1, 1, 2, 2), seed=0)
    assert seen[-1] == 1
    assert _memory._users == 0
