"""One PTX instruction, as the translators of ops_arithmetic.py and ops_memory.py see it, and their registry.

To add an opcode, write a function of an `Ins` that returns the C++ statement, in one of those files:

    @op("popc")
    def popc(i: Ins) -> str:
        return i.set(f"__builtin_popcountll({i.val(1)})", "u32")

`i.val(k)` is the C++ value of operand k in the instruction's type, `i.set(e)` assigns e to operand 0. A form that is
not handled raises Unsupported (KeyError and the like count too): it is listed in `Module.unsupported` and fails when it
is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import overload

from .parse import SIZE, Instr, split_operands

Translator = Callable[["Ins"], str]
OPS: dict[str, Translator] = {}

FLOATS = ("f32", "f64", "f16", "bf16")
ROUNDING = {"rn": "RN", "rz": "RZ", "rm": "RM", "rp": "RP", "rni": "RN", "rzi": "RZ", "rmi": "RM", "rpi": "RP"}
SPACES = ("global", "shared", "local", "const", "param")
SPECIAL = {
    "%laneid": "(u32)(t.lin & 31)",
    "%warpid": "(u32)(t.lin >> 5)",
    "%nwarpid": "(u32)t.blk->warps",
    "%smid": "0u",
    "%nsmid": "1u",
    "%gridid": "0ull",
    "%clock": "(u32)t.count->ins",
    "%clock_hi": "0u",
    "%clock64": "t.count->ins",
    "%globaltimer": "0ull",
    "%globaltimer_lo": "0u",
    "%cluster_ctarank": "(u32)t.blk->rank",
    "%cluster_nctarank": "(u32)t.blk->cl->blocks.size()",
    "%is_explicit_cluster": "(u32)(t.blk->cl->blocks.size() > 1)",
    "%lanemask_eq": "(1u << (t.lin & 31))",
    "%lanemask_lt": "lanes_below(t)",
    "%lanemask_le": "(lanes_below(t) * 2 + 1)",
    "%lanemask_gt": "~(lanes_below(t) * 2 + 1)",
    "%lanemask_ge": "~lanes_below(t)",
    "%total_smem_size": "(u32)t.blk->smem_bytes",
    "WARP_SZ": "32u",
}
for _d in "xyz":
    SPECIAL |= {
        f"%tid.{_d}": f"t.tid.{_d}",
        f"%ntid.{_d}": f"t.blk->dim.{_d}",
        f"%ctaid.{_d}": f"t.blk->bid.{_d}",
        f"%nctaid.{_d}": f"t.blk->grid.{_d}",
        f"%cluster_nctaid.{_d}": f"t.blk->cl->dim.{_d}",
        f"%cluster_ctaid.{_d}": f"(t.blk->bid.{_d} % t.blk->cl->dim.{_d})",
        f"%clusterid.{_d}": f"(t.blk->bid.{_d} / t.blk->cl->dim.{_d})",
        f"%nclusterid.{_d}": f"(t.blk->grid.{_d} / t.blk->cl->dim.{_d})",
    }

_MODIFIERS = """
    lo hi wide cc sat ftz relu approx full NaN xorsign abs noftz rna fractional
    global shared local const param v2 v4 v8 unchanged
    weak relaxed acquire release acq_rel sc volatile mmio cta cluster gpu sys proxy mbarrier_init sync_restrict alias
    gl ca cg cs cv lu wb wt nc to evict_last evict_normal evict_first range
    eq ne lt le gt ge ls hs num nan equ neu ltu leu gtu geu
    finite infinite number notanumber normal subnormal
    and or xor add min max exch cas inc dec popc
    up down bfly idx ballot any all uni sync aligned warp red wait
    l r clamp wrap f4e b4e rc8 ecl ecr rc16 shiftamt
    async bulk bulk_group commit_group wait_group wait_all read launch_dependents
    noinc arrive arrive_drop expect_tx init inval test_wait try_wait parity
    m8n8 x1 x2 x4 trans"""
# Modifiers that some translator handles, or that change no result here. Any other makes the instruction unsupported.
_KNOWN = {*SIZE, *ROUNDING, *_MODIFIERS.split()}
_PREFIXES = ("L1", "L2", "mbarrier")  # cache hints, and completion by an mbarrier


class Unsupported(Exception):
    """The simulator does not know this form of an instruction."""


def op(*names: str) -> Callable[[Translator], Translator]:
    """Registers a translator for these opcodes."""

    def add(translator: Translator) -> Translator:
        OPS.update(dict.fromkeys(names, translator))
        return translator

    return add


def ctype(t: str) -> str:
    """The C++ type that holds the bits of a PTX type."""
    if t == "pred":
        return "u32"
    return ("s" if t[0] == "s" and "x" not in t else "u") + str(SIZE[t] * 8)


def cname(n: str) -> str:
    """The C++ identifier of a PTX one."""
    return re.sub(r"[%.$]", lambda m: {"%": "R", ".": "_", "$": "S"}[m[0]], n if n[0] == "%" else "N" + n)


def group(operand: str) -> list[str]:
    """The members of {a, b}, or the operand itself."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


@dataclass
class Names:
    """What the identifiers of a function mean."""

    params: dict[str, str]  # parameters: C++ pointers
    shared: dict[str, int]  # shared variables: offsets
    local: dict[str, int]  # local variables: offsets
    globals: set[str]
    functions: set[str]


class Ins:
    """An instruction with its operands: `name.mods ops`, and `t`, the type that it works in."""

    def __init__(self, ins: Instr, names: Names, targets: dict[str, list[str]]) -> None:
        self.full, self.ops, self.line, self.names, self.targets = ins.text, ins.ops, ins.line, names, targets
        self.name, *self.scopes = ins.text.split(".")
        self.mods = [m if m.startswith(_PREFIXES) else m.split("::")[0] for m in self.scopes]
        for m in self.mods:
            known = m in _KNOWN or m.startswith(_PREFIXES)
            if not known or m == "b128" or (m == "async" and self.name not in ("cp", "fence")):
                raise Unsupported(f"modifier .{m}")
        self.types = [m for m in self.mods if m in SIZE]
        self.t = self.types[-1] if self.types else ""
        self.ftz, self.sat = "ftz" in self.mods, "sat" in self.mods
        self.isf = self.t in FLOATS

    def has(self, *mods: str) -> bool:
        return any(m in self.mods for m in mods)

    def one(self, *mods: str) -> str:
        """The first modifier out of a set; Unsupported when there is none."""
        for m in self.mods:
            if m in mods:
                return m
        raise Unsupported(self.full)

    @overload
    def opt(self, *mods: str, default: str) -> str: ...
    @overload
    def opt(self, *mods: str) -> str | None: ...
    def opt(self, *mods: str, default: str | None = None) -> str | None:
        """The first modifier out of a set, or the default."""
        return next((m for m in self.mods if m in mods), default)

    @property
    def bits(self) -> int:
        return SIZE[self.t] * 8

    @property
    def packed(self) -> str:
        """The type of a lane of f16x2 and the like; empty for other types."""
        return self.t[:-2] if self.t.endswith("x2") else ""

    @property
    def rnd(self) -> str:
        return ROUNDING[self.opt("rn", "rz", "rm", "rp", default="rn")]

    def raw(self, operand: int | str) -> str:
        """A C++ expression with the bits of an operand."""
        o = (self.ops[operand] if isinstance(operand, int) else operand).strip()
        if o in SPECIAL:
            return SPECIAL[o]
        if o.startswith("!"):
            return f"(u32)!{self.raw(o[1:])}"
        if (number := literal(o, self.t)) is not None:
            return number
        base, _, off = o.partition("+")
        base, off = base.strip(), off.strip() or "0"
        if base in self.names.local:
            return f"((u64)L + {self.names.local[base]} + {off})"
        if base in self.names.shared:
            return f"({self.names.shared[base]}u + {off})"
        if base in self.names.params:
            return f"((u64)({self.names.params[base]}) + {off})"
        if base in self.names.globals:
            return f"((u64){cname(base)} + {off})"
        if re.fullmatch(r"%?[A-Za-z_$][\w$.]*", o) and not o.startswith(("%env", "%pm")):
            return cname(o)
        raise Unsupported(f"operand {o!r}")

    def val(self, operand: int | str, t: str | None = None) -> str:
        """The C++ value of an operand in type t (default: the instruction's); .ftz flushes float inputs."""
        t = t or self.t
        r = self.raw(operand)
        if t == "f32":
            return f"fz(f({r}))" if self.ftz else f"f({r})"
        if t == "pred":
            return f"({r})"
        return from_bits(t, r)

    def pack(self, e: str, t: str | None = None) -> str:
        """The register bits of a C++ value."""
        t = t or self.t
        if t == "f32":
            return f"ub(fz({e}))" if self.ftz else f"ub((float)({e}))"
        return {"f64": f"ub((double)({e}))", "f16": f"f2h({e})", "bf16": f"f2b({e})"}.get(t) or f"({ctype(t)})({e})"

    def set(self, e: str, t: str | None = None) -> str:
        """Assigns a C++ value to operand 0, with .sat of floats."""
        if self.sat and (t or self.t) in FLOATS:
            e = f"sat({e})"
        return self.bits_to(0, self.pack(e, t))

    def bits_to(self, k: int, e: str) -> str:
        """Assigns register bits to operand k."""
        return assign(self.ops[k], e) or f"(void)({e});"

    def lanes(self, t: str, fn: Callable[[list[str]], str]) -> str:
        """Packed arithmetic: applies fn to the lanes (C++ values of type t) of operands 1.. and packs the results."""
        width = SIZE[t] * 8
        shifts = range(0, self.bits, width)
        values = [fn([from_bits(t, f"(u{width})({self.raw(o)} >> {sh})") for o in self.ops[1:]]) for sh in shifts]
        packed = [f"(u{self.bits})(u{width})({self.pack(v, t)})" for v in values]
        return self.bits_to(0, " | ".join(f"{p} << {sh}" for p, sh in zip(packed, shifts, strict=True)))

    def addr(self, operand: int | str) -> str:
        """A C++ expression of [base + offset]; parameters give their host address."""
        text = self.ops[operand] if isinstance(operand, int) else operand
        m = re.fullmatch(r"\[\s*([^\s+]+?)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if not m:
            raise Unsupported(f"address {text!r}")
        base = f"({self.names.params[m[1]]})" if m[1] in self.names.params else f"({self.raw(m[1])})"
        return f"(u64){base} + ({int(m[2] or '0', 0)})"

    def space(self) -> str:
        """The C++ name of the memory space."""
        return self.opt(*SPACES, default="generic").upper()

    def strength(self) -> str:
        """The C++ flags of how a memory access orders others."""
        strong = self.has("volatile", "relaxed", "acquire", "release", "acq_rel", "mmio")
        strong |= self.name in ("atom", "red")
        flags = {
            "STRONG": strong,
            "CTA": strong and self.has("cta"),
            "READONLY": self.has("nc") and self.name == "ld",
            "ACQUIRE": self.has("acquire", "acq_rel"),
            "RELEASE": self.has("release", "acq_rel"),
        }
        return "|".join(flag for flag, holds in flags.items() if holds) or "WEAK"


def assign(register: str, e: str) -> str:
    """The assignment to a register; '_' drops the value."""
    return "" if register == "_" else f"{cname(register)} = {e};"


def from_bits(t: str, bits: str) -> str:
    """The C++ value of register bits in type t."""
    convert = {"f64": "d", "f32": "f", "f16": "h2f", "bf16": "b2f"}.get(t)
    return f"{convert}({bits})" if convert else f"({ctype(t)})({bits})"


def literal(text: str, t: str) -> str | None:
    """The bits of a constant in type t as C++; None for what is none."""
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return f"0x{m[1]}u"
    if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return f"0x{m[1]}ull"
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
        octal = re.sub(r"^(-?)0(\d+)$", r"\g<1>0o\2", text.rstrip("U"))
        v = int(octal, 0)
        return f"((s64){v}ll)" if -(2**63) < v < 2**63 else f"{v % 2**64}ull"
    if re.fullmatch(r"-?\d+\.\d*([eE][+-]?\d+)?", text):
        return f"ub({text})" if t == "f64" else f"ub({text}f)"
    return None


def initial(text: str, t: str) -> str:
    """The bits of an initial value of type t: a constant, or the address of a variable."""
    number = literal(text, t)
    return f"(u64){cname(text)}" if number is None else number


def statement(ins: Instr, names: Names, targets: dict[str, list[str]]) -> str:
    """The C++ statement of an instruction."""
    name = ins.text.split(".")[0]
    if name not in OPS:
        raise Unsupported(ins.text)
    return OPS[name](Ins(ins, names, targets))
