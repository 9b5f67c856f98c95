"""Runs the CUDA backend on CPU tensors: host code as it ships, each launch the PTX under the simulator's checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.gpu import cuda_library, gates, simulate
from tests.gpu.ptx import metrics, nvcc, sass
from tests.gpu.simulate import Launch
from tests.gpu.triton_runs import MANY, SCHEDULES
from tests.ops.common import same_bits

ARCHITECTURES = cuda_library.ARCHITECTURES
THREADS = 256  # of a block: kThreads of csrc/cuda/plan.h
# Kernels loop where a GPU has fewer blocks than there is work: a GPU of one multiprocessor makes them on small tensors.
ONE_PROCESSOR = 1


def under_every_schedule(
    op: Callable[[], tuple[Tensor, ...]], target: int, processors: int | None = None, samples: int = 1
) -> tuple[Tensor, ...]:
    """As that of triton_runs.py; `processors` as for `simulate.backend`."""
    results = []
    for options in SCHEDULES[:1] if samples >= MANY else SCHEDULES:
        with simulate.backend("cuda", target, processors=processors, **options) as launches:
            results.append(op())
        assert launches
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def traced(op: Callable[[], object], target: int = 90) -> Launch:
    """The one launch of `op`, with every access to memory."""
    with simulate.backend("cuda", target, trace=1 << 20) as launches:
        op()
    (launch,) = launches
    assert launch.stats["traced"] <= 1 << 20
    return launch


def bytes_of(launch: Launch, kind: str) -> int:
    """Bytes of images that a launch reads or writes: a warp's lanes take neighbours, and share a sample's numbers."""
    lines = [line for line, a in metrics.metrics(launch.trace).items() if a.name == kind and a.per_request > 1]
    return int(launch.trace["size"][np.isin(launch.trace["pc"], lines)].sum())


def is_coalesced(launch: Launch) -> None:
    """No sector of global memory is touched in vain, no bank of shared memory twice."""
    gates.assert_coalesced(launch.trace)
    gates.assert_no_bank_conflicts(launch.trace)


@cache
def cubin(file: str, target: int) -> Path:
    """csrc/cuda/<file>.cu, compiled."""
    csrc = cuda_library.CSRC
    return nvcc.compile_cubin(csrc / "cuda" / f"{file}.cu", target, [f"-I{csrc / 'include'}", f"-I{csrc}"])


def has_room(file: str, target: int, blocks: int, kernels: str = "") -> None:
    """A multiprocessor of 2048 threads holds so many blocks of a file's kernels, and they spill nothing."""
    gates.assert_no_spills(cubin(file, target), kernels)
    gates.assert_occupancy(cubin(file, target), target, THREADS, blocks * THREADS / 2048, kernels)


def is_vectorised(file: str, target: int, kernels: str = "", loads: bool = True, stores: bool = True) -> None:
    """The kernels whose names match have accesses of 16 bytes."""
    found = {name: code for name, code in sass.sass(cubin(file, target)).items() if re.search(kernels, name)}
    assert found
    for code in found.values():
        gates.assert_vector_accesses(code, loads, stores)


def ptx_of(file: str, target: int) -> str:
    return cuda_library.library().ptx(target)[file]
