"""``ddpm-fast doctor``: what is installed, and whether every op computes what it should on every backend."""

from __future__ import annotations

import os
import platform

import numpy
import torch

import ddpm_fast
from ddpm_fast import backends, selftest
from ddpm_fast.ops.conv import cpu_isa


def versions() -> list[tuple[str, str]]:
    """Names and values for the report's first part."""
    return [
        ("ddpm_fast", ddpm_fast.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", str(torch.__version__)),
        ("numpy", numpy.__version__),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
    ]


_INSTALL = {
    "cpu": "install a C++17 compiler (Debian: g++) and reinstall ddpm_fast",
    "triton": "it needs a GPU, a torch built with CUDA, and the package triton",
    "cuda": "it needs a GPU, a torch built with CUDA, and ddpm_fast installed where nvcc is on the path",
}


def backend_states() -> list[tuple[str, str]]:
    """Every backend: how it runs, or why it does not."""
    kernels = {"reference": "plain PyTorch, the specification", "cpu": f"C++ kernels for {cpu_isa()}"}
    states = []
    for name, reason in backends.missing.items():
        if reason is None:
            states.append((name, f"available: {kernels.get(name) or torch.cuda.get_device_name()}"))
        else:
            states.append((name, f"missing: {reason}; {_INSTALL[name]}"))
    return states


def self_test() -> dict[str, list[selftest.Result]]:
    """What every op gives on every available backend."""
    found = {}
    for backend in backends.available_backends():
        with backends.use_backend(backend):
            found[backend] = selftest.results(backend, _device_of(backend))
    return found


def failures(results: dict[str, list[selftest.Result]]) -> list[str]:
    """What failed, on which backend."""
    return [f"{r.op} on {backend}" for backend, found in results.items() for r in found if not r.passed]


def report(results: dict[str, list[selftest.Result]]) -> str:
    """The versions, the backends and the self-test's table."""
    lines = [f"{name:<11}{value}" for name, value in versions()]
    lines += ["", "backends"]
    lines += [f"  {name:<11}{state}" for name, state in backend_states()]
    lines += ["", f"{'self-test':<25}{'backend':<11}{'error':>9}{'allowed':>9}"]
    for backend, found in results.items():
        for result in found:
            verdict = "ok" if result.passed else f"FAILED {result.problem}".rstrip()
            lines.append(f"  {result.op:<23}{backend:<11}{result.error:>9.1e}{result.allowed:>9.0e}  {verdict}")
    return "\n".join(lines)


def _device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend in ("triton", "cuda") else "cpu")
