"""Runs the package's public functions on CPU tensors through the GPU backends, their kernels in the PTX simulator.

    with simulate.backend("cuda", target=90) as launches:
        x = df.randn((2, 3, 32, 32), seed=7)
    assert launches[0].stats["st_bytes"] == x.nbytes

Everything around the kernels is what ships: the public function and its checks, the operator, the code that lays out
and launches (backends/triton, or csrc/ops_cuda.cpp and csrc/cuda). Only the outermost layer is replaced: the dispatcher
is told to take the CUDA implementation for CPU tensors, and a launch runs the kernel's PTX.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy.typing as npt
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tests.gpu.ptx.triton as ptx_triton
from ddpm_fast import backends
from tests.gpu import cuda_library
from tests.gpu.ptx.devices import DEVICES
from tests.gpu.ptx.staging import Span, span_of

_EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


@dataclass
class Launch:
    """A kernel launch, and what the simulator saw: counters and trace of `Module.launch`."""

    kernel: str
    target: int
    grid: tuple[int, ...]
    block: int
    shared: int
    cluster: tuple[int, ...]
    stats: dict[str, int]
    trace: npt.NDArray[Any]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class _Memory:
    """What the kernels of the running operator may reach: its arguments, and what it allocates."""

    tensors: list[tuple[Tensor, bool]] = field(default_factory=list)  # and whether it may be written

    def add(self, tensor: Tensor, writable: bool) -> None:
        self.tensors.append((tensor, writable))

    def spans(self) -> list[Span]:
        return [span_of(tensor, writable) for tensor, writable in self.tensors if tensor.numel()]

    def knows(self, tensor: Tensor) -> bool:
        return _storage(tensor) in {_storage(t) for t, _ in self.tensors}

    def is_readonly(self, tensor: Tensor) -> bool:
        return self.knows(tensor) and _storage(tensor) not in {_storage(t) for t, writable in self.tensors if writable}


def _unwritten(result: Any, func: Any) -> Any:
    """Fills memory that was allocated without a value with NaN, so that a kernel that misses a place is seen."""
    if func.overloadpacket in _EMPTY and result.numel():
        result.fill_(float("nan") if result.is_floating_point() else 1)
    return result


class _Allocations(TorchDispatchMode):
    """Notes the tensors that an operator allocates for its kernels."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _unwritten(func(*args, **(kwargs or {})), func)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and not self._memory.knows(tensor):
                self._memory.add(tensor, writable=True)
        return result


class _Simulation(TorchDispatchMode):
    """Runs the operators of one GPU backend with CPU tensors."""

    def __init__(self, name: str, target: int, options: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name, self._target, self._options = name, target, options
        self._memory = _Memory()
        self._error: BaseException | None = None
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "ddpm_fast" or func._overloadname != self._name:
            return _unwritten(func(*args, **(kwargs or {})), func)
        self._memory = _Memory()
        for value, argument in zip(args, func._schema.arguments, strict=False):
            writable = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in value if isinstance(value, tuple | list) else [value]:
                if isinstance(tensor, Tensor):
                    self._memory.add(tensor, writable)
        try:
            with _Allocations(self._memory):
                result = func.redispatch(_CUDA, *args, **(kwargs or {}))
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:  # of a launch; host code only sees that it failed
            error, self._error = self._error, None
            raise error
        return result

    def note(self, kernel: str, grid: Iterable[int], block: int, shared: int, cluster: Iterable[int], run: Any) -> None:
        stats, trace = run
        self.launches.append(Launch(kernel, self._target, tuple(grid), block, shared, tuple(cluster), stats, trace))

    def launch_triton(self, kernel: Any, *args: Any, grid: Sequence[int], warmup: bool, **keywords: Any) -> None:
        """In place of `JITFunction.run`."""
        assert not warmup
        named = zip(kernel.arg_names, args, strict=False)
        readonly = [name for name, a in named if isinstance(a, Tensor) and self._memory.is_readonly(a)]
        run = ptx_triton.run(kernel, grid, *args, target=self._target, readonly=readonly, **self._options, **keywords)
        self.note(kernel.__name__, grid, 32 * keywords.get("num_warps", 4), 0, (1, 1, 1), run)

    def launch_cuda(self, launch: cuda_library.FakeLaunch) -> int:
        """What the fake CUDA runtime calls."""
        try:
            name = launch.kernel.decode()
            module = cuda_library.library().module(self._target, name)
            kernel = module.kernels[name]
            parameters = bytearray(kernel.param_bytes)
            for parameter, pointer in zip(kernel.params.values(), launch.arguments, strict=False):
                value = ctypes.string_at(pointer, parameter.size)
                parameters[parameter.offset : parameter.offset + parameter.size] = value
            grid, block, cluster = tuple(launch.grid), tuple(launch.block), tuple(launch.cluster)
            options = self._options | ({"cluster": cluster} if cluster != (1, 1, 1) else {})
            run = module.launch_buffer(
                name, grid, block, bytes(parameters), self._memory.spans(), launch.shared, **options
            )
            self.note(name, grid, block[0] * block[1] * block[2], launch.shared, cluster, run)
        except BaseException as error:  # must not cross the C++ frames above
            self._error = error
            return 1
        return 0


@contextlib.contextmanager
def backend(
    name: str, target: int = 90, processors: int | None = None, shared_bytes: int | None = None, **options: Any
) -> Iterator[list[Launch]]:
    """Makes ops on CPU tensors run on a GPU backend, simulated.

    Args:
        name: "triton" or "cuda".
        target: the architecture, 90 for sm_90. "cuda" has those of `cuda_library.ARCHITECTURES`.
        processors: multiprocessors of the GPU that the CUDA backend sees, where not the number of a real one: few make
            threads loop on small tensors too.
        shared_bytes: the shared memory that it may give to a block, where not that of a real one: too few make kernels
            go without a copy in there.
        options: of `Module.launch`: order, seed, strict, strict_global, approx, trace, workers.

    Yields:
        The launches so far, a list that grows.

    Raises (from ops inside the block):
        RuntimeError: the simulator found an error in a kernel.
        NotImplementedError: a kernel holds an instruction that the simulator does not know.
    """
    if name not in ("triton", "cuda"):
        raise ValueError(f"name must be 'triton' or 'cuda', not {name!r}")
    simulation = _Simulation(name, target, options)

    def choose(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        return name if (dtype or tensor.dtype) in backends._KERNEL_DTYPES else "reference"

    def run(kernel: Any, *args: Any, **keywords: Any) -> None:
        simulation.launch_triton(kernel, *args, **keywords)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backends, "choose", choose))
        if name == "triton":
            stack.enter_context(mock.patch.object(triton.JITFunction, "run", run))
        else:
            device = DEVICES[target]
            device = replace(device, processors=processors or device.processors)
            if shared_bytes is not None:
                device = replace(device, shared_block=shared_bytes)
            cuda_library.library().configure(device, simulation.launch_cuda)
        stack.enter_context(simulation)
        yield simulation.launches
