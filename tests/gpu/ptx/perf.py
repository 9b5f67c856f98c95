"""Occupancy, and a roofline *estimate* of a kernel's time, from its SASS. Nothing here was ever measured on a GPU."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from . import nvcc
from .build import CACHE, INCLUDE, build, digest
from .devices import DEVICES, Device
from .sass import Instruction

REACHABLE_BANDWIDTH = 0.9  # of the data sheet's, that a copy reaches
_ISSUED = 128  # instructions of a thread that a multiprocessor starts in a clock: four warps
# What its units do in a clock, of a thread's instructions: CUDA programming guide, throughput of native arithmetic
# instructions, compute capability 9.0. What is not listed is limited by issue alone.
_THROUGHPUT = (
    (r"MUFU|I2F|F2I|F2F|I2I", 16),
    (r"IMAD\.(HI|WIDE)|LDS|STS|SHFL", 32),
    (r"IMAD|LOP3|SHF|IADD3|ISETP|LEA|SEL|PRMT|VIADD|IABS|IMNMX|FSETP|FMNMX|FSEL|F2FP|MOV|DFMA|DMUL|DADD", 64),
)


@cache
def _calculator() -> str:
    source = INCLUDE / "occupancy.cpp"
    program = CACHE / f"occupancy-{digest(source.read_text(), nvcc.version())}"
    return str(build([*nvcc.nvcc(), "-cudart=none", source], program))


def resident_blocks(architecture: int, registers: int, threads: int, static_shared: int = 0, dynamic: int = 0) -> int:
    """How many blocks a multiprocessor holds at once.

    Args:
        architecture: 90 for sm_90.
        registers: of a thread.
        threads: of a block.
        static_shared, dynamic: bytes of shared memory of a block, without what the driver reserves.
    """
    device = DEVICES[architecture]
    limits = (device.threads_processor, device.shared_processor, device.shared_block)
    numbers = (*device.capability, registers, static_shared, dynamic, threads, *limits)
    done = subprocess.run([_calculator(), *map(str, numbers)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def occupancy(architecture: int, registers: int, threads: int, static_shared: int = 0, dynamic: int = 0) -> float:
    """The part of a multiprocessor's threads that are resident; arguments as for `resident_blocks`."""
    blocks = resident_blocks(architecture, registers, threads, static_shared, dynamic)
    return blocks * threads / DEVICES[architecture].threads_processor


def main_loop(instructions: Sequence[Instruction]) -> Sequence[Instruction]:
    """The shortest loop that stores to global memory; the whole kernel where there is none."""
    loops = []
    for end in instructions:
        start = end.jumps_back_to
        if start is not None:
            body = [i for i in instructions if start <= i.address <= end.address]
            if any(i.opcode.startswith("STG") for i in body):
                loops.append(body)
    return min(loops, key=len, default=instructions)


@dataclass(frozen=True)
class Estimate:
    """Seconds an element, if memory alone and if instructions alone took time; the larger bounds the kernel."""

    memory: float
    issue: float
    instructions: float  # an element

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.issue else "issue"


def estimate(body: Sequence[Instruction], elements: int, bytes_per_element: float, device: Device) -> Estimate:
    """A lower bound of a kernel's time.

    Args:
        body: the instructions of one pass of a thread.
        elements: that a thread completes in it.
        bytes_per_element: of global memory, read and written.
        device: the GPU.
    """
    executed = [i.opcode for i in body if i.opcode != "NOP"]
    pipes: Counter[int] = Counter()
    for opcode in executed:
        rate = next((rate for pattern, rate in _THROUGHPUT if re.match(pattern, opcode)), _ISSUED)
        pipes[rate] += 1
    clocks = max([len(executed) / _ISSUED, *(n / rate for rate, n in pipes.items())])
    return Estimate(
        memory=bytes_per_element / (device.bandwidth * REACHABLE_BANDWIDTH),
        issue=clocks / elements / (device.processors * device.clock),
        instructions=len(executed) / elements,
    )
