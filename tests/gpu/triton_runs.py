"""Runs the Triton backend on CPU tensors: each launch executes the kernel's PTX under the simulator's checks."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ddpm_fast.backends.triton import _launch

from ..ops.common import same_bits
from .ptx import sass
from .ptx.triton import Specialised, run

NAN = float("nan")
ARCHITECTURES = (80, 90, 120)

# Threads forwards, backwards and in random order; and with the slower search for races in global memory.
SCHEDULES: tuple[dict[str, Any], ...] = (
    {"order": 0, "strict": True},
    {"order": 1},
    {"order": 2, "seed": 5},
    {"order": 2, "seed": 6, "strict_global": True},
)


@dataclasses.dataclass
class Call:
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    counters: dict[str, int] = dataclasses.field(default_factory=dict)

    def compiled(self, target: int | str = 90) -> Any:
        return Specialised(self.kernel, target, self.args, self.keywords).compile()


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Launches inside the block only fill the list, for what needs the compiled code alone."""
    calls: list[Call] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any) -> None:
        calls.append(Call(kernel, grid, args, {"num_warps": num_warps, "enable_fp_fusion": False, **constexprs}))

    with mock.patch.object(_launch, "launch", launch):
        yield calls


@contextlib.contextmanager
def simulated(target: int = 90, **options: Any) -> Iterator[list[Call]]:
    """Launches inside the block run here; the list fills with them.

    Kernels call the pointers that they write through `out_ptr` or `..._out_ptr`; all others must not be written.
    """
    calls: list[Call] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, **constexprs: Any) -> None:
        keywords = {"num_warps": num_warps, "enable_fp_fusion": False, **constexprs}
        names = Specialised(kernel, target, args, keywords).names
        readonly = [i for i, name in enumerate(names) if name.endswith("_ptr") and not name.endswith("out_ptr")]
        counters, _ = run(kernel, grid, *args, target=target, readonly=readonly, **options, **keywords)
        calls.append(Call(kernel, grid, args, keywords, counters))

    with mock.patch.object(_launch, "launch", launch):
        yield calls


def under_every_schedule(op: Callable[[], tuple[Tensor, ...]], target: int = 90) -> tuple[Tensor, ...]:
    """What `op` returns, the same bits whatever the order of the threads."""
    results = []
    for options in SCHEDULES:
        with simulated(target, **options):
            results.append(op())
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    return results[0]


def blank(like: Tensor, dtype: torch.dtype | None = None, offset: int = 0) -> Tensor:
    """NaNs in the shape and layout of a dense tensor, so many elements behind an aligned address."""
    dtype = dtype or like.dtype
    storage = torch.full((like.numel() + offset,), NAN, dtype=dtype)
    return storage.as_strided(like.shape, like.stride(), offset)


def moved(tensor: Tensor, offset: int) -> Tensor:
    """A dense tensor's copy in its layout, so many elements behind an aligned address."""
    storage = torch.zeros(tensor.numel() + offset, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@dataclasses.dataclass
class Machine:
    """What ptxas made of a kernel."""

    registers: int
    local_bytes: int
    instructions: Counter[str]

    def accesses(self, prefix: str) -> Counter[str]:
        return Counter({name: n for name, n in self.instructions.items() if name.startswith(prefix)})


def machine_code(call: Call, target: int, folder: Path) -> Machine:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(call.compiled(target).asm["cubin"])
    ((name, code),) = sass.sass(str(cubin)).items()
    resources = sass.res(str(cubin))[name]
    return Machine(resources["reg"], resources["stack"] + resources["local"], Counter(line[2] for line in code))


def spills_nothing(call: Call, target: int, folder: Path) -> Machine:
    machine = machine_code(call, target, folder)
    assert machine.local_bytes == 0
    assert not machine.accesses("LDL")
    assert not machine.accesses("STL")
    return machine


def rounds_every_operation(ptx: str) -> None:
    """No operation whose result the hardware may choose: nothing approximate, flushed, fused or without a rounding."""
    code = re.sub(r"//.*", "", ptx)
    assert ".approx" not in code
    assert ".ftz" not in code
    assert not re.search(r"\b(fma|mad)\.(?!lo|hi|wide)", code)
    assert not re.search(r"\b(mul|add|sub|div|sqrt|rcp)(?!\.rn)[.\w]*\.(f16|bf16|f32|f64)", code)
    assert re.search(r"\bmul\.rn\.f32", code)  # there is arithmetic to look at


def spills_nothing_on_hip(call: Call, architecture: str) -> None:
    code = call.compiled(architecture).asm["amdgcn"]
    assert {"0"} == set(re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code))
    assert {"0"} == set(re.findall(r"\.private_segment_fixed_size:\s+(\d+)", code))
