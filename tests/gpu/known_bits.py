"""Mutants that change nothing, by what is known of the bits of a kernel's integers.

A kernel computes indices by shifts and masks of the thread's number, so that some of their bits are known: those of
4 * tid + 3 end in 11. Two numbers that differ in a known bit are never equal, and of these `<` is `<=`; where no
two bits meet, `xor` is `or`; a mask may gain a bit that is never set. ptxas compiles all of these to something else.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from tests.gpu.mutants import Mutant
from tests.gpu.ptx.parse import Function, Instr

_STRICT_OR_NOT = [{"lt", "le"}, {"gt", "ge"}, {"lo", "ls"}, {"hi", "hs"}]
_ALL = (1 << 64) - 1


def _low(n: int) -> int:
    """The n lowest bits."""
    return (1 << n) - 1


@dataclass(frozen=True)
class Bits:
    """What is known of a number: the bits that may be set, and of them those that are."""

    possible: int = _ALL
    set: int = 0

    def __and__(self, mask: int) -> Bits:
        return Bits(self.possible & mask, self.set & mask)

    def __rshift__(self, n: int) -> Bits:
        return Bits(self.possible >> n, self.set >> n)

    def __lshift__(self, n: int) -> Bits:
        return Bits(self.possible << n, self.set << n)

    def __add__(self, other: Bits) -> Bits:
        """Without carries where no bits meet; else the low bits that are known of both."""
        if not self.possible & other.possible:
            return Bits(self.possible | other.possible, self.set | other.set)
        unknown = (self.possible ^ self.set) | (other.possible ^ other.set)
        below = (unknown & -unknown) - 1 if unknown else _ALL
        return Bits(_ALL & ~below | self.set + other.set & below, self.set + other.set & below)

    def __mul__(self, other: Bits) -> Bits:
        """The zeros at the end."""
        return Bits(_ALL & ~_low(sum((x.possible & -x.possible).bit_length() - 1 for x in (self, other) if x.possible)))

    def is_known(self) -> bool:
        return self.possible == self.set

    def is_never(self, other: Bits) -> bool:
        return bool(self.set & ~other.possible | other.set & ~self.possible)


class KnownBits:
    """Of the registers of a kernel that only one of its instructions writes."""

    def __init__(self, kernel: Function) -> None:
        code = [x for x in kernel.code if x.kind == "op" and x.ops]
        writers = Counter(register for x in code for register in re.findall(r"%[\w$]+", x.ops[0]))
        block = kernel.required.get("reqntid", (1024,))[0]
        self._known = {"%tid.x": Bits(_low((block - 1).bit_length()))}
        for x in code:
            # What is used before the line that writes it, as around a loop, counts as unknown there.
            if writers[x.ops[0]] == 1 and not x.guard:
                self._known[x.ops[0]] = self._result(x)

    def is_same(self, mutant: Mutant) -> bool:
        """Whether a changed instruction gives the kernel's result, because of the bits of its operands."""
        x, y = mutant.before, mutant.after
        if y is None or not _width(x.text) or x.guard != y.guard or x.ops[:2] != y.ops[:2]:
            return False
        name, condition, changed, otherwise = *x.text.split(".")[:2], *y.text.split(".")[:2]
        a, b, other = self._bits(x, 1), self._bits(x, 2), self._bits(y, 2)
        if name == "setp" and {condition, otherwise} in _STRICT_OR_NOT:
            return a.is_never(b)
        if (name, changed) == ("xor", "or"):
            return not a.possible & b.possible
        if name == changed == "and":
            return not a.possible & (b.possible ^ other.possible)
        if name == "bfe" and b == other and b.is_known():
            lengths = self._bits(x, 3), self._bits(y, 3)
            masks = [_low(n.set) if n.is_known() else _ALL for n in lengths]
            return not a.possible >> b.set & (masks[0] ^ masks[1])
        return False

    def _bits(self, x: Instr, k: int) -> Bits:
        """Of an instruction's operand."""
        operand = x.ops[k] if k < len(x.ops) else ""
        known = self._known.get(operand, Bits())
        if re.fullmatch(r"-?\d+", operand):
            known = Bits(int(operand) & _ALL, int(operand) & _ALL)
        return known & _low(_width(x.text))

    def _result(self, x: Instr) -> Bits:
        """Of an instruction's result; nothing is known where the instruction is none of these."""
        name, *modifiers = x.text.split(".")
        a, b, c = (self._bits(x, k) for k in (1, 2, 3))
        by = min(b.set, 64) if b.is_known() else None
        result = Bits()
        match name, *modifiers:
            case "mov", _:
                result = a
            case "cvt", into, ("u16" | "u32" | "u64"):
                return a & _low(_width(into)) if _width(into) else Bits()
            case "and", _:
                result = Bits(a.possible & b.possible, a.set & b.set)
            case "or", _:
                result = Bits(a.possible | b.possible, a.set | b.set)
            case "xor", _:
                result = Bits(a.possible & ~b.set | b.possible & ~a.set, a.set & ~b.possible | b.set & ~a.possible)
            case "add", _:
                result = a + b
            case "mul", "lo", _:
                result = a * b
            case "shl", _ if by is not None:
                result = a << by
            case "shr", ("u16" | "u32" | "u64" | "b16" | "b32" | "b64") if by is not None:
                result = a >> by
            case "bfe", "u32" if by is not None and c.is_known():
                result = a >> by & _low(c.set)
        return result & _low(_width(x.text)) if _width(x.text) else Bits()


def _width(text: str) -> int:
    """Bits of the integers that an opcode is for, or of an integer type; 0 if there are none."""
    m = re.search(r"(?:^|\.)[bus](16|32|64)$", text)
    return int(m[1]) if m else 0
