"""Mutants of a kernel's PTX, all of them in one compiled module.

A mutant changes one instruction. Compiling each alone would take hours; here an instruction with mutants becomes a
`switch` over a variable that says which mutant is alive, so that g++ runs once for a kernel.
"""

from __future__ import annotations

import ctypes
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.gpu.ptx.build import CACHE
from tests.gpu.ptx.instruction import Names
from tests.gpu.ptx.module import Module
from tests.gpu.ptx.parse import Function, Instr, Parsed
from tests.gpu.ptx.translate import Translation

_CONDITIONS = {"eq": "ne", "ne": "eq", "lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo",
               "hi": "hs", "hs": "hi", "ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu", "neu": "equ",
               "equ": "neu"}  # fmt: skip
_OPERATIONS = {"add": "sub", "sub": "add", "min": "max", "max": "min", "and": "or", "or": "and", "xor": "or",
               "mul": "add", "shl": "shr", "shr": "shl"}  # fmt: skip
# Instructions whose operands mean different things: swapping these two changes the result.
_SWAPPED = {"sub": (1, 2), "div": (1, 2), "setp": (1, 2), "selp": (1, 2), "fma": (1, 3), "mad": (1, 3), "shf": (1, 2),
            "prmt": (1, 2)}  # fmt: skip
_ORDERING = ("bar", "barrier", "fence", "membar")


@dataclass(frozen=True)
class Mutant:
    """One changed instruction: its PTX line, the kind of change, and how it reads now (None: it is dropped)."""

    line: int
    kind: str
    before: Instr
    after: Instr | None

    def __str__(self) -> str:
        return f"line {self.line}, {self.kind}: {text_of(self.before)} -> {text_of(self.after)}"


def text_of(x: Instr | None) -> str:
    """How an instruction reads in PTX."""
    if x is None:
        return "(dropped)"
    guard = f"@{x.guard[0]}{x.guard[1]} " if x.guard else ""
    return f"{guard}{x.text} {', '.join(x.ops)}"


def _with_operand(x: Instr, k: int, text: str) -> Instr:
    return replace(x, ops=[*x.ops[:k], text, *x.ops[k + 1 :]])


def _changed_constant(operand: str) -> str | None:
    """Another constant: the next integer, a float off by 2^-10 of itself, one for a float of zero, a neighbouring
    address."""
    if re.fullmatch(r"-?\d+", operand):
        return str(int(operand) + 1)
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        bits = int(m[1], 16)
        return f"0f{bits ^ 1 << 13 if bits else 0x3F800000:08X}"
    if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
        bits = int(m[1], 16)
        return f"0d{bits ^ 1 << 42 if bits else 0x3FF0000000000000:016X}"
    if m := re.fullmatch(r"\[(\S+?)\+(\d+)\]", operand):
        return f"[{m[1]}+{int(m[2]) + 4}]"
    return None


def mutants_of(x: Instr) -> Iterator[Mutant]:
    """The mutants of an instruction."""
    name, *modifiers = x.text.split(".")
    if name in _ORDERING or x.text.startswith("cp.async.wait"):
        yield Mutant(x.line, "barrier dropped", x, None)
    if name == "st":
        yield Mutant(x.line, "store dropped", x, None)
    if x.guard:
        negated = "" if x.guard[0] else "!"
        yield Mutant(x.line, "predicate negated", x, replace(x, guard=(negated, x.guard[1])))
    if name == "setp" and modifiers[0] in _CONDITIONS:
        text = ".".join(["setp", _CONDITIONS[modifiers[0]], *modifiers[1:]])
        yield Mutant(x.line, "condition changed", x, replace(x, text=text))
    if name in _SWAPPED and (pair := [x.ops[k] for k in _SWAPPED[name]])[0] != pair[1]:
        a, b = _SWAPPED[name]
        # eq and ne do not mind.
        if not (name == "setp" and modifiers[0] in ("eq", "ne", "equ", "neu")):
            swapped = _with_operand(_with_operand(x, a, x.ops[b]), b, x.ops[a])
            yield Mutant(x.line, "operands swapped", x, swapped)
    if name in _OPERATIONS and (name != "mul" or modifiers[-1] in ("f32", "f64")):
        yield Mutant(x.line, "operation changed", x, replace(x, text=".".join([_OPERATIONS[name], *modifiers])))
    if name not in ("bar", "barrier", "shfl", "vote", "redux") and not x.text.startswith("ld.param"):
        for k, operand in enumerate(x.ops):
            if (changed := _changed_constant(operand)) is not None:
                yield Mutant(x.line, "constant changed", x, _with_operand(x, k, changed))


class _MutatedTranslation(Translation):
    def __init__(self, parsed: Parsed, kernels: dict[str, Function], mutants: list[Mutant]) -> None:
        self._numbers: dict[int, list[tuple[int, Mutant]]] = {}
        for number, mutant in enumerate(mutants):
            self._numbers.setdefault(id(mutant.before), []).append((number, mutant))
        self.illegal: set[int] = set()
        exported = 'extern "C" __attribute__((visibility("default")))'
        self.preamble = f"{exported} int ptx_mutant = -1; {exported} u8 ptx_reached[{max(len(mutants), 1)}] = {{}};"
        super().__init__(parsed, kernels)

    def instruction(self, f: Function, x: Instr, names: Names) -> str:
        original = super().instruction(f, x, names)
        cases = {}
        for number, mutant in self._numbers.get(id(x), []):
            known = len(self.unsupported)
            changed = super().instruction(f, mutant.after, names) if mutant.after else ";"
            if len(self.unsupported) > known:  # there is no such instruction
                self.illegal.add(number)
                del self.unsupported[known:]
            else:
                cases[number] = f"case {number}: {{ {changed} }} break;"
        if not cases:
            return original
        reached = "".join(f"ptx_reached[{number}] = " for number in cases)
        return f"{reached}1; switch (ptx_mutant) {{ {' '.join(cases.values())} default: {{ {original} }} }}"


class MutatedModule(Module):
    """A module of one kernel with its mutants; `alive` chooses one, None the kernel as it is.

    Attributes:
        name: the kernel's.
        possible: how many mutants there are in all.
        mutants: those drawn, by number.
    """

    def __init__(self, ptx: str, kernel: str, most: int, seed: int = 0, cache: Path = CACHE, name: str = "") -> None:
        """most: mutants that are drawn at random, an even share of every kind, where there are more."""
        self.name = name or kernel
        self._most, self._seed = most, seed
        self._instructions = 0  # of the longest launch of the kernel as it is
        super().__init__(ptx, cache=cache, only=f"^{re.escape(kernel)}$")
        self._alive = ctypes.c_int.in_dll(self.library, "ptx_mutant")
        self._reached = (ctypes.c_uint8 * max(self._drawn, 1)).in_dll(self.library, "ptx_reached")

    def translated(self) -> Translation:
        (kernel,) = self.kernels.values()
        every = [m for x in kernel.code if x.kind == "op" for m in mutants_of(x)]
        self.possible = len(every)
        drawn = _even_sample(every, self._most, random.Random(self._seed))
        self._drawn = len(drawn)
        translation = _MutatedTranslation(self.parsed, self.kernels, drawn)
        self.mutants = {number: m for number, m in enumerate(drawn) if number not in translation.illegal}
        return translation

    def _run(self, *args: Any, **options: Any) -> Any:
        if self.alive is not None and self._instructions:  # it may loop for ever
            options["max_instr"] = 2 * self._instructions
        stats, trace = super()._run(*args, **options)
        if self.alive is None:
            self._instructions = max(self._instructions, stats["instr"])
        return stats, trace

    @property
    def alive(self) -> int | None:
        """The number of the mutant that runs."""
        return None if self._alive.value < 0 else self._alive.value

    @alive.setter
    def alive(self, number: int | None) -> None:
        self._alive.value = -1 if number is None else number

    def reached(self) -> frozenset[int]:
        """The mutants to whose instruction a thread came since `forget_reached`."""
        return frozenset(number for number in self.mutants if self._reached[number])

    def forget_reached(self) -> None:
        ctypes.memset(self._reached, 0, ctypes.sizeof(self._reached))


def _even_sample(mutants: list[Mutant], most: int, rng: random.Random) -> list[Mutant]:
    """At most so many mutants, taken from every kind in turn."""
    kinds: dict[str, list[Mutant]] = {}
    for mutant in rng.sample(mutants, len(mutants)):
        kinds.setdefault(mutant.kind, []).append(mutant)
    drawn: list[Mutant] = []
    while len(drawn) < min(most, len(mutants)):
        for group in kinds.values():
            if group and len(drawn) < most:
                drawn.append(group.pop())
    return drawn
