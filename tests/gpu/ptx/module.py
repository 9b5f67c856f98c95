"""Run PTX on the CPU: PTX -> C++ (one function a kernel, threads as fibers of simrt.h) -> g++ -> ctypes.

    m = Module(ptx_text); assert not m.unsupported
    stats, trace = m.launch(name, grid, block, args, smem=0, cluster=(2, 1, 1), readonly=(0, 1), strict_global=True)
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from typing import Any, Sequence

import numpy as np

from .ops import OPS, Ins, Names, Unsupported, cname, ctype
from .parse import SIZE, Function, Instr, Parsed, align_up

HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'include')
HEADERS = ('ptxrt.h', 'ptxmem.h', 'simrt.h')
CACHE = os.environ.get('PTXSIM_CACHE', os.path.join(tempfile.gettempdir(), 'ptxsim-cache'))
CXX = [*os.environ.get('CXX', 'g++').split(), '-std=c++20', '-w', '-fPIC', '-shared', '-mfma', '-mf16c', '-ffp-contract=off', '-fwrapv', '-fno-strict-aliasing', '-fno-gnu-unique', '-fvisibility=hidden', '-pthread']
STATS = ('ld_bytes', 'st_bytes', 'ld_n', 'st_n', 'vec16', 'traced', 'instr')
TRACE = np.dtype([('pc', 'u4'), ('thread', 'u4'), ('block', 'u4'), ('kind', 'u4'), ('addr', 'u8'), ('size', 'u4'), ('pad', 'u4')])
FAILURES = (Unsupported, KeyError, StopIteration, IndexError, TypeError, ValueError)


class Launch(ctypes.Structure):
    """struct Launch of ptxrt.h"""
    _fields_ = [(n, ctypes.c_uint32 * 3) for n in ('grid', 'block', 'cluster')] + [(n, ctypes.c_uint32) for n in ('order', 'workers', 'strict', 'strict_global')] + [('approx', ctypes.c_int32)] + \
               [(n, ctypes.c_uint64) for n in ('seed', 'smem', 'max_instr', 'nranges', 'trace_max')] + [(n, ctypes.c_void_p) for n in ('ranges', 'trace', 'params')]


def dims(x: int | Sequence[int]) -> tuple[int, int, int]:
    x = (x,) if isinstance(x, int) else tuple(x)
    return (x + (1, 1, 1))[:3]


def extent(a: Any) -> tuple[int, int, int]:
    """(address, bytes up to the last element, address of the allocation) of a torch tensor or numpy array."""
    if hasattr(a, 'data_ptr'):
        size, steps, base = a.element_size(), [q * a.element_size() for q in a.stride()], a.untyped_storage().data_ptr()
        start = a.data_ptr()
    else:
        owner = a
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        size, steps, start, base = a.itemsize, a.strides, a.ctypes.data, owner.ctypes.data
    n = size + sum((k - 1) * q for k, q in zip(a.shape, steps)) if all(a.shape) else 0
    return start, n, base


class Staging:
    """Copies of the argument arrays, each allocation at a 256-byte boundary (as device memory is) and far from the others,
    so that an overrun never lands in another argument. Overlapping arrays stay overlapping."""
    GAP = 1 << 16

    def __init__(self, spans: list[tuple[int, int, int, bool]]):
        self.parts: list[list] = []          # start, end, allocation, writable; then the address of the copy
        for start, n, base, writable in sorted(spans):
            if self.parts and start < self.parts[-1][1]:
                self.parts[-1][1] = max(self.parts[-1][1], start + n)
                self.parts[-1][3] |= writable
            else:
                self.parts.append([start, start + n, base, writable])
        self.memory = np.empty(sum(p[1] - p[0] + self.GAP + 512 for p in self.parts) + self.GAP, np.uint8)
        at = self.memory.ctypes.data + self.GAP
        for p in self.parts:
            p.append(align_up(at, 256) + (p[0] - p[2]) % 256)
            ctypes.memmove(p[4], p[0], p[1] - p[0])
            at = p[4] + p[1] - p[0] + self.GAP

    def address(self, a: int) -> int:
        return next(p[4] + a - p[0] for p in reversed(self.parts) if p[0] <= a)

    def copy_back(self) -> None:
        for start, end, _, writable, at in self.parts:
            if writable:
                ctypes.memmove(start, at, end - start)


class Module:
    """A translated PTX module. `unsupported` lists (function, PTX line, opcode, reason): anything there fails when it is executed."""

    def __init__(self, ptx: str, check: bool = True, opt: str = '-O1', cache: str = CACHE, only: str = ''):
        """check: bounds, race and initialisation checks. opt: g++ level. only: regular expression, translate just the kernels it finds."""
        self.parsed = Parsed(ptx)
        self.unsupported: list[tuple[str, int, str, str]] = []
        self.kernels = {n: f for n, f in self.parsed.functions.items() if f.entry and re.search(only, n)}
        self.dynamic = {n: self.parsed.shared_layout(f)[1] for n, f in self.kernels.items()}
        self.lib = ctypes.CDLL(compile_cpp(self.translate(), (['-DCHECK'] if check else []) + [opt], cache))
        self.lib.ptx_symbol.restype = ctypes.c_void_p

    # ---- translation
    def translate(self) -> str:
        p = self.parsed
        funcs = [f for f in p.functions.values() if not f.entry or f.name in self.kernels]
        src = ['#include "ptxrt.h"']
        for g in p.globals.values():
            src.append(f'alignas(128) static {ctype(g.type)} {cname(g.name)}[{g.count}] = {{{self.initial(g.init, g.type)}}};')
        src += [f'static void F_{cname(f.name)}(Thread& t, Args A);' for f in funcs if not f.entry]
        for f in funcs:
            src += self.function(f)
        src.append('static const Range GLOBALS[] = {' + ', '.join(f'{{(u64){cname(g.name)}, sizeof {cname(g.name)}, {int(not g.const)}, 0}}' for g in p.globals.values()) + '};')
        src.append('static const Entry ENTRIES[] = {' + ', '.join(f'{{"{k}", K_{cname(k)}}}' for k in self.kernels) + '};')
        src.append('#define EXPORT extern "C" __attribute__((visibility("default")))\n'
                   'EXPORT int ptx_launch(const char* name, const Launch* l, u64* stats, char* err) { for (auto& e : ENTRIES) if (!strcmp(e.name, name)) return run_launch(e, *l, GLOBALS, sizeof GLOBALS / sizeof(Range), stats, err); return 2; }\n'
                   'EXPORT void* ptx_symbol(const char* name) { ' + ' '.join(f'if (!strcmp(name, "{g.name}")) return {cname(g.name)};' for g in p.globals.values()) + ' return nullptr; }')
        return '\n'.join(src)

    @staticmethod
    def initial(text: str, t: str) -> str:
        """Initialiser of a global variable, as register bits."""
        ins = Ins.__new__(Ins)
        ins.ops, ins.t, ins.names = [], t, Names({}, {}, {}, set(), set())
        return ', '.join(f'({ctype(t)})({ins.raw(x)})' for x in re.findall(r'[^\s,]+', text)) or '0'

    def function(self, f: Function) -> list[str]:
        """C++ of a kernel or function: every statement of PTX becomes one of C++; instructions are counted a basic block at a time."""
        shared = self.parsed.shared_layout(f)[0]
        params = {n: f'P + {q.offset}' for n, q in f.params.items()} if f.entry else {n: f'A.p[{k}]' for k, n in enumerate([*f.returns, *f.params])}
        names = Names(params, shared, f.local, set(self.parsed.globals), {x.name for x in self.parsed.functions.values() if not x.entry})
        out = [f'static void {"K" if f.entry else "F"}_{cname(f.name)}(Thread& t, {"const u8* P" if f.entry else "Args A"}) {{ u32 CC = 0;']
        if f.local_bytes:
            out.append(f'alignas(16) char L[{f.local_bytes}]; Frame L_(t, L, sizeof L);')
        if f.param_bytes and f.entry:
            out.append(f'std::optional<Frame> P_; if (CHECKED) P_.emplace(t, (char*)P, {f.param_bytes}, false);')
        size = self.block_sizes(f)
        for k, x in enumerate(f.code):
            if x.kind in '{}':
                out.append(x.kind)
            elif x.kind == 'label':
                out.append(f'{cname(x.text)}: ;')
            elif x.kind == 'reg':
                out.append(f'{x.text} {", ".join(cname(n) for n in x.ops)};')
            elif x.kind == 'param':
                names.params[x.ops[0]] = cname(x.ops[0])
                out.append(f'alignas(16) u8 {cname(x.ops[0])}[{x.ops[1]}];')
            else:
                out.append((f'count(t, {size[k]}, {x.line}); ' if k in size else '') + self.instruction(f, x, names))
        return out + ['}']

    @staticmethod
    def block_sizes(f: Function) -> Counter:
        """Index of the first instruction of a basic block -> instructions in the block."""
        size, start = Counter(), None
        for k, x in enumerate(f.code):
            if x.kind == 'label':
                start = None
            elif x.kind == 'op':
                start = k if start is None else start
                size[start] += 1
                if x.text.split('.')[0] in ('bra', 'brx', 'ret', 'exit'):
                    start = None
        return size

    def instruction(self, f: Function, x: Instr, names: Names) -> str:
        try:
            if (name := x.text.split('.')[0]) not in OPS:
                raise Unsupported(x.text)
            cpp = OPS[name](Ins(x, names, f.targets))
        except FAILURES as e:
            self.unsupported.append((f.name, x.line, x.text, f'{type(e).__name__}: {e}'))
            cpp = f'bad(t, "unsupported {x.text}", {x.line});'
        return f'if ({x.guard[0]}{cname(x.guard[1])}) {cpp}' if x.guard else cpp

    # ---- execution
    def symbol(self, name: str) -> np.ndarray:
        """Bytes of a __device__ or __constant__ variable (writable)."""
        g, p = self.parsed.globals[name], self.lib.ptx_symbol(name.encode())
        n = g.count * SIZE[g.type]
        return np.ctypeslib.as_array((ctypes.c_ubyte * n).from_address(p))

    def arguments(self, k: Function, args: Sequence[Any], readonly: Sequence[int]) -> tuple[bytes, list[int], Staging]:
        """Parameter buffer; address, bytes and writability of every array argument; the staged arrays."""
        if len(args) != len(k.params):
            raise TypeError(f'{k.name} takes {len(k.params)} arguments, {len(args)} given')
        arrays = {i: extent(a) for i, a in enumerate(args) if hasattr(a, 'data_ptr') or isinstance(a, np.ndarray)}
        staging = Staging([(*e, i not in readonly) for i, e in arrays.items()])
        buf, ranges = bytearray(max(k.param_bytes, 1)), []
        for i, (a, p) in enumerate(zip(args, k.params.values())):
            if i in arrays:
                a = staging.address(arrays[i][0])
                ranges += [a, arrays[i][1], int(i not in readonly)]
            if isinstance(a, (bytes, bytearray)):
                if len(a) != p.size:
                    raise TypeError(f'{k.name}: argument {i} is {p.size} bytes, {len(a)} given')
                buf[p.offset:p.offset + p.size] = a
            elif p.type in ('f32', 'f64'):
                struct.pack_into('<f' if p.type == 'f32' else '<d', buf, p.offset, a)
            else:
                buf[p.offset:p.offset + p.size] = (int(a) % (1 << 8 * p.size)).to_bytes(p.size, 'little')
        return bytes(buf), ranges, staging

    def check_shape(self, k: Function, grid, block, cluster) -> tuple[int, int, int]:
        """What the driver would refuse at launch; returns the cluster shape."""
        need = k.required.get('reqnctapercluster')
        cluster = dims(cluster or need or 1)
        if need and dims(need) != cluster:
            raise ValueError(f'{k.name} was compiled for clusters of {dims(need)}, launched with {cluster}')
        if any(g % c for g, c in zip(grid, cluster)):
            raise ValueError(f'{k.name}: grid {grid} is no multiple of the cluster {cluster}')
        if np.prod(cluster) > 16 or np.prod(block) > 1024:
            raise ValueError(f'{k.name}: a cluster has at most 16 blocks (8 portably) and a block 1024 threads')
        if (q := k.required.get('reqntid')) and dims(q) != block:
            raise ValueError(f'{k.name} requires blocks of {dims(q)} threads, launched with {block}')
        if (q := k.required.get('maxntid')) and np.prod(block) > np.prod(q):
            raise ValueError(f'{k.name}: at most {np.prod(q)} threads a block, launched with {block}')
        return cluster

    def launch(self, name: str, grid, block, args: Sequence[Any], smem: int = 0, *, cluster=None, order: int = 0, seed: int = 0, workers: int = 1, strict: bool = False, strict_global: bool = False,
               trace: int = 0, readonly: Sequence[int] = (), approx: int = 0, max_instr: int = 1 << 36) -> tuple[dict[str, int], np.ndarray]:
        """Run a kernel; RuntimeError with the PTX instruction and source line when a check fails. Returns counters and the memory trace.

        cluster: blocks of a cluster (x, y, z). order: 0 forward, 1 reverse, 2 random schedule (seed). strict: shuffles and votes do not order
        memory. strict_global: also find races through global memory (slow). approx: +1/-1 shifts the results of approximate
        instructions by their documented error. smem: dynamic shared memory. readonly: arguments that must not be written."""
        k = self.kernels[name]
        grid, block = dims(grid), dims(block)
        cluster = self.check_shape(k, grid, block, cluster)
        params, rng, staging = self.arguments(k, args, readonly)
        ranges = (ctypes.c_uint64 * max(len(rng), 1))(*rng)
        tr, stats, err = np.zeros(max(trace, 1), TRACE), (ctypes.c_uint64 * 7)(), ctypes.create_string_buffer(1024)
        buf = ctypes.create_string_buffer(params, len(params))
        u3 = ctypes.c_uint32 * 3
        cfg = Launch(u3(*grid), u3(*block), u3(*cluster), order, 1 if strict_global else workers, strict, strict_global, approx, seed, self.dynamic[name] + smem, max_instr, len(rng) // 3, trace,
                     ctypes.cast(ranges, ctypes.c_void_p), tr.ctypes.data if trace else None, ctypes.cast(buf, ctypes.c_void_p))
        failed = self.lib.ptx_launch(name.encode(), ctypes.byref(cfg), stats, err)
        staging.copy_back()
        if failed:
            raise RuntimeError(f'{name}: ' + re.sub(r'PTX line (\d+)', lambda m: f'{m[0]} [{self.parsed.where(int(m[1]))}]', err.value.decode(errors='replace')))
        return dict(zip(STATS, stats)), tr[:min(trace, stats[5])]


def build(command: list[str], out: str) -> str:
    """Run a compiler command that writes `out`, unless it is there; safe against other processes doing the same."""
    if not os.path.exists(out):
        os.makedirs(os.path.dirname(out), exist_ok=True)
        tmp = f'{out}.{os.getpid()}.tmp'
        subprocess.run([*command, '-o', tmp], check=True)
        os.replace(tmp, out)
    return out


def compile_cpp(code: str, flags: list[str], cache: str) -> str:
    """Shared library of the translated module, cached by content; the headers are precompiled once for each set of flags."""
    headers = ''.join(open(os.path.join(HERE, h)).read() for h in HEADERS) + ' '.join(CXX + flags)
    digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:20]
    pre, path = os.path.join(cache, 'include-' + digest(headers)), os.path.join(cache, digest(code + headers))
    if not os.path.exists(path + '.so'):
        build([*CXX, *flags, '-x', 'c++-header', os.path.join(HERE, HEADERS[0])], os.path.join(pre, HEADERS[0] + '.gch'))
        with open(path + '.cpp', 'w') as f:
            f.write(code)
    return build([*CXX, *flags, '-I' + pre, '-I' + HERE, path + '.cpp'], path + '.so')
