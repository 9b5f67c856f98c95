"""What can be said about a GPU kernel without running it on a GPU: assertions for the kernels' tests.

Of compiled code (a cubin): spills, registers, access widths. Of PTX: how floats are rounded. Of a run in the simulator
(`simulate.Launch`, with `trace=` for the last two): bytes moved, coalescing, bank conflicts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from tests.gpu.ptx import perf, sass
from tests.gpu.ptx.metrics import metrics


def assert_no_spills(cubin: str | os.PathLike[str], kernels: str = "") -> None:
    """No kernel of a cubin, of those whose names a regular expression finds, uses local memory."""
    found = {name: use for name, use in sass.res(cubin).items() if re.search(kernels, name)}
    assert found, f"no kernel {kernels!r} in {cubin}"
    code = sass.sass(cubin)
    for name, use in found.items():
        spills = sass.summary(code[name]).spills
        assert use["stack"] == use["local"] == spills == 0, f"{name}: {use}, {spills} accesses to local memory"


def assert_occupancy(
    cubin: str | os.PathLike[str],
    architecture: int,
    threads: int,
    least: float,
    kernels: str = "",
    dynamic_shared: int = 0,
) -> None:
    """Registers and shared memory let at least this part of a multiprocessor's threads be resident.

    Args:
        cubin: compiled for the architecture.
        architecture: 90 for sm_90.
        threads, dynamic_shared: of a block, as it is launched.
        least: the occupancy that the launch configuration counts on, 1.0 for all threads.
        kernels: a regular expression.
    """
    for name, use in sass.res(cubin).items():
        if re.search(kernels, name):
            # From sm_90 on ptxas counts the KiB that the driver reserves, which the calculator adds by itself.
            static = max(0, use["shared"] - (1024 if architecture >= 90 else 0))
            reached = perf.occupancy(architecture, use["reg"], threads, static, dynamic_shared)
            assert reached >= least, f"{name}: occupancy {reached:.3f} with {use['reg']} registers, below {least}"


def assert_vector_accesses(code: Sequence[sass.Instruction], loads: bool = True, stores: bool = True) -> None:
    """A kernel has 128-bit accesses to global memory."""
    accesses = sass.summary(list(code)).memory
    for wanted, prefix in ((loads, "LDG"), (stores, "STG")):
        wide = [opcode for opcode in accesses if opcode.startswith(prefix) and ".128" in opcode]
        assert wide or not wanted, f"no 128-bit {prefix}: {accesses}"


def kernel_text(ptx: str, kernel: str) -> str:
    """The text of one kernel of a PTX module, without comments."""
    found = re.search(rf"\.entry\s+{re.escape(kernel)}\b.*?^}}", ptx, re.S | re.M)
    assert found, f"no kernel {kernel} in the PTX"
    return re.sub(r"//[^\n]*", "", found[0])


def assert_rounded_operations(ptx: str) -> None:
    """Every float operation is rounded on its own, to nearest: nothing approximate, flushed, fused or left open.

    PTX lets ptxas fuse a `mul.f32` and an `add.f32`; those with a rounding mode it has to keep.
    """
    code = re.sub(r"//[^\n]*", "", ptx)
    for pattern, why in (
        (r"\S+\.approx\S*", "approximate"),
        (r"\S+\.ftz\S*", "flushes subnormals"),
        (r"\b(?:fma|mad)\.(?!lo|hi|wide)\S+", "fused"),
        (r"\b(?:add|sub|mul|div|sqrt|rcp)(?!\.rn\b)(?:\.\w+)*\.(?:f16|bf16|f32|f64|f16x2|bf16x2)\b", "no rounding"),
        (r"\b(?:ex2|lg2|sin|cos|tanh|rsqrt)\.\S+", "approximate"),
    ):
        found = re.findall(pattern, code)
        assert not found, f"{why}: {sorted(set(found))}"


def assert_traffic(stats: dict[str, int], loaded: int, stored: int, extra: int = 0) -> None:
    """A launch reads and writes global memory once: exactly what it must, beside a few bytes of parameters.

    Args:
        stats: the launch's counters.
        loaded, stored: bytes of the tensors that it must read and write.
        extra: bytes of further loads that are allowed: coefficients, steps, sample numbers, weights.
    """
    assert loaded <= stats["ld_bytes"] <= loaded + extra, f"{stats['ld_bytes']} bytes read, {loaded} needed"
    assert stats["st_bytes"] == stored, f"{stats['st_bytes']} bytes written, {stored} needed"


def assert_coalesced(trace: npt.NDArray[Any], least_bytes: int = 4) -> None:
    """Each load and store of global memory touches no sector that it does not need.

    Loads of one address by a whole warp count as coalesced. Accesses narrower than `least_bytes` are left out.
    """
    accesses = {line: a for line, a in metrics(trace).items() if "global" in a.name and a.size >= least_bytes}
    assert accesses, "the trace holds no global access"
    for line, access in accesses.items():
        assert access.efficiency == 1.0, f"PTX line {line}: {access}"


def assert_no_bank_conflicts(trace: npt.NDArray[Any], lines: Sequence[int] | None = None) -> None:
    """No access to shared memory, of all or of some PTX lines, waits for a bank."""
    for line, access in metrics(trace).items():
        if "shared" in access.name and (lines is None or line in lines):
            assert access.per_request == 1.0, f"PTX line {line}: {access}"
