"""Runs the CUDA backend on CPU tensors: host code as it ships, each launch the PTX under the simulator's checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..ops.common import same_bits
from . import cuda_library, simulate
from .ptx import metrics, nvcc, sass
from .simulate import Launch
from .triton_runs import SCHEDULES

ARCHITECTURES = cuda_library.ARCHITECTURES
# Kernels loop where a GPU has fewer blocks than there is work: a GPU of one multiprocessor makes them on small tensors.
ONE_PROCESSOR = 1


def under_every_schedule(
    op: Callable[[], tuple[Tensor, ...]], target: int, processors: int | None = None
) -> tuple[Tensor, ...]:
    """What `op` returns, the same bits whatever the order of the threads."""
    results = []
    for options in SCHEDULES:
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
    """Bytes of images that a launch reads or writes: there a warp's lanes take neighbours, elsewhere they share one."""
    lines = [line for line, a in metrics.metrics(launch.trace).items() if a.name == kind and a.per_request > 1]
    return int(launch.trace["size"][np.isin(launch.trace["pc"], lines)].sum())


def is_coalesced(launch: Launch) -> None:
    """No sector of global memory is touched in vain, no bank of shared memory twice."""
    for line, access in metrics.metrics(launch.trace).items():
        if access.name.endswith("global"):
            assert access.efficiency == 1.0, f"PTX line {line}: {access}"
        else:
            assert access.per_request == 1.0, f"PTX line {line}: {access}"


@dataclass
class Machine:
    """What ptxas made of a kernel."""

    registers: int
    local_bytes: int
    instructions: Counter[str]

    def accesses(self, prefix: str) -> Counter[str]:
        return Counter({name: n for name, n in self.instructions.items() if name.startswith(prefix)})


def machine_code(file: str, target: int) -> dict[str, Machine]:
    """The kernels of csrc/cuda/<file>.cu by their mangled names."""
    csrc = cuda_library.CSRC
    cubin = nvcc.compile_cubin(csrc / "cuda" / f"{file}.cu", target, [f"-I{csrc / 'include'}", f"-I{csrc}"])
    resources = sass.res(str(cubin))
    return {
        name: Machine(
            resources[name]["reg"],
            resources[name]["stack"] + resources[name]["local"],
            Counter(line[2] for line in code),
        )
        for name, code in sass.sass(str(cubin)).items()
    }


def spills_nothing(file: str, target: int) -> dict[str, Machine]:
    machines = machine_code(file, target)
    assert machines
    for name, machine in machines.items():
        assert machine.local_bytes == 0, name
        assert not machine.accesses("LDL"), name
        assert not machine.accesses("STL"), name
        assert machine.registers <= 128, name  # two blocks of 256 threads on a multiprocessor
    return machines


def ptx_of(file: str, target: int) -> str:
    return cuda_library.library().ptx(target)[file]
