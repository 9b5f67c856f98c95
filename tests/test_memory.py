import os
import platform
import subprocess
import sys

import pytest
from torch import Tensor

import ddpm_fast as df
from ddpm_fast import _memory

# Page faults of filling a large tensor four times, each time a new one, before and while memory is kept; and of one
# larger than all that was kept, afterwards. In a process of its own: malloc's state is the process's.
# glibc asks for an aligned block with some bytes to spare, so a freed one may be too small for the next of its size:
# the first ones in a process lie side by side (up to nine were seen) before two of them make room for all that follow.
SCRIPT = """
import resource, torch
from ddpm_fast._memory import kept_memory

LARGE = 9 << 20  # elements: above the thresholds that malloc ever moves to by itself

def page_faults(elements=LARGE):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(elements)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

page_faults()
print(page_faults())
with kept_memory():
    for _ in range(5):
        page_faults()
    with kept_memory():
        pass
    print(page_faults())
print(page_faults(24 * LARGE) // 24)
"""


def page_faults(**variables: str) -> list[int]:
    tuning = ("MALLOC_", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(tuning)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | variables, capture_output=True, text=True, check=True
    )
    return [int(line) for line in done.stdout.split()]


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library has no mallopt")


@glibc
def test_freed_memory_is_used_again() -> None:
    before, inside, after = page_faults()
    assert inside < before / 10
    assert after > before / 2


@glibc
def test_what_the_environment_tunes_is_left_alone() -> None:
    before, inside, _ = page_faults(MALLOC_ARENA_MAX="2")
    assert inside > before / 2


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
