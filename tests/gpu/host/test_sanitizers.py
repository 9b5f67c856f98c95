"""The CUDA kernels as C++ of the host under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The cases and tolerances are those of the tests that run the kernels' PTX, which a plugin points at the host's library.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu.cuda_library import ROOT
from tests.gpu.host import library, plugin

pytestmark = pytest.mark.slow

# The tests of each op's results; the others look into the PTX.
RESULTS = {
    "test_cuda_random.py": "test_is_the_references_noise or test_loops",
    "test_cuda_noising.py": "test_is_the_references or test_loops",
    "test_cuda_denoise.py": "test_is_the_references_step or test_loops",
    "test_cuda_quantile.py": "test_is_the_references_quantile or test_loops",
    "test_cuda_norm_act.py": "test_values_and_gradients or test_out_and_in_place",
    "test_cuda_rms_norm_act.py": "test_values_and_gradients",
}

# (bug of bugs.cu, sanitizer, what it says); the last is none.
BUGS = [
    (0, "thread", "ThreadSanitizer: data race"),
    (1, "thread", "ThreadSanitizer: data race"),
    (2, "address", "AddressSanitizer: heap-buffer-overflow"),
    (3, "address", "AddressSanitizer: heap-buffer-overflow"),
    (4, "address", "misaligned address"),
]
BUG_IDS = ["no barrier", "two writers", "beyond the end", "beyond shared memory", "misaligned"]
NO_BUG = 5

LAUNCH = """
import sys
from pathlib import Path

import torch

from tests.gpu.host.library import HostLibrary
from tests.gpu.ptx.devices import DEVICES

library = HostLibrary(Path(sys.argv[1]))
library.configure(DEVICES[90], library.run)
library.launch_bug(int(sys.argv[2]), torch.zeros(64))
print("launched")
"""


def python(sanitizer: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*library.fixed_addresses(), sys.executable, *arguments],
        cwd=ROOT,
        env={**library.environment(sanitizer), **variables},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.parametrize("sanitizer", library.SANITIZERS)
@pytest.mark.parametrize("file", RESULTS)
def test_the_kernels_give_right_results_and_no_report(file: str, sanitizer: str) -> None:
    command = ["-m", "pytest", "-p", "tests.gpu.host.plugin", "-p", "no:cacheprovider", "-p", "no:faulthandler", "-s"]
    selection = [f"tests/gpu/{file}", "-k", RESULTS[file]]
    done = python(sanitizer, *command, *selection, **{plugin.LIBRARY: str(library.extension(sanitizer))})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def launch_bug(bug: int, sanitizer: str) -> subprocess.CompletedProcess[str]:
    path = library.build(library.FOLDER / "bugs", (), sanitizer)
    return python(sanitizer, "-c", LAUNCH, str(path), str(bug))


@pytest.mark.parametrize(("bug", "sanitizer", "report"), BUGS, ids=BUG_IDS)
def test_a_planted_bug_is_found(bug: int, sanitizer: str, report: str) -> None:
    done = launch_bug(bug, sanitizer)
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.parametrize("sanitizer", library.SANITIZERS)
def test_a_right_kernel_is_not_reported(sanitizer: str) -> None:
    done = launch_bug(NO_BUG, sanitizer)
    assert done.stdout == "launched\n", done.stderr
