"""The Triton kernels in Triton's own interpreter."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_interpreter_agrees_with_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.triton_interpreter"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "all agree"
