"""Compile a @triton.jit function to real PTX and execute it on CPU tensors.

    run(kernel, grid, x, y, n, BLOCK=1024, target=90, readonly=(0,))
"""
from typing import Any, Sequence

import torch
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .module import Module

TYPES = {torch.float32: 'fp32', torch.float16: 'fp16', torch.bfloat16: 'bf16', torch.float64: 'fp64', torch.int64: 'i64', torch.int32: 'i32', torch.int16: 'i16', torch.int8: 'i8', torch.uint8: 'u8', torch.bool: 'i1'}
_modules: dict[tuple, tuple[Any, Module]] = {}


def signature(fn, args: Sequence[Any], const: dict[str, Any], specialise: bool) -> tuple[dict, dict, dict, list]:
    """(signature, attributes, constants, run-time arguments), specialised as Triton's JIT does: 1 is a constant, 16-divisibility is noted."""
    sig, attrs, const, real = dict.fromkeys(fn.arg_names, 'constexpr'), {}, dict(const), []
    for name, a in zip([n for n in fn.arg_names if n not in const], args, strict=True):
        if specialise and isinstance(a, int) and a == 1:
            const[name] = 1
            continue
        if torch.is_tensor(a):
            sig[name], divisible = '*' + TYPES[a.dtype], a.data_ptr() % 16 == 0
        elif isinstance(a, int):
            sig[name], divisible = 'i32' if -2**31 <= a < 2**31 else 'i64', a % 16 == 0
        else:
            sig[name], divisible = 'fp32', False
        if divisible and specialise:
            attrs[(fn.arg_names.index(name),)] = [['tt.divisibility', 16]]
        real.append(a)
    return sig, attrs, const, real


def run(fn, grid, *args, target: int = 90, num_warps: int = 4, num_stages: int = 3, specialise: bool = True, check: bool = True, opt: str = '-O1',
        order: int = 0, seed: int = 0, workers: int = 1, strict_global: bool = False, approx: int = 0, readonly: Sequence[int] = (), trace: int = 0, **const):
    """Returns (counters, trace) of Module.launch; `readonly` counts run-time arguments. Raises when the PTX holds something unsupported."""
    if type(fn).__name__ == 'Autotuner':
        fn = fn.fn
    sig, attrs, const, real = signature(fn, args, const, specialise)
    key = (fn, target, num_warps, num_stages, tuple(sig.items()), tuple(attrs), tuple(sorted(const.items())), check, opt)
    if key not in _modules:
        source = ASTSource(fn, signature=sig, constexprs={(fn.arg_names.index(k),): v for k, v in const.items()}, attrs=attrs)
        compiled = triton_compile(source, target=GPUTarget('cuda', target, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
        module = Module(compiled.asm['ptx'], check=check, opt=opt)
        if module.unsupported:
            raise NotImplementedError(f'{fn.__name__}: {module.unsupported}')
        _modules[key] = compiled, module
    compiled, module = _modules[key]
    (name, kernel), = module.kernels.items()
    scratch = [0] * (len(kernel.params) - len(real))      # global and profile scratch, unused here
    return module.launch(name, grid, compiled.metadata.num_warps * 32, [*real, *scratch], smem=compiled.metadata.shared, order=order, seed=seed, workers=workers,
                         strict_global=strict_global, approx=approx, readonly=readonly, trace=trace)
