"""Compiles a ``@triton.jit`` function for an architecture, without a GPU or a driver, and runs its PTX on CPU tensors.

stats, trace = run(kernel, (4,), x, y, 1000, BLOCK=256, target=90, readonly=(0,))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .module import Module

MODULES: dict[tuple[Any, ...], tuple[Any, Module]] = {}


def gpu_target(target: int | str) -> GPUTarget:
    """Triton's name for sm_<target> (an int), or for a HIP architecture ("gfx942")."""
    if isinstance(target, int):
        return GPUTarget("cuda", target, 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


class Specialised:
    """A kernel with the arguments of one call, specialised as Triton's own launcher does it.

    Integers of 1 and None become constants; pointers and integers divisible by 16 are noted as such.
    """

    def __init__(self, kernel: Any, target: int | str, args: Sequence[Any], keywords: dict[str, Any]) -> None:
        self.kernel, self.target = kernel, gpu_target(target)
        backend = make_backend(self.target)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, options = binder(*args, **keywords)
        packed = kernel._pack_args(backend, keywords, bound, specialization, options)
        self.options, self.signature, self.constexprs, self.attributes = packed
        self.names = [name for name, kind in self.signature.items() if kind != "constexpr"]
        self.arguments = [bound[name] for name in self.names]

    @property
    def key(self) -> tuple[Any, ...]:
        signature, constexprs = tuple(self.signature.items()), tuple(self.constexprs.items())
        return self.kernel, self.target, self.options.hash(), signature, constexprs, repr(self.attributes)

    def compile(self) -> Any:
        source = ASTSource(self.kernel, self.signature, self.constexprs, self.attributes)
        return triton.compile(source, target=self.target, options=self.options.__dict__)


def compile_kernel(kernel: Any, *args: Any, target: int | str = 90, **keywords: Any) -> Any:
    """Triton's compiled kernel for a call: ``.asm["ptx"]``, ``.asm["cubin"]`` (``.asm["amdgcn"]``), ``.metadata``."""
    return Specialised(kernel, target, args, keywords).compile()


def run(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    target: int = 90,
    check: bool = True,
    opt: str = "-O1",
    order: int = 0,
    seed: int = 0,
    workers: int = 1,
    strict: bool = False,
    strict_global: bool = False,
    approx: int = 0,
    readonly: Sequence[int | str] = (),
    trace: int = 0,
    max_instr: int = 1 << 36,
    **keywords: Any,
) -> tuple[dict[str, int], npt.NDArray[Any]]:
    """Runs a Triton kernel on CPU tensors; counters and trace are those of `Module.launch`.

    Args:
        kernel: a ``@triton.jit`` function. An autotuned one cannot be run: its choice needs a driver.
        grid: one to three numbers of programs.
        args: the kernel's arguments; tensors are on the CPU.
        target: the architecture, 90 for sm_90.
        check, opt: as for `Module`.
        order, seed, workers, strict, strict_global, approx, trace, max_instr: as for `Module.launch`.
        readonly: the arguments that must not be written, by name, or by position among the run-time arguments (those
            that are neither constants nor None).
        keywords: constexprs, further arguments, and Triton's options (num_warps, num_stages, enable_fp_fusion).

    Raises:
        NotImplementedError: the PTX holds an instruction that the simulator does not know.
        RuntimeError: a check failed.
    """
    call = Specialised(kernel, target, args, keywords)
    key = (*call.key, check, opt)
    if key not in MODULES:
        compiled = call.compile()
        module = Module(compiled.asm["ptx"], check=check, opt=opt)
        if module.unsupported:
            raise NotImplementedError(f"{kernel.__name__}: {module.unsupported}")
        MODULES[key] = compiled, module
    compiled, module = MODULES[key]
    ((name, entry),) = module.kernels.items()
    if compiled.metadata.global_scratch_size or compiled.metadata.profile_scratch_size:
        raise NotImplementedError(f"{kernel.__name__} needs scratch memory")
    scratch = [0] * (len(entry.params) - len(call.arguments))
    return module.launch(
        name,
        grid,
        compiled.metadata.num_warps * 32,
        [*call.arguments, *scratch],
        smem=compiled.metadata.shared,
        order=order,
        seed=seed,
        workers=workers,
        strict=strict,
        strict_global=strict_global,
        approx=approx,
        readonly=[call.names.index(r) if isinstance(r, str) else r for r in readonly],
        trace=trace,
        max_instr=max_instr,
    )
