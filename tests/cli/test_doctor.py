"""`ddpm-fast doctor`: it reports what is there, and it notices an op that computes something else."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ddpm_fast as df
from ddpm_fast import backends, selftest

from .conftest import Outcome

Cli = Callable[..., Outcome]


def test_a_sound_installation_passes(cli: Cli) -> None:
    done = cli("doctor")
    assert (done.status, done.err) == (0, "")
    for version in (df.__version__, platform.python_version(), torch.__version__):
        assert version in done.out
    rows = [line.split() for line in done.out.split("allowed\n")[1].splitlines()]
    assert all(row[-1] == "ok" for row in rows)
    for backend in df.available_backends():
        for op in ("random", "noising", "denoise", "target_loss", "bound", "norm_act", "rms_norm_act", "conv"):
            assert any(row[0] == op and backend in row for row in rows)


def off_by(amount: float, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments, **options: function(*arguments, **options) + amount


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("randn", "random"),
        ("denoise", "denoise learned"),
        ("group_norm_silu", "norm_act"),
        ("target_loss", "target_loss"),
        ("conv3x3", "conv"),
        ("linear_attention", "linear_attention"),
        ("projected_linear_attention", "projected_linear_attention"),
    ],
)
def test_an_op_that_is_a_little_wrong_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch, name: str, test: str) -> None:
    monkeypatch.setattr(selftest, name, off_by(1e-4, getattr(selftest, name)))
    done = cli("doctor")
    assert done.status == 1
    assert "FAILED" in done.out
    assert done.err.startswith("ddpm-fast: the self-test failed: ")
    assert f"{test} on cpu" in done.err
    assert done.err.count("\n") == 1


def test_results_that_are_no_numbers_fail(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "group_norm_silu", off_by(float("nan"), selftest.group_norm_silu))
    assert cli("doctor").status == 1


def test_an_op_that_raises_is_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(selftest, "q_sample", broken)
    done = cli("doctor")
    assert done.status == 1
    assert "FAILED no such kernel" in done.out
    assert "noising on reference" in done.err


def test_a_missing_backend_is_explained(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.missing, "cpu", "No module named 'ddpm_fast._C'")
    done = cli("doctor")
    assert done.status == 0  # it is slower, and computes what it should
    assert "cpu        missing: No module named 'ddpm_fast._C'; install a C++17 compiler" in done.out
    assert " cpu " not in done.out.split("allowed\n")[1]


def test_the_instruction_set_is_shown() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_fast", "doctor"],
        env={**os.environ, "DDPM_FAST_CPU_ISA": "generic"},
        cwd=Path(df.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "C++ kernels for generic" in done.stdout
