"""The mutation check itself: mutants differ from the kernel in what they say, and in nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu import mutants
from tests.gpu.equivalent import MachineCode
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
