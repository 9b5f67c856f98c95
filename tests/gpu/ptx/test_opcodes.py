"""Every arithmetic instruction form against exact arithmetic (opcode_cases.py), on edge cases and random operands.

ptxas checks that the generated PTX is legal, so that no case tests a form that does not exist.
"""

from __future__ import annotations

import random
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton

from tests.gpu.ptx import Module
from tests.gpu.ptx.exact import decode, encode, inputs, width
from tests.gpu.ptx.opcode_cases import CASES, Case

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
HEADER = ".version 8.8\n.target sm_{arch}\n.address_size 64\n"
REGISTERS = {8: "h", 16: "h", 32: "r", 64: "rd"}
PACKED = ("f16x2", "bf16x2", "f32x2")
# g++ takes a minute for all of them at once.
CHUNK = 130
CHUNKS = [(arch, start) for arch in (90, 100) for start in range(0, sum(c.arch == arch for c in CASES.values()), CHUNK)]


def chunk(arch: int, start: int) -> list[tuple[int, Case]]:
    """Numbered cases."""
    return [(k, c) for k, c in enumerate(CASES.values()) if c.arch == arch][start : start + CHUNK]


def kernel(number: int, case: Case) -> str:
    """A kernel in which thread i applies the case to element i of its arguments."""

    def place(parameter: int, t: str) -> str:
        return (
            f"ld.param.u64 %rd10, [k{number}_p{parameter}]; mul.wide.u32 %rd11, %r10, {width(t) // 8}; "
            "add.s64 %rd10, %rd10, %rd11;"
        )

    registers = {n: f"%{REGISTERS[width(t)]}{k}" for k, (n, t) in enumerate(zip("abc", case.operands, strict=False), 1)}
    registers["d"] = f"%{REGISTERS[width(case.result)]}8"
    parameters = ", ".join(f".param .u64 k{number}_p{k}" for k in range(len(case.operands) + 1))
    lines = [
        f".visible .entry k{number}({parameters})",
        "{",
        ".reg .b16 %h<12>; .reg .b32 %r<12>; .reg .b64 %rd<12>; .reg .pred %p<4>;",
        "mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ntid.x; mov.u32 %r9, %tid.x; mad.lo.s32 %r10, %r10, %r11, %r9;",
    ]
    for k, (name, t) in enumerate(zip("abc", case.operands, strict=False)):
        lines += [place(k, t), f"ld.global.b{width(t)} {registers[name]}, [%rd10];"]
    lines += [
        case.asm.format(**registers),
        place(len(case.operands), case.result),
        f"st.global.b{width(case.result)} [%rd10], {registers['d']};",
        "ret;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def assemble(text: str, arch: int, folder: Path) -> None:
    """Has ptxas check PTX."""
    ptx = folder / "cases.ptx"
    ptx.write_text(text)
    command: list[str | Path] = [PTXAS, "-O0", f"-arch=sm_{arch}", "-o", folder / "cases.cubin", ptx]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]


def operands(case: Case, n: int, rng: random.Random) -> list[list[int]]:
    """n values of each operand, as register bits."""
    columns = []
    for k, t in enumerate(case.operands):
        if k in case.choices:
            columns.append([rng.choice(case.choices[k]) for _ in range(n)])
        elif t in PACKED:
            lane = t[:-2]
            low, high = inputs(lane, n, rng), inputs(lane, n, rng)
            columns.append([x | y << width(lane) for x, y in zip(low, high, strict=True)])
        else:
            columns.append(inputs(t, n, rng))
    return columns


def is_right(case: Case, got: int, want: Any) -> Any:
    """Whether the bits of a result are those expected; approximations have their documented error."""
    t = case.result
    if case.tolerance is not None and isinstance(want, float):
        relative, flushed = case.tolerance
        value, nearest = decode(t, got), decode(t, encode(t, want, ftz=flushed))
        if value != value or nearest != nearest:
            return value != value and nearest != nearest
        # The error of these three is absolute where the result is small.
        scale = max(abs(want), 1.0 if case.asm.startswith(("lg2", "sin", "cos")) else 0.0)
        return value == nearest or abs(value - want) <= relative * scale + 2.0**-125
    bits = want[1] if isinstance(want, tuple) else encode(t, want)
    if got == bits:
        return True
    # float64 NaNs are not canonical; neg, abs and copysign keep the payload, which the exact value has not.
    any_nan = t == "f64" or (t == "f32" and case.asm.startswith(("neg", "abs", "copysign")))
    return any_nan and decode(t, got) != decode(t, got) and decode(t, bits) != decode(t, bits)


def failure(module: Module, number: int, case: Case, n: int, seed: int) -> str:
    """What the first wrong result was; empty when there is none."""
    columns = operands(case, n, random.Random(number + (seed << 32)))
    arrays = [np.array(c, f"u{width(t) // 8}") for c, t in zip(columns, case.operands, strict=True)]
    out = np.zeros(n, f"u{width(case.result) // 8}")
    module.launch(f"k{number}", n // 128, 128, [*arrays, out], readonly=range(len(arrays)))
    for row, got in zip(zip(*columns, strict=True), map(int, out), strict=True):
        values = [decode(t, bits) for t, bits in zip(case.operands, row, strict=True)]
        want = case.expected(*values)
        if want is not None and not is_right(case, got, want):
            return f"{case.asm}: {values} -> {got:#x} ({decode(case.result, got)}), expected {want}"
    return ""


def check(arch: int, items: Sequence[tuple[int, Case]], folder: Path, n: int, seeds: Sequence[int]) -> None:
    text = HEADER.format(arch=arch) + "".join(kernel(k, c) for k, c in items)
    assemble(text, arch, folder)
    module = Module(text, opt="-O0")
    assert not module.unsupported
    failures = [found for seed in seeds for k, c in items if (found := failure(module, k, c, n, seed))]
    assert not failures, f"{len(failures)} cases:\n" + "\n".join(failures)


@pytest.mark.parametrize(("arch", "start"), CHUNKS)
def test_opcodes(arch: int, start: int, tmp_path: Path) -> None:
    check(arch, chunk(arch, start), tmp_path, n=128, seeds=[0])


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "start"), CHUNKS)
def test_opcodes_with_many_operands(arch: int, start: int, tmp_path: Path) -> None:
    check(arch, chunk(arch, start), tmp_path, n=1024, seeds=[1, 2])


def test_every_form_has_a_case() -> None:
    # A loop that came to nothing would leave the tests above green.
    assert len(CASES) > 700
    forms = {c.asm.split(" ")[0].split(".")[0] for c in CASES.values()}
    assert {"add", "mul", "mad", "fma", "div", "rem", "sqrt", "rcp", "ex2", "cvt", "setp", "shf", "prmt"} <= forms


VECTORS = [
    (t, lanes)
    for t in ("u8", "s8", "u16", "s16", "b16", "u32", "s32", "f32", "u64", "s64", "f64", "b64")
    for lanes in (1, 2, 4)
    if lanes * width(t) <= 128
]
ADDRESS = {  # of the thread's 32 bytes in each space
    "global": "",
    "shared": "mov.u64 %rd22, buf; mad.wide.u32 %rd22, %r20, 32, %rd22;",
    "local": "mov.u64 %rd22, loc;",
    "generic": "mov.u64 %rd22, buf; cvta.shared.u64 %rd22, %rd22; mad.wide.u32 %rd22, %r20, 32, %rd22;",
}


def copying_kernel(t: str, lanes: int, space: str) -> str:
    """A kernel that copies 32 bytes a thread through a memory space, in vectors of a type."""
    size = width(t) // 8
    names = [f"%{REGISTERS[width(t)]}{k}" for k in range(lanes)]
    registers = f"{{{', '.join(names)}}}" if lanes > 1 else names[0]
    form = f"{f'.v{lanes}' if lanes > 1 else ''}.{t}"
    where = "" if space == "generic" else f".{space}"
    through = f"st{where}{form} [%rd22], {registers}; ld{where}{form} {registers}, [%rd22];" if ADDRESS[space] else ""
    lines = [
        f".visible .entry k_{t}_{lanes}(.param .u64 a, .param .u64 b)",
        "{",
        ".shared .align 32 .b8 buf[2048]; .local .align 32 .b8 loc[32];",
        ".reg .b16 %h<8>; .reg .b32 %r<24>; .reg .b64 %rd<24>;",
        f"mov.u32 %r20, %tid.x; {ADDRESS[space]}",
        "ld.param.u64 %rd20, [a]; ld.param.u64 %rd21, [b];",
        "mad.wide.u32 %rd20, %r20, 32, %rd20; mad.wide.u32 %rd21, %r20, 32, %rd21;",
    ]
    for offset in range(0, 32, size * lanes):
        lines += [f"ld.global{form} {registers}, [%rd20+{offset}];", through]
        lines += [f"st.global{form} [%rd21+{offset}], {registers};"]
    return "\n".join([*lines, "ret;", "}"]) + "\n"


@pytest.mark.parametrize("space", ADDRESS)
def test_memory_widths(space: str, tmp_path: Path) -> None:
    text = HEADER.format(arch=90) + "".join(copying_kernel(t, lanes, space) for t, lanes in VECTORS)
    assemble(text, 90, tmp_path)
    module = Module(text, opt="-O0")
    assert not module.unsupported
    for name in module.kernels:
        a, out = np.random.default_rng(0).integers(0, 256, 2048).astype(np.uint8), np.zeros(2048, np.uint8)
        module.launch(name, 1, 64, [a, out], readonly=(0,))
        assert (a == out).all(), name


PREDICATES = """
.visible .entry k(.param .u64 a, .param .u64 b)
{
.reg .b32 %r<24>; .reg .b64 %rd<24>; .reg .pred %p<8>;
mov.u32 %r20, %tid.x; ld.param.u64 %rd20, [a]; ld.param.u64 %rd21, [b];
mad.wide.u32 %rd20, %r20, 32, %rd20; mad.wide.u32 %rd21, %r20, 32, %rd21;
ld.global.v8.b32 {%r0, %r1, %r2, %r3, %r4, %r5, %r6, %r7}, [%rd20];
setp.gt.s32 %p0, %r0, 0; setp.gt.s32 %p1, %r1, 0;
not.pred %p2, %p0; and.pred %p3, %p0, %p1; or.pred %p4, %p2, %p1; xor.pred %p5, %p0, %p1; mov.pred %p6, %p5;
selp.u32 %r8, 1, 0, %p2; selp.u32 %r9, 2, 0, %p3; selp.u32 %r10, 4, 0, %p4; selp.u32 %r11, 8, 0, %p6;
or.b32 %r8, %r8, %r9; or.b32 %r8, %r8, %r10; or.b32 %r8, %r8, %r11;
@%p3 add.s32 %r8, %r8, 100; @!%p3 add.s32 %r8, %r8, 200;
mov.b64 %rd1, {%r2, %r3}; mov.b64 {_, %r12}, %rd1;
st.global.v8.b32 [%rd21], {%r8, %r12, %r2, %r3, %r4, %r5, %r6, %r7};
ret;
}
"""


def test_256_bit_vectors_and_predicates() -> None:
    module = Module(HEADER.format(arch=100) + PREDICATES)
    a, out = np.random.default_rng(0).integers(-9, 9, (32, 8)).astype(np.int32), np.zeros((32, 8), np.int32)
    module.launch("k", 1, 32, [a, out])
    for x, y in zip(a, out, strict=True):
        p, q = x[0] > 0, x[1] > 0
        bits = (not p) + 2 * (p and q) + 4 * ((not p) or q) + 8 * (p != q)
        assert y[0] == bits + (100 if p and q else 200)
        assert y[1] == x[3]
        assert (y[2:] == x[2:]).all()
