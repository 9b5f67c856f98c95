"""Translators of arithmetic: integers and floats, bits, comparison, conversion."""

from __future__ import annotations

from .instruction import FLOATS, ROUNDING, Ins, Unsupported, assign, cname, ctype, from_bits, op
from .parse import SIZE

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
C_OP = {"and": "&", "or": "|", "xor": "^"}


def fused(i: Ins, t: str, a: list[str]) -> str:
    e = f"ffma<{i.rnd}>({', '.join(a)})" if t in ("f32", "f64") else f"fma_odd({', '.join(a)})"
    if i.has("relu"):
        return f"relu({e})"
    return f"sat({e})" if i.sat and t in ("f16", "bf16") and i.t != t else e


def _flushed(i: Ins, lanes: list[str]) -> list[str]:
    """The lanes of packed f32 operands, flushed where .ftz says so."""
    return [f"fz({x})" for x in lanes] if i.ftz and i.packed == "f32" else lanes


def _mixed(i: Ins, halves: int) -> list[str] | None:
    """The float32 operands of add.f32.bf16 and the like, whose first `halves` are widened; None for one type."""
    if len(i.types) == 1:
        return None
    if i.types not in (["f32", "f16"], ["f32", "bf16"]) or i.name == "mul":
        raise Unsupported(i.full)
    widened = [f"(float)({i.val(k, i.t)})" for k in range(1, 1 + halves)]
    return [*widened, *(i.val(k, "f32") for k in range(1 + halves, len(i.ops)))]


@op("add", "sub", "mul")
def add_sub_mul(i: Ins) -> str:
    symbol = {"add": "+", "sub": "-", "mul": "*"}[i.name]
    rounded = f"f{i.name}<{i.rnd}>"
    if mixed := _mixed(i, halves=1):
        return i.set(f"{rounded}({', '.join(mixed)})", "f32")
    if i.packed in FLOATS:
        sat = "sat" if i.sat else ""
        return i.lanes(i.packed, lambda a: f"{sat}({rounded}({', '.join(_flushed(i, a))}))")
    if i.packed:
        return i.lanes(i.packed, lambda a: f"{a[0]} {symbol} {a[1]}")
    if i.isf:
        return i.set(f"{rounded}({i.val(1)}, {i.val(2)})")
    if i.name == "mul":
        return i.bits_to(0, product(i))
    u = "u" + str(i.bits)
    if i.has("cc"):
        return i.bits_to(0, f"{i.name}x<{u}>({i.raw(1)}, {i.raw(2)}, 0, CC)")
    if i.sat:
        return i.bits_to(0, f"{i.name}_sat<s32>({i.raw(1)}, {i.raw(2)})")
    return i.bits_to(0, f"({ctype(i.t)})(({u})({i.raw(1)}) {symbol} ({u})({i.raw(2)}))")


def _with_carry(i: Ins, e: str) -> str:
    """Assigns a sum or difference `e` that leaves its carry in C_."""
    return f"{{ u32 C_; {i.bits_to(0, e)} {'CC = C_;' if i.has('cc') else ''} }}"


@op("addc", "subc")
def add_carry(i: Ins) -> str:
    return _with_carry(i, f"{i.name[:3]}x<u{i.bits}>({i.raw(1)}, {i.raw(2)}, CC, C_)")


def product(i: Ins) -> str:
    """The product of mul and mad."""
    if i.has("wide"):
        w = ctype(WIDE[i.t])
        return f"({w})(({w}){i.val(1)} * ({w}){i.val(2)})"
    if i.has("hi"):
        return f"mulhi<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})"
    return f"(u{i.bits})((u64)({i.raw(1)}) * (u64)({i.raw(2)}))"


@op("mad", "madc")
def mad(i: Ins) -> str:
    if i.isf:
        return fma(i)
    u = f"u{i.bits}"
    if i.name == "madc" or i.has("cc"):
        return _with_carry(i, f"addx<{u}>({product(i)}, {i.raw(3)}, {'CC' if i.name == 'madc' else '0'}, C_)")
    if i.has("wide"):
        return i.bits_to(0, f"{product(i)} + {i.val(3, WIDE[i.t])}")
    if i.sat:
        return i.bits_to(0, f"add_sat<s32>({product(i)}, {i.raw(3)})")
    return i.bits_to(0, f"({ctype(i.t)})(({u}){product(i)} + ({u})({i.raw(3)}))")


@op("mul24", "mad24")
def mul24(i: Ins) -> str:
    e = f"mul24<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)}, {int(i.one('lo', 'hi') == 'hi')})"
    return i.bits_to(0, f"{e} + (u32)({i.raw(3)})" if i.name == "mad24" else e)


@op("fma")
def fma(i: Ins) -> str:
    if mixed := _mixed(i, halves=2):
        return i.set(fused(i, "f32", mixed), "f32")
    if i.packed:
        return i.lanes(i.packed, lambda a: fused(i, i.packed, _flushed(i, a)))
    return i.set(fused(i, i.t, [i.val(1), i.val(2), i.val(3)]))


@op("div")
def div(i: Ins) -> str:
    if not i.isf:
        return i.bits_to(0, f"idiv<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})")
    if i.has("approx", "full"):
        return i.set(f"approx({'div_approx' if i.has('approx') else 'fdiv'}({i.val(1)}, {i.val(2)}), 0x1p-22)")
    return i.set(f"fdiv<{i.rnd}>({i.val(1)}, {i.val(2)})")


@op("rem")
def rem(i: Ins) -> str:
    return i.bits_to(0, f"irem<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})")


@op("neg", "abs")
def neg_abs(i: Ins) -> str:
    t = i.packed or i.t
    if t in FLOATS:
        lane = SIZE[t] * 8
        signs = sum(1 << k for k in range(lane - 1, i.bits, lane))
        x = f"ub({i.val(1)})" if i.ftz else i.raw(1)
        rule = f"^ {hex(signs)}ull" if i.name == "neg" else f"& {hex(2**i.bits - 1 - signs)}ull"
        return i.bits_to(0, f"(u{i.bits})({x}) {rule}")
    negated = f"0 - (u64){i.val(1)}"
    return i.bits_to(0, f"({ctype(i.t)})({negated if i.name == 'neg' else f'{i.val(1)} < 0 ? {negated} : {i.val(1)}'})")


def _pick(i: Ins, a: list[str]) -> str:
    """The smaller or larger of two or three floats."""
    name = {"min": "fmn", "max": "fmx"}[i.name]
    x, y = a[:2]
    if i.has("xorsign"):
        e = f"xorsign({x}, {y}, ({name}(std::abs({x}), std::abs({y}))))"
    elif len(a) == 2:
        e = f"{name}({x}, {y})"
    else:
        e = f"{name}({name}({x}, {y}), {a[2]})"
    if i.has("NaN"):
        e = f"nanif({x}, {y}, {e})"
        e = e if len(a) == 2 else f"nanif({a[2]}, {x}, {e})"
    return e


@op("min", "max")
def min_max(i: Ins) -> str:
    if i.packed in FLOATS:
        return i.lanes(i.packed, lambda a: _pick(i, a))
    if i.packed:
        return i.lanes(i.packed, lambda a: f"std::{i.name}({a[0]}, {a[1]})")
    if i.isf:
        values = [i.val(k) for k in range(1, len(i.ops))]
        return i.set(f"({'double' if i.t == 'f64' else 'float'}){_pick(i, values)}")
    e = f"std::{i.name}({i.val(1)}, {i.val(2)})"
    return i.bits_to(0, f"relu({e})" if i.has("relu") else e)


@op("sad")
def sad(i: Ins) -> str:
    a, b = i.val(1), i.val(2)
    return i.bits_to(0, f"(u64)({i.raw(3)}) + ({a} < {b} ? (u64){b} - (u64){a} : (u64){a} - (u64){b})")


@op("dp4a")
def dp4a(i: Ins) -> str:
    return i.bits_to(0, f"dp4a<{i.types[0][0]}8, {i.types[1][0]}8>({i.raw(1)}, {i.raw(2)}, {i.raw(3)})")


@op("sqrt", "rcp")
def sqrt_rcp(i: Ins) -> str:
    e = f"f{i.name}<{i.rnd}>({i.val(1)})"
    return i.set(f"approx({e}, 0x1p-22)" if i.has("approx") and i.t == "f32" else e)


UNARY = {
    "ex2": "approx(exp2f({}), 0x1p-22)",
    "lg2": "approx(log2f({}), 0x1p-22, 0x1p-22)",
    "sin": "approx(sinf({}), 0, 0x1p-20)",
    "cos": "approx(cosf({}), 0, 0x1p-20)",
    "tanh": "approx(tanhf({}), 0x1p-11)",
    "rsqrt": "approx(1 / sqrtf({}), 0x1p-22)",
}


@op(*UNARY)
def unary(i: Ins) -> str:
    if h := i.packed:
        return i.lanes(h, lambda a: UNARY[i.name].format(a[0]))
    return i.set(f"1 / sqrt({i.val(1)})" if i.t == "f64" else UNARY[i.name].format(i.val(1)))


@op("copysign")
def copysign(i: Ins) -> str:
    m = 1 << (i.bits - 1)
    return i.bits_to(0, f"((u{i.bits})({i.raw(2)}) & {m - 1}ull) | ((u{i.bits})({i.raw(1)}) & {m}ull)")


@op("testp")
def testp(i: Ins) -> str:
    v = i.val(1)
    return i.bits_to(
        0,
        {
            "finite": f"std::isfinite({v})",
            "infinite": f"std::isinf({v})",
            "number": f"{v} == {v}",
            "notanumber": f"{v} != {v}",
            "normal": f"std::isnormal({v})",
            "subnormal": f"std::fpclassify({v}) == FP_SUBNORMAL",
        }[i.mods[0]],
    )


# ---- bits
@op("and", "or", "xor")
def logic(i: Ins) -> str:
    return i.bits_to(0, f"{i.raw(1)} {C_OP[i.name]} {i.raw(2)}")


@op("not", "cnot")
def invert(i: Ins) -> str:
    return i.bits_to(
        0, f"!{i.raw(1)}" if i.t == "pred" else f"~{i.val(1)}" if i.name == "not" else f"{i.val(1)} ? 0 : 1"
    )


@op("shl", "shr")
def shift(i: Ins) -> str:
    return i.bits_to(0, f"{i.name}<{ctype(i.t)}>({i.raw(1)}, {i.raw(2)})")


@op("shf")
def funnel_shift(i: Ins) -> str:
    n = f"((u32)({i.raw(3)}) & 31)" if i.has("wrap") else f"std::min((u32)({i.raw(3)}), 32u)"
    v = f"((u64)(u32)({i.raw(2)}) << 32 | (u32)({i.raw(1)}))"
    return i.bits_to(0, f"(u32)({v} << {n} >> 32)" if i.has("l") else f"(u32)({v} >> {n})")


@op("bfe", "bfi")
def bit_field(i: Ins) -> str:
    return i.bits_to(0, f"{i.name}<{ctype(i.t)}>({', '.join(i.raw(k) for k in range(1, len(i.ops)))})")


PRMT_MODES = {
    "f4e": "3210 4321 5432 6543",
    "b4e": "5670 6701 7012 0123",
    "rc8": "0000 1111 2222 3333",
    "ecl": "3210 3211 3222 3333",
    "ecr": "0000 1110 2210 3210",
    "rc16": "1010 3232 1010 3232",
}


@op("prmt")
def prmt(i: Ins) -> str:
    selector = i.raw(3)
    if mode := i.opt(*PRMT_MODES):
        selector = "(const u32[]){" + ", ".join("0x" + s for s in PRMT_MODES[mode].split()) + f"}}[{selector} & 3]"
    return i.bits_to(0, f"prmt({i.raw(1)}, {i.raw(2)}, {selector})")


@op("lop3")
def lop3(i: Ins) -> str:
    return i.bits_to(0, f"lop3({i.raw(1)}, {i.raw(2)}, {i.raw(3)}, {i.raw(4)})")


@op("popc")
def popc(i: Ins) -> str:
    return i.set(f"__builtin_popcountll({i.val(1)})", "u32")


@op("clz")
def clz(i: Ins) -> str:
    return i.set(f"{i.val(1)} ? __builtin_clzll({i.val(1)}) - {64 - i.bits} : {i.bits}", "u32")


@op("brev")
def brev(i: Ins) -> str:
    return i.bits_to(0, f"brev<{ctype(i.t)}>({i.raw(1)})")


@op("bfind")
def bfind(i: Ins) -> str:
    return i.set(f"bfind<{ctype(i.t)}>({i.raw(1)}, {int(i.has('shiftamt'))})", "u32")


# ---- comparison and selection
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}


def comparison(i: Ins, a: str, b: str, t: str) -> str:
    c = i.mods[0]
    if t not in FLOATS:
        return (
            f"({a} {COMPARE[c]} {b})"
            if c not in ("lo", "ls", "hi", "hs") or t[0] != "s"
            else f"(uns({a}) {COMPARE[c]} uns({b}))"
        )
    ordered = f"({a} == {a} && {b} == {b})"
    if c in ("num", "nan"):
        return ordered if c == "num" else f"!{ordered}"
    return f"(!{ordered} || {a} {COMPARE[c[:-1]]} {b})" if c.endswith("u") else f"({ordered} && {a} {COMPARE[c]} {b})"


@op("setp")
def setp(i: Ins) -> str:
    dst, third = i.ops[0].split("|"), _third(i)
    if i.packed:
        tests = [_compared_lane(i, i.packed, shift) + third for shift in (0, 16)]
    else:
        test = comparison(i, i.val(1), i.val(2), i.t)
        tests = [test + third, f"!{test}{third}"]
    values = [f"(u32)(bool)({test})" for test in tests]
    if len(dst) == 1:
        return f"{cname(dst[0])} = {values[0]};"
    return f"{{ u32 P_ = {values[0]}, Q_ = {values[1]}; {assign(dst[0], 'P_')} {assign(dst[1], 'Q_')} }}"


def _third(i: Ins) -> str:
    """The predicate that a comparison is combined with."""
    return f" {C_OP[i.one(*C_OP)]} (bool)({i.raw(3)})" if len(i.ops) == 4 else ""


def _compared_lane(i: Ins, t: str, shift: int) -> str:
    a, b = (from_bits(t, f"(u16)({i.raw(k)} >> {shift})") for k in (1, 2))
    return comparison(i, a, b, t)


TRUE = {"f32": "0x3f800000u", "f16": "0x3c00u", "bf16": "0x3f80u", "u16": "0xffffu", "s16": "0xffffu"}


@op("set")
def set_(i: Ins) -> str:
    dt, at = i.types[0], i.types[-1]
    if at.endswith("x2"):
        lane = at[:-2]
        true = TRUE[lane] if dt == at else "0xffffu"
        tests = [f"((bool)({_compared_lane(i, lane, sh)}{_third(i)}) ? {true} : 0u) << {sh}" for sh in (0, 16)]
        return i.bits_to(0, " | ".join(tests))
    test = comparison(i, i.val(1, at), i.val(2, at), at) + _third(i)
    return i.bits_to(0, f"(bool)({test}) ? {TRUE.get(dt, '0xffffffffu')} : 0u")


@op("selp")
def selp(i: Ins) -> str:
    return i.bits_to(0, f"{i.raw(3)} ? {i.raw(1)} : {i.raw(2)}")


@op("slct")
def slct(i: Ins) -> str:
    return i.bits_to(0, f"{i.val(3, i.types[-1])} >= 0 ? {i.raw(1)} : {i.raw(2)}")


# ---- conversion
@op("cvt")
def cvt(i: Ins) -> str:
    dt, at = i.types[0], i.types[-1]
    mode = ROUNDING[i.opt(*ROUNDING, default="rn")]
    if i.has("satfinite"):
        raise Unsupported(i.full)
    if dt in ("f16x2", "bf16x2"):
        half, relu = "f2h" if dt == "f16x2" else "f2b", "relu" if i.has("relu") else ""
        high, low = (f"{half}((double){relu}({i.val(k, 'f32')}), {mode})" for k in (1, 2))
        return i.bits_to(0, f"(u32){high} << 16 | {low}")
    if dt == "tf32" and i.has("rna"):
        return i.bits_to(0, f"f2tf32({i.val(1, 'f32')})")
    return _to_float(i, dt, at, mode) if dt in FLOATS else _to_integer(i, dt, at, mode)


def _to_integer(i: Ins, dt: str, at: str, mode: str) -> str:
    value, c = i.val(1, at), ctype(dt)
    if at in FLOATS:
        i.one("rni", "rzi", "rmi", "rpi")
        return i.bits_to(0, f"({c})f2i<{c}>(({'double' if at == 'f64' else 'float'})to_int({value}, {mode}))")
    return i.bits_to(0, f"clamp_to<{c}>({value})" if i.sat else f"({c})({value})")


def _to_float(i: Ins, dt: str, at: str, mode: str) -> str:
    value, ftz = i.val(1, at), i.ftz
    if i.has("rni", "rzi", "rmi", "rpi"):
        e = f"to_int({value}, {mode})"
    elif dt in ("f32", "f64"):
        e = f"fcvt<{'double' if dt == 'f64' else 'float'}, {mode}>({value})"
    else:
        if at not in FLOATS:
            value = f"fcvt<double, {mode}>({value})" if SIZE[at] < 8 else f"int_odd({value})"
        e = f"sat({value})" if i.sat else f"relu({value})" if i.has("relu") else value
        return i.bits_to(0, f"{'f2h' if dt == 'f16' else 'f2b'}((double)({e}), {mode})")
    i.ftz = ftz and dt == "f32"
    return i.set(e, dt)
