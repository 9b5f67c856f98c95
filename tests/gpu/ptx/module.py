"""Runs PTX on the CPU: PTX -> C++, one function a kernel and one fiber a thread (include/simrt.h) -> g++ -> ctypes.

module = Module(ptx_text)
assert not module.unsupported
stats, trace = module.launch(name, grid, block, args, smem=0, readonly=(0, 1), strict_global=True)
"""

from __future__ import annotations

import ctypes
import math
import re
import struct
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .build import CACHE, compile_cpp
from .parse import SIZE, Function, Parsed
from .staging import Span, Staging, is_array, span_of
from .translate import Translation

STATS = ("ld_bytes", "st_bytes", "ld_n", "st_n", "vec16", "traced", "instr")
TRACE = np.dtype(
    [(name, "u4") for name in ("pc", "thread", "block", "kind")] + [("addr", "u8"), ("size", "u4"), ("pad", "u4")]
)
_TRACED = STATS.index("traced")
_MESSAGE_BYTES = 1024

Dimensions = int | Sequence[int]


class _Launch(ctypes.Structure):
    """struct Launch of ptxrt.h"""

    _fields_ = (
        *((name, ctypes.c_uint32 * 3) for name in ("grid", "block", "cluster")),
        *((name, ctypes.c_uint32) for name in ("order", "workers", "strict", "strict_global")),
        ("approx", ctypes.c_int32),
        *((name, ctypes.c_uint64) for name in ("seed", "smem", "max_instr", "nranges", "trace_max")),
        *((name, ctypes.c_void_p) for name in ("ranges", "trace", "params")),
    )


def dimensions(x: Dimensions) -> tuple[int, int, int]:
    """x, y and z of a grid, block or cluster; what is missing is 1."""
    x, y, z, *_ = (*((x,) if isinstance(x, int) else x), 1, 1, 1)
    return x, y, z


@lru_cache(maxsize=8)
def _parsed(ptx: str) -> Parsed:
    """The kernels of a text are translated one at a time, in modules of their own; it is parsed once for them."""
    return Parsed(ptx)


class Module:
    """A translated PTX module.

    Args:
        ptx: the text.
        check: whether bounds, races and initialisation are checked.
        opt: g++'s optimisation level.
        cache: where compiled modules are kept.
        only: a regular expression; just the kernels whose names it finds are translated.

    Attributes:
        kernels: the kernels, by name.
        library: the compiled module.
        unsupported: (function, PTX line, opcode, reason) of instructions that fail when they are executed.
    """

    def __init__(self, ptx: str, check: bool = True, opt: str = "-O1", cache: Path = CACHE, only: str = "") -> None:
        self.parsed = _parsed(ptx)
        entries = {name: f for name, f in self.parsed.functions.items() if f.entry}
        self.kernels = {name: f for name, f in entries.items() if re.search(only, name)}
        translation = self.translated()
        self.unsupported = translation.unsupported
        self._static_shared = {name: self.parsed.shared_layout(f)[1] for name, f in self.kernels.items()}
        flags = [opt, *(["-DCHECK"] if check else [])]
        self.library = ctypes.CDLL(str(compile_cpp(translation.source, flags, cache)))
        self.library.ptx_symbol.restype = ctypes.c_void_p

    def translated(self) -> Translation:
        """The C++ of the kernels."""
        return Translation(self.parsed, self.kernels)

    def symbol(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a __device__ or __constant__ variable, writable."""
        variable = self.parsed.globals[name]
        size = variable.count * SIZE[variable.type]
        memory = (ctypes.c_uint8 * size).from_address(self.library.ptx_symbol(name.encode()))
        return np.ctypeslib.as_array(memory)

    def launch(
        self, name: str, grid: Dimensions, block: Dimensions, args: Sequence[Any], smem: int = 0, **options: Any
    ) -> tuple[dict[str, int], npt.NDArray[Any]]:
        """Runs a kernel.

        Args:
            name: its name in the PTX.
            grid, block: numbers of blocks, and of threads in a block: (x, y, z), or x.
            args: arrays (numpy or torch; pointers that know their bounds), numbers, `bytes` for a structure passed by
                value, 0 for a null pointer.
            smem: dynamic shared memory in bytes.
            options: `readonly`, the positions of arguments that must not be written, and those of `launch_buffer`.

        Returns:
            Counters (`STATS`) and the trace of memory accesses (`TRACE`).

        Raises:
            RuntimeError: a check failed: kernel, block, thread, what happened, PTX instruction, source line.
            ValueError: a shape that the driver refuses.
            TypeError: arguments that do not fit the kernel's parameters.
        """
        readonly = options.pop("readonly", ())
        kernel = self.kernels[name]
        if len(args) != len(kernel.params):
            raise TypeError(f"{name} takes {len(kernel.params)} arguments, {len(args)} given")
        spans = {i: span_of(a, i not in readonly) for i, a in enumerate(args) if is_array(a)}
        staging = Staging(spans.values())
        values = [staging.address(spans[i]) if i in spans else a for i, a in enumerate(args)]
        buffer = _parameter_buffer(kernel, values)
        return self._run(kernel, grid, block, smem, buffer, staging, list(spans.values()), **options)

    def launch_buffer(
        self,
        name: str,
        grid: Dimensions,
        block: Dimensions,
        parameters: bytes,
        memory: Sequence[Span],
        smem: int = 0,
        **options: Any,
    ) -> tuple[dict[str, int], npt.NDArray[Any]]:
        """Runs a kernel with the parameter buffer that host code made.

        Pointers into `memory`, also those inside structures, are found by their value.

        Args:
            name, grid, block, smem: as for `launch`.
            parameters: the bytes of all parameters at their offsets.
            memory: what the kernel may reach through them.
            options: `cluster`, blocks of a cluster, (x, y, z), by default what the kernel was compiled for; `order` 0
                forward, 1 reverse, 2 random (by `seed`): of threads, blocks and asynchronous copies; `workers`, host
                threads; `strict`: shuffles and votes do not order memory; `strict_global`: also find races through
                global memory (slow); `approx` +1 or -1: shift the results of approximate instructions by about their
                documented error; `trace`: memory accesses to record; `max_instr`: instructions a launch may execute.

        Returns, raises: as `launch`.
        """
        kernel = self.kernels[name]
        staging, buffer = Staging(memory), bytearray(parameters)
        staging.relocate(buffer, kernel.pointer_words())
        return self._run(kernel, grid, block, smem, buffer, staging, list(memory), **options)

    def _run(
        self,
        kernel: Function,
        grid: Dimensions,
        block: Dimensions,
        smem: int,
        parameters: bytearray,
        staging: Staging,
        spans: Sequence[Span],
        *,
        cluster: Dimensions | None = None,
        order: int = 0,
        seed: int = 0,
        workers: int = 1,
        strict: bool = False,
        strict_global: bool = False,
        approx: int = 0,
        trace: int = 0,
        max_instr: int = 1 << 36,
    ) -> tuple[dict[str, int], npt.NDArray[Any]]:
        grid, block = dimensions(grid), dimensions(block)
        cluster = _checked_cluster(kernel, grid, block, cluster)
        values = staging.ranges(spans)
        ranges = (ctypes.c_uint64 * max(len(values), 1))(*values)
        records = np.zeros(max(trace, 1), TRACE)
        counters = (ctypes.c_uint64 * len(STATS))()
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        buffer = ctypes.create_string_buffer(bytes(parameters), len(parameters))
        launch = _Launch(
            grid=grid,
            block=block,
            cluster=cluster,
            order=order,
            workers=1 if strict_global else workers,
            strict=strict,
            strict_global=strict_global,
            approx=approx,
            seed=seed,
            smem=self._static_shared[kernel.name] + smem,
            max_instr=max_instr,
            nranges=len(spans),
            trace_max=trace,
            ranges=ctypes.addressof(ranges),
            trace=records.ctypes.data if trace else None,
            params=ctypes.addressof(buffer),
        )
        failed = self.library.ptx_launch(kernel.name.encode(), ctypes.byref(launch), counters, message)
        staging.copy_back()
        if failed:
            text = message.value.decode(errors="replace")
            where = re.sub(r"PTX line (\d+)", lambda m: f"{m[0]} [{self.parsed.where(int(m[1]))}]", text)
            raise RuntimeError(f"{kernel.name}: {where}")
        return dict(zip(STATS, counters, strict=True)), records[: min(trace, counters[_TRACED])]


def _parameter_buffer(kernel: Function, values: Sequence[Any]) -> bytearray:
    """The bytes of the parameters of a launch; pointers are given as addresses."""
    buffer = bytearray(max(kernel.param_bytes, 1))
    for i, (value, parameter) in enumerate(zip(values, kernel.params.values(), strict=True)):
        end = parameter.offset + parameter.size
        if isinstance(value, bytes | bytearray):
            if len(value) != parameter.size:
                raise TypeError(f"{kernel.name}: argument {i} is {parameter.size} bytes, {len(value)} given")
            buffer[parameter.offset : end] = value
        elif parameter.type in ("f32", "f64"):
            struct.pack_into("<f" if parameter.type == "f32" else "<d", buffer, parameter.offset, value)
        else:
            bits = int(value) % (1 << 8 * parameter.size)
            buffer[parameter.offset : end] = bits.to_bytes(parameter.size, "little")
    return buffer


def _checked_cluster(
    kernel: Function, grid: tuple[int, int, int], block: tuple[int, int, int], given: Dimensions | None
) -> tuple[int, int, int]:
    """The cluster's shape; ValueError for what the driver refuses at launch."""
    compiled_for = kernel.required.get("reqnctapercluster")
    cluster = dimensions(given or compiled_for or 1)
    threads = math.prod(block)
    if compiled_for and dimensions(compiled_for) != cluster:
        raise ValueError(
            f"{kernel.name} was compiled for clusters of {dimensions(compiled_for)}, launched with {cluster}"
        )
    if any(g % c for g, c in zip(grid, cluster, strict=True)):
        raise ValueError(f"{kernel.name}: grid {grid} is no multiple of the cluster {cluster}")
    if math.prod(cluster) > 16 or threads > 1024:
        raise ValueError(f"{kernel.name}: a cluster has at most 16 blocks (8 portably) and a block 1024 threads")
    if (required := kernel.required.get("reqntid")) and dimensions(required) != block:
        raise ValueError(f"{kernel.name} requires blocks of {dimensions(required)} threads, launched with {block}")
    if (limit := kernel.required.get("maxntid")) and threads > math.prod(limit):
        raise ValueError(f"{kernel.name}: at most {math.prod(limit)} threads a block, launched with {block}")
    return cluster
