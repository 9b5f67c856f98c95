"""The mutation check itself: mutants differ from the kernel in what they say, and in nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu import mutants
from tests.gpu.equivalent import MachineCode
from tests.gpu.known_bits import KnownBits
from tests.gpu.mutants import MutatedModule
from tests.gpu.ptx import Module, nvcc
from tests.gpu.ptx.parse import Parsed

SOURCE = Path(__file__).parent / "gates.cu"


@pytest.fixture(scope="module")
def module() -> MutatedModule:
    return MutatedModule(nvcc.compile_ptx(SOURCE), "through_shared", most=1000)


def test_no_mutant_is_alive_at_first(module: MutatedModule) -> None:
    assert module.alive is None
    plain = Module(nvcc.compile_ptx(SOURCE), only="through_shared")
    x, out = np.arange(32, dtype=np.float32), np.full(32, np.nan, np.float32)
    for m in (plain, module):
        m.launch("through_shared", 1, 32, [x, out, 1])
        assert (out == x[::-1]).all()
        out[:] = np.nan


def test_every_kind_of_mutant_is_made_and_does_what_it_says(module: MutatedModule) -> None:
    x = np.arange(32, dtype=np.float32)
    wrong: dict[str, int] = {}
    for number, mutant in module.mutants.items():
        module.alive = number
        assert module.alive == number
        out = np.full(32, np.nan, np.float32)
        try:
            module.launch("through_shared", 1, 32, [x, out, 1], max_instr=1 << 16)
            noticed = not (out == x[::-1]).all()
        except RuntimeError:
            noticed = True
        wrong[mutant.kind] = wrong.get(mutant.kind, 0) + noticed
    module.alive = None
    assert {"barrier dropped", "store dropped", "operation changed", "constant changed"} <= set(wrong)
    assert wrong["barrier dropped"] == 1
    assert wrong["store dropped"] == 2
    assert module.possible == len(module.mutants)


def test_it_tells_what_mutants_a_launch_reaches() -> None:
    """Those of the loop's body are reached where the loop makes a trip."""
    module = MutatedModule(nvcc.compile_ptx(SOURCE), "spills", most=1000)
    x, out = np.zeros((64, 32), np.float32), np.empty((64, 32), np.float32)

    def reached(n: int) -> frozenset[int]:
        module.forget_reached()
        module.launch("spills", 1, 32, [x, out, n])
        return module.reached()

    none, once = reached(0), reached(1)
    assert none < once <= module.mutants.keys()
    assert reached(0) == none


def test_a_mutant_that_loops_for_ever_is_stopped() -> None:
    module = MutatedModule(nvcc.compile_ptx(SOURCE), "spills", most=1000)
    x, out = np.zeros((64, 32), np.float32), np.empty((64, 32), np.float32)
    module.launch("spills", 1, 32, [x, out, 4])
    stopped = 0
    for number in module.mutants:
        module.alive = number
        try:
            module.launch("spills", 1, 32, [x, out, 4])
        except RuntimeError as error:
            stopped += "instruction limit" in str(error)
    assert stopped


def test_a_sample_takes_from_every_kind() -> None:
    sampled = MutatedModule(nvcc.compile_ptx(SOURCE), "through_shared", most=6)
    assert len(sampled.mutants) == 6
    assert len({mutant.kind for mutant in sampled.mutants.values()}) >= 4
    assert sampled.possible > 6


def test_constants_become_others() -> None:
    changed = {
        "7": "8",
        "0f3F800000": "0f3F802000",
        "0f00000000": "0f3F800000",
        "0d0000000000000000": "0d3FF0000000000000",
        "[%rd1+8]": "[%rd1+12]",
        "%r1": None,
    }
    assert {operand: mutants._changed_constant(operand) for operand in changed} == changed


def test_mutants_read_as_ptx(module: MutatedModule) -> None:
    texts = {str(mutant) for mutant in module.mutants.values()}
    assert any("barrier dropped: bar.sync 0 -> (dropped)" in text for text in texts)


# Another kernel of the module, which is left out; a value that nobody reads; a shift by a constant that ptxas knows to
# give the same; and a store.
TWO_KERNELS = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry other() { ret; }
.visible .entry kernel(.param .u64 out)
{
  .reg .b32 %r<5>;
  .reg .b64 %rd<2>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  add.s32 %r2, %r1, 7;
  shr.s32 %r3, %r1, 31;
  add.s32 %r4, %r3, %r1;
  st.global.u32 [%rd1], %r4;
  ret;
}
"""


def test_what_compiles_to_the_same_is_no_mutant() -> None:
    parsed = Parsed(TWO_KERNELS)
    machine_code = MachineCode(parsed.lines, "kernel")
    same = {
        text
        for x in parsed.functions["kernel"].code
        for mutant in (mutants.mutants_of(x) if x.kind == "op" else ())
        if machine_code.is_same(mutant) and (text := str(mutant).partition(": ")[2])
    }
    assert same == {
        "add.s32 %r2, %r1, 7 -> sub.s32 %r2, %r1, 7",
        "add.s32 %r2, %r1, 7 -> add.s32 %r2, %r1, 8",
        "shr.s32 %r3, %r1, 31 -> shr.s32 %r3, %r1, 32",
    }


# Numbers of which bits are known, and of which none are: one is written twice, others are signed or come by way of a
# float.
INDICES = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 out)
.reqntid 32
{
  .reg .pred %p<6>;
  .reg .b32 %r<30>;
  .reg .f32 %f<2>;
  .reg .b64 %rd<5>;
  ld.param.u64 %rd1, [out];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd2, %r1, 32;
  add.s64 %rd3, %rd1, %rd2;
  shl.b32 %r2, %r1, 2;
  or.b32 %r3, %r2, 3;
  setp.lt.u32 %p1, %r3, 16;
  setp.lt.u32 %p2, %r3, 19;
  add.s32 %r4, %r3, -4;
  setp.gt.s32 %p3, %r4, -2;
  setp.gt.s32 %p4, %r4, -1;
  selp.b32 %r5, 1, 0, %p1;
  selp.b32 %r6, 2, %r5, %p2;
  selp.b32 %r7, 4, %r6, %p3;
  selp.b32 %r8, 8, %r7, %p4;
  st.global.u32 [%rd3], %r8;
  and.b32 %r9, %r2, 12;
  and.b32 %r10, %r1, 12;
  st.global.u32 [%rd3+4], %r9;
  st.global.u32 [%rd3+8], %r10;
  bfe.u32 %r11, %r1, 3, 2;
  xor.b32 %r12, %r2, %r11;
  shr.u32 %r13, %r1, 1;
  xor.b32 %r14, %r2, %r13;
  st.global.u32 [%rd3+12], %r12;
  st.global.u32 [%rd3+16], %r14;
  mov.u32 %r15, 16;
  add.s32 %r15, %r15, %r1;
  and.b32 %r16, %r15, 2;
  cvt.rn.f32.u32 %f1, %r1;
  cvt.rzi.u32.f32 %r17, %f1;
  and.b32 %r18, %r17, 2;
  sub.s32 %r19, 15, %r1;
  shr.s32 %r20, %r19, 3;
  and.b32 %r21, %r20, 4;
  xor.b32 %r22, %r16, %r18;
  st.global.u32 [%rd3+20], %r22;
  st.global.u32 [%rd3+24], %r21;
  ret;
}
"""


def test_bits_that_are_known_tell_what_is_no_mutant() -> None:
    mutated = MutatedModule(INDICES, "kernel", most=1000)
    known = KnownBits(mutated.kernels["kernel"])

    def result(number: int | None) -> list[int]:
        out = np.zeros((32, 8), np.int32)
        mutated.alive = number
        mutated.launch("kernel", 1, 32, [out])
        return [int(n) for n in out.reshape(-1)]

    same = {
        number: str(mutant).partition(": ")[2] for number, mutant in mutated.mutants.items() if known.is_same(mutant)
    }
    assert all(result(number) == result(None) for number in same)
    assert set(same.values()) == {
        "setp.lt.u32 %p1, %r3, 16 -> setp.le.u32 %p1, %r3, 16",
        "setp.gt.s32 %p3, %r4, -2 -> setp.ge.s32 %p3, %r4, -2",
        "and.b32 %r9, %r2, 12 -> and.b32 %r9, %r2, 13",
        "bfe.u32 %r11, %r1, 3, 2 -> bfe.u32 %r11, %r1, 3, 3",
        "xor.b32 %r12, %r2, %r11 -> or.b32 %r12, %r2, %r11",
    }
