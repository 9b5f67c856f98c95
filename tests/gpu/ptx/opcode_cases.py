"""Every arithmetic instruction form, and what it gives in exact arithmetic (exact.py)."""
# mypy: ignore-errors
# The table is made of lambdas over loop variables, whose types mypy does not infer.

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from .exact import INF, NaN, decode, div, encode, flush, fma, mul, neg, round_int, sqrt, width


class Case(NamedTuple):
    """Instructions on {a}, {b}, {c} that leave their result in {d}.

    `expected` takes the operands' values and returns an int, a float, ("bits", n), or None where anything is allowed.
    """

    asm: str
    result: str
    operands: Sequence[str]
    expected: Callable[..., Any]
    choices: Mapping[int, Sequence[int]]  # operand -> the values that are worth trying
    tolerance: tuple[float, bool] | None  # relative error of an approximation; whether small results are flushed
    arch: int


CASES: dict[str, Case] = {}


def case(
    asm: str,
    result: str,
    operands: Sequence[str],
    expected: Callable[..., Any],
    choices: Mapping[int, Sequence[int]] | None = None,
    tol: tuple[float, bool] | None = None,
    arch: int = 90,
) -> None:
    """Adds a case, named after its instruction."""
    instruction = asm.split(" {")[0]
    name = instruction.replace("{", "").replace("}", "")
    if instruction in CASES or asm.startswith("setp"):
        name += f"#{len(CASES)}"
    CASES[name] = Case(asm, result, operands, expected, choices or {}, tol, arch)


def b(x: int) -> tuple[str, int]:
    """A result that is given by its bits."""
    return ("bits", x)


def wrap(t: str, v: int) -> Any:
    return decode(t, v & ((1 << width(t)) - 1))


def clamp(t: str, v: int) -> int:
    w = width(t)
    lo, hi = (-(1 << w - 1), (1 << w - 1) - 1) if t[0] == "s" else (0, (1 << w) - 1)
    return min(max(v, lo), hi)


def tdiv(a: int, d: int) -> int:
    """Division that truncates, as C's does."""
    return int(Fraction(abs(a), abs(d))) * (1 if (a < 0) == (d < 0) else -1)


SHIFT = [0, 1, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 255, 256, 0x80000000, 0xFFFFFFFF]
SMALL = [0, 1, 2, 5, 8, 15, 16, 31, 32, 33, 40, 63, 64, 65, 100, 200, 255, 256, 300]
INTS = ("u16", "s16", "u32", "s32", "u64", "s64")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}

# ---- integers
for t in INTS:
    w = width(t)
    case(f"add.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: x + y)
    case(f"sub.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: x - y)
    case(f"mul.lo.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: x * y)
    case(f"mul.hi.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y, w=w: x * y >> w)
    case(f"mad.lo.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [t, t, t], lambda x, y, z: x * y + z)
    case(f"mad.hi.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [t, t, t], lambda x, y, z, w=w: (x * y >> w) + z)
    if t in WIDE:
        case(f"mul.wide.{t} {{d}}, {{a}}, {{b}};", WIDE[t], [t, t], lambda x, y: x * y)
        case(f"mad.wide.{t} {{d}}, {{a}}, {{b}}, {{c}};", WIDE[t], [t, t, WIDE[t]], lambda x, y, z: x * y + z)
    case(f"div.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: tdiv(x, y) if y else -1)
    case(f"rem.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: x - tdiv(x, y) * y if y else -1)
    case(f"min.{t} {{d}}, {{a}}, {{b}};", t, [t, t], min)
    case(f"max.{t} {{d}}, {{a}}, {{b}};", t, [t, t], max)
    case(f"sad.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [t, t, t], lambda x, y, z: z + abs(x - y))
    case(f"shr.{t} {{d}}, {{a}}, {{b}};", t, [t, "u32"], lambda x, n: x >> n if n < 64 else -(x < 0), {1: SHIFT})
    for c, f in {
        "eq": lambda x, y: x == y,
        "ne": lambda x, y: x != y,
        "lt": lambda x, y: x < y,
        "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y,
        "ge": lambda x, y: x >= y,
    }.items():
        case(
            f"setp.{c}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", [t, t], lambda x, y, f=f: int(f(x, y))
        )
    if t[0] == "s":
        case(f"neg.{t} {{d}}, {{a}};", t, [t], lambda x: -x)
        case(f"abs.{t} {{d}}, {{a}};", t, [t], abs)
    else:
        for c, f in {
            "lo": lambda x, y: x < y,
            "ls": lambda x, y: x <= y,
            "hi": lambda x, y: x > y,
            "hs": lambda x, y: x >= y,
        }.items():
            case(
                f"setp.{c}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;",
                "u32",
                [t, t],
                lambda x, y, f=f: int(f(x, y)),
            )
for t in ("u32", "s32", "u64", "s64"):
    w = width(t)

    def bfe(x, pos, n, t=t, w=w):
        pos, n, u = pos & 255, n & 255, x & ((1 << w) - 1)
        sign = u >> min(pos + n - 1, w - 1) & 1 if t[0] == "s" and n else 0
        return sum((u >> (pos + k) & 1 if k < n and pos + k < w else sign) << k for k in range(w))

    case(f"bfe.{t} {{d}}, {{a}}, {{b}}, {{c}};", t, [t, "u32", "u32"], bfe, {1: SMALL, 2: SMALL})

    def bfind(x, t=t, w=w):
        u = ~x & ((1 << w) - 1) if x < 0 else x
        return u.bit_length() - 1

    case(f"bfind.{t} {{d}}, {{a}};", "u32", [t], bfind)
    case(f"bfind.shiftamt.{t} {{d}}, {{a}};", "u32", [t], lambda x, f=bfind, w=w: -1 if f(x) < 0 else w - 1 - f(x))
for t in ("u32", "s32"):
    for h in ("lo", "hi"):

        def m24(x, t=t):
            return (x & 0xFFFFFF) - (1 << 24 if t == "s32" and x >> 23 & 1 else 0)

        case(
            f"mul24.{h}.{t} {{d}}, {{a}}, {{b}};",
            t,
            [t, t],
            lambda x, y, h=h, m=m24: m(x) * m(y) >> (16 if h == "hi" else 0),
        )
        case(
            f"mad24.{h}.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            t,
            [t, t, t],
            lambda x, y, z, h=h, m=m24: (m(x) * m(y) >> (16 if h == "hi" else 0)) + z,
        )
case("add.sat.s32 {d}, {a}, {b};", "s32", ["s32", "s32"], lambda x, y: clamp("s32", x + y))
case("sub.sat.s32 {d}, {a}, {b};", "s32", ["s32", "s32"], lambda x, y: clamp("s32", x - y))
case("mad.hi.sat.s32 {d}, {a}, {b}, {c};", "s32", ["s32"] * 3, lambda x, y, z: clamp("s32", (x * y >> 32) + z))
for t in ("u32", "u64"):
    w, k = width(t), {"u32": "r", "u64": "rd"}[t]
    tmp = f"%{k}9"
    case(
        f"add.cc.{t} {tmp}, {{a}}, {{b}}; addc.{t} {{d}}, {{a}}, {{c}};",
        t,
        [t] * 3,
        lambda x, y, z, w=w: x + z + (x + y >> w),
    )
    case(
        f"add.cc.{t} {tmp}, {{a}}, {{b}}; addc.cc.{t} {tmp}, {{b}}, {{c}}; addc.{t} {{d}}, 0, {{a}};",
        t,
        [t] * 3,
        lambda x, y, z, w=w: x + (y + z + (x + y >> w) >> w),
    )
    case(f"sub.cc.{t} {tmp}, {{a}}, {{b}}; subc.{t} {{d}}, {{a}}, {{c}};", t, [t] * 3, lambda x, y, z: x - z - (x < y))
    case(
        f"sub.cc.{t} {tmp}, {{a}}, {{b}}; subc.cc.{t} {tmp}, {{b}}, {{c}}; subc.{t} {{d}}, {{a}}, 0;",
        t,
        [t] * 3,
        lambda x, y, z: x - (y < z + (x < y)),
    )
    for h in ("lo", "hi"):

        def p(x, y, h=h, w=w):
            return (x * y >> w) if h == "hi" else x * y & ((1 << w) - 1)

        case(
            f"mad.{h}.cc.{t} {tmp}, {{a}}, {{b}}, {{c}}; madc.{h}.{t} {{d}}, {{b}}, {{c}}, {{a}};",
            t,
            [t] * 3,
            lambda x, y, z, p=p, w=w: p(y, z) + x + (p(x, y) + z >> w),
        )
case(
    "mad.hi.cc.s32 %r9, {a}, {b}, {c}; addc.u32 {d}, {a}, 0;",
    "s32",
    ["s32"] * 3,
    lambda x, y, z: x + ((x * y >> 32 & 0xFFFFFFFF) + (z & 0xFFFFFFFF) >> 32),
)
for t in ("b16", "b32", "b64"):
    w, u = width(t), "u" + t[1:]
    for o, f in {"and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y}.items():
        case(f"{o}.{t} {{d}}, {{a}}, {{b}};", u, [u, u], f)
    case(f"not.{t} {{d}}, {{a}};", u, [u], lambda x: ~x)
    case(f"cnot.{t} {{d}}, {{a}};", u, [u], lambda x: int(x == 0))
    case(f"shl.{t} {{d}}, {{a}}, {{b}};", u, [u, "u32"], lambda x, n: x << n if n < 64 else 0, {1: SHIFT})
    case(
        f"setp.gt.u32 %p1, {{c}}, 7; selp.{t} {{d}}, {{a}}, {{b}}, %p1;",
        u,
        [u, u, "u32"],
        lambda x, y, z: x if z > 7 else y,
    )
for t in ("b32", "b64"):
    w, u = width(t), "u" + t[1:]
    case(f"popc.{t} {{d}}, {{a}};", "u32", [u], lambda x: bin(x).count("1"))
    case(f"clz.{t} {{d}}, {{a}};", "u32", [u], lambda x, w=w: w - x.bit_length())
    case(f"brev.{t} {{d}}, {{a}};", u, [u], lambda x, w=w: int(format(x, f"0{w}b")[::-1], 2))

    def bfi(x, y, pos, n, w=w):
        pos, n = pos & 255, n & 255
        for k in range(min(n, max(w - pos, 0))):
            y = y & ~(1 << pos + k) | (x >> k & 1) << pos + k
        return y

    for pos, n in ((0, 8), (5, 0), (31, 4), (40, 30), (3, 255)):
        case(f"bfi.{t} {{d}}, {{a}}, {{b}}, {pos}, {n};", u, [u, u], lambda x, y, f=bfi, p=pos, n=n: f(x, y, p, n))
    case(
        f"and.b32 %r9, {{c}}, 511; bfi.{t} {{d}}, {{a}}, {{b}}, %r9, 9;",
        u,
        [u, u, "u32"],
        lambda x, y, z, f=bfi: f(x, y, z & 511, 9),
    )
for m in ("l", "r"):
    for clamp_ in ("clamp", "wrap"):

        def shf(x, y, n, m=m, c=clamp_):
            n = min(n, 32) if c == "clamp" else n & 31
            return ((y << 32 | x) << n >> 32) if m == "l" else (y << 32 | x) >> n

        case(f"shf.{m}.{clamp_}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "u32", ["u32"] * 3, shf, {2: SHIFT})


def prmt(x, y, s, mode=None):
    v = (y << 32 | x).to_bytes(8, "little")
    if mode:
        n = s & 3
        sel = {
            "f4e": [n, n + 1, n + 2, n + 3],
            "b4e": [n, (n - 1) % 8, (n - 2) % 8, (n - 3) % 8],
            "rc8": [n] * 4,
            "ecl": [max(n, k) for k in range(4)],
            "ecr": [min(n, k) for k in range(4)],
            "rc16": [2 * (n & 1), 2 * (n & 1) + 1] * 2,
        }[mode]
        return sum(v[k] << 8 * i for i, k in enumerate(sel))
    return sum(
        (v[k & 7] if not k & 8 else 255 * (v[k & 7] >> 7)) << 8 * i
        for i, k in enumerate(s >> 4 * i & 15 for i in range(4))
    )


case("prmt.b32 {d}, {a}, {b}, {c};", "u32", ["u32"] * 3, prmt)
for m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"):
    case(f"prmt.b32.{m} {{d}}, {{a}}, {{b}}, {{c}};", "u32", ["u32"] * 3, lambda x, y, z, m=m: prmt(x, y, z, m))
for lut in (0x00, 0x96, 0xE8, 0xCA, 0x1B, 0x80, 0xFE, 0xFF, 0x6A):
    case(
        f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {lut};",
        "u32",
        ["u32"] * 3,
        lambda x, y, z, table=lut: sum(
            (table >> ((x >> k & 1) << 2 | (y >> k & 1) << 1 | (z >> k & 1)) & 1) << k for k in range(32)
        ),
    )


def byte(v, k, t):
    return wrap(t, v >> 8 * k & 255)


for p in ("u32", "s32"):
    for q in ("u32", "s32"):
        case(
            f"dp4a.{p}.{q} {{d}}, {{a}}, {{b}}, {{c}};",
            "u32",
            ["u32"] * 3,
            lambda x, y, z, p=p, q=q: z + sum(byte(x, k, p[0] + "8") * byte(y, k, q[0] + "8") for k in range(4)),
        )
for t in ("u16x2", "s16x2"):
    e = t[:3]
    for o, f in {"add": lambda x, y: x + y, "min": min, "max": max}.items():
        case(
            f"{o}.{t} {{d}}, {{a}}, {{b}};",
            "u32",
            ["u32", "u32"],
            lambda x, y, f=f, e=e: sum((f(wrap(e, x >> s), wrap(e, y >> s)) & 0xFFFF) << s for s in (0, 16)),
        )
case("slct.u32.s32 {d}, {a}, {b}, {c};", "u32", ["u32", "u32", "s32"], lambda x, y, z: x if z >= 0 else y)
case("slct.b64.f32 {d}, {a}, {b}, {c};", "u64", ["u64", "u64", "f32"], lambda x, y, z: x if z >= 0 else y)
case("set.lt.u32.s32 {d}, {a}, {b};", "u32", ["s32", "s32"], lambda x, y: -(x < y))
case("set.ge.f32.f32 {d}, {a}, {b};", "f32", ["f32", "f32"], lambda x, y: 1.0 if x >= y else 0.0)
case("set.neu.u32.f32 {d}, {a}, {b};", "u32", ["f32", "f32"], lambda x, y: -(x != y))

# ---- floating point
FMTS = ("f32", "f64", "f16", "bf16")


def fminmax(x, y, big, nan=False):
    if x != x or y != y:
        return NaN if nan or (x != x and y != y) else y if x != x else x
    if x == y == 0:
        return x if neg(x) != big else y
    return max(x, y) if big else min(x, y)


for t in FMTS:
    modes = ("rn", "rz", "rm", "rp") if t in ("f32", "f64") else ("rn",)
    for ftz in (False, True) if t == "f32" else (False,):
        z = ".ftz" if ftz else ""
        for m in modes:
            case(
                f"add.{m}{z}.{t} {{d}}, {{a}}, {{b}};",
                t,
                [t, t],
                lambda x, y, t=t, m=m, f=ftz: b(fma(t, x, 1.0, y, m, f)),
            )
            case(
                f"sub.{m}{z}.{t} {{d}}, {{a}}, {{b}};",
                t,
                [t, t],
                lambda x, y, t=t, m=m, f=ftz: b(fma(t, x, 1.0, -y if y == y else y, m, f)),
            )
            case(f"mul.{m}{z}.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y, t=t, m=m, f=ftz: b(mul(t, x, y, m, f)))
            case(
                f"fma.{m}{z}.{t} {{d}}, {{a}}, {{b}}, {{c}};",
                t,
                [t, t, t],
                lambda x, y, w, t=t, m=m, f=ftz: b(fma(t, x, y, w, m, f)),
            )
            if t in ("f32", "f64"):
                case(
                    f"div.{m}{z}.{t} {{d}}, {{a}}, {{b}};",
                    t,
                    [t, t],
                    lambda x, y, t=t, m=m, f=ftz: b(div(t, x, y, m, f)),
                )
                case(f"sqrt.{m}{z}.{t} {{d}}, {{a}};", t, [t], lambda x, t=t, m=m, f=ftz: b(sqrt(t, x, m, f)))
                case(f"rcp.{m}{z}.{t} {{d}}, {{a}};", t, [t], lambda x, t=t, m=m, f=ftz: b(div(t, 1.0, x, m, f)))
        fl = flush if ftz else (lambda x: x)
        for o in ("min", "max"):
            if t == "f64":
                case(f"{o}.f64 {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y, o=o: fminmax(x, y, o == "max"))
                continue
            for nan in ("", ".NaN"):
                case(
                    f"{o}{z}{nan}.{t} {{d}}, {{a}}, {{b}};",
                    t,
                    [t, t],
                    lambda x, y, o=o, n=bool(nan), f=fl: fminmax(f(x), f(y), o == "max", n),
                )
                case(
                    f"{o}{z}{nan}.xorsign.abs.{t} {{d}}, {{a}}, {{b}};",
                    t,
                    [t, t],
                    lambda x, y, o=o, n=bool(nan), f=fl: (
                        None
                        if (x != x) != (y != y) and not n
                        else math.copysign(fminmax(abs(f(x)), abs(f(y)), o == "max", n), 1 if neg(x) == neg(y) else -1)
                    ),
                )
        if t == "f32":
            case(
                f"add{z}.sat.f32 {{d}}, {{a}}, {{b}};",
                t,
                [t, t],
                lambda x, y, f=fl: (
                    b(encode("f32", 0.0))
                    if not fl_sum(f, x, y) > 0
                    else b(
                        encode(
                            "f32",
                            min(Fraction(fl_sum(f, x, y)) if math.isfinite(fl_sum(f, x, y)) else 1, Fraction(1)),
                            ftz=f is flush,
                        )
                    )
                ),
            )
        cmp = {
            "eq": lambda x, y: x == y,
            "ne": lambda x, y: x < y or x > y,
            "lt": lambda x, y: x < y,
            "le": lambda x, y: x <= y,
            "gt": lambda x, y: x > y,
            "ge": lambda x, y: x >= y,
        }

        def unord(x, y):
            return x != x or y != y

        for c, f in cmp.items():
            case(
                f"setp.{c}{z}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;",
                "u32",
                [t, t],
                lambda x, y, f=f, fl=fl: int(f(fl(x), fl(y))),
            )
            case(
                f"setp.{c}u{z}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;",
                "u32",
                [t, t],
                lambda x, y, f=f, fl=fl: int(unord(x, y) or f(fl(x), fl(y))),
            )
        case(
            f"setp.num{z}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;",
            "u32",
            [t, t],
            lambda x, y: int(not unord(x, y)),
        )
        case(
            f"setp.nan{z}.{t} %p1, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p1;",
            "u32",
            [t, t],
            lambda x, y: int(unord(x, y)),
        )
        if t in ("f32", "f64"):
            case(
                f"setp.nan{z}.{t} %p1|%p2, {{a}}, {{b}}; selp.u32 {{d}}, 1, 0, %p2;",
                "u32",
                [t, t],
                lambda x, y: int(not unord(x, y)),
            )
case(
    "setp.gt.u32 %p3, {a}, 9; setp.lt.and.s32 %p1|%p2, {b}, {c}, !%p3; "
    "selp.u32 %r9, 1, 0, %p1; selp.u32 {d}, 2, %r9, %p2;",
    "u32",
    ["u32", "s32", "s32"],
    lambda x, y, z: 2 if not y < z and not x > 9 else int(y < z and not x > 9),
)


def fl_sum(f, x, y):
    return decode("f64", fma("f64", f(x), 1.0, f(y))) if abs(x) < 1e30 and abs(y) < 1e30 else f(x) + f(y)


def half_bits(t, x, y, fn):
    """Both 16-bit lanes of a packed operation; fn gives register bits."""
    return b(sum((fn(*(decode(t, v >> s & 0xFFFF) for v in (x, y)))) << s for s in (0, 16)))


for t in ("f16", "bf16"):
    p = t + "x2"

    def one(s, x, t=t):
        return decode(t, x >> s & 0xFFFF)

    case(
        f"add.rn.{p} {{d}}, {{a}}, {{b}};",
        "u32",
        [p, p],
        lambda x, y, t=t: half_bits(t, x, y, lambda u, v: fma(t, u, 1.0, v)),
    )
    case(
        f"sub.rn.{p} {{d}}, {{a}}, {{b}};",
        "u32",
        [p, p],
        lambda x, y, t=t: half_bits(t, x, y, lambda u, v: fma(t, u, 1.0, -v if v == v else v)),
    )
    case(
        f"mul.rn.{p} {{d}}, {{a}}, {{b}};",
        "u32",
        [p, p],
        lambda x, y, t=t: half_bits(t, x, y, lambda u, v: mul(t, u, v)),
    )
    case(
        f"fma.rn.{p} {{d}}, {{a}}, {{b}}, {{c}};",
        "u32",
        [p, p, p],
        lambda x, y, z, t=t, o=one: b(sum(fma(t, o(s, x), o(s, y), o(s, z)) << s for s in (0, 16))),
    )
    case(
        f"fma.rn.relu.{t} {{d}}, {{a}}, {{b}}, {{c}};",
        t,
        [t, t, t],
        lambda x, y, z, t=t: b((lambda r: 0 if r >> 15 else r)(fma(t, x, y, z))),
    )
    for o in ("min", "max"):
        case(
            f"{o}.{p} {{d}}, {{a}}, {{b}};",
            "u32",
            [p, p],
            lambda x, y, t=t, o=o: half_bits(t, x, y, lambda u, v: encode(t, fminmax(u, v, o == "max"))),
        )
    case(f"neg.{p} {{d}}, {{a}};", "u32", ["u32"], lambda x: x ^ 0x80008000)
    case(f"abs.{p} {{d}}, {{a}};", "u32", ["u32"], lambda x: x & 0x7FFF7FFF)
    case(f"neg.{t} {{d}}, {{a}};", "u16", ["u16"], lambda x: x ^ 0x8000)
    case(f"abs.{t} {{d}}, {{a}};", "u16", ["u16"], lambda x: x & 0x7FFF)
    case(
        f"setp.lt.{p} %p1|%p2, {{a}}, {{b}}; "
        "selp.u32 %r9, 1, 0, %p1; selp.u32 {d}, 2, 0, %p2; or.b32 {d}, {d}, %r9;",
        "u32",
        [p, p],
        lambda x, y, o=one: int(o(0, x) < o(0, y)) + 2 * int(o(16, x) < o(16, y)),
    )
    case(
        f"set.ge.{p}.{p} {{d}}, {{a}}, {{b}};",
        "u32",
        [p, p],
        lambda x, y, t=t, o=one: b(sum((encode(t, 1.0) if o(s, x) >= o(s, y) else 0) << s for s in (0, 16))),
    )
case(
    "add.rn.sat.f16 {d}, {a}, {b};",
    "f16",
    ["f16", "f16"],
    lambda x, y: (
        0.0 if not x + y > 0 else b(encode("f16", min(Fraction(x) + Fraction(y) if math.isfinite(x + y) else 1, 1)))
    ),
)
for t in ("f32", "f64"):
    case(f"neg.{t} {{d}}, {{a}};", t, [t], lambda x: -x)
    case(f"abs.{t} {{d}}, {{a}};", t, [t], abs)
    case(f"copysign.{t} {{d}}, {{a}}, {{b}};", t, [t, t], lambda x, y: math.copysign(y, x))
    for k, f in {
        "finite": math.isfinite,
        "infinite": math.isinf,
        "number": lambda x: x == x,
        "notanumber": lambda x: x != x,
        "subnormal": lambda x, m={"f32": -126, "f64": -1022}[t]: 0 < abs(x) < 2.0**m,
        "normal": lambda x, m={"f32": -126, "f64": -1022}[t]: math.isfinite(x) and abs(x) >= 2.0**m,
    }.items():
        case(f"testp.{k}.{t} %p1, {{a}}; selp.u32 {{d}}, 1, 0, %p1;", "u32", [t], lambda x, f=f: int(f(x)))
case("neg.ftz.f32 {d}, {a};", "f32", ["f32"], lambda x: -flush(x))
case("abs.ftz.f32 {d}, {a};", "f32", ["f32"], lambda x: abs(flush(x)))
for o, f in {"add": lambda u, v: fma("f32", u, 1.0, v), "mul": lambda u, v: mul("f32", u, v)}.items():
    case(
        f"{o}.rn.f32x2 {{d}}, {{a}}, {{b}};",
        "u64",
        ["f32x2", "f32x2"],
        lambda x, y, f=f: b(sum(f(decode("f32", x >> s), decode("f32", y >> s)) << s for s in (0, 32))),
        arch=100,
    )
    case(
        f"{o}.rn.ftz.f32x2 {{d}}, {{a}}, {{b}};",
        "u64",
        ["f32x2", "f32x2"],
        lambda x, y, o=o: b(
            sum(
                (
                    fma("f32", decode("f32", x >> s), 1.0, decode("f32", y >> s), ftz=True)
                    if o == "add"
                    else mul("f32", decode("f32", x >> s), decode("f32", y >> s), ftz=True)
                )
                << s
                for s in (0, 32)
            )
        ),
        arch=100,
    )
for t in ("f16", "bf16"):
    for m in ("rn", "rz", "rm", "rp"):
        case(
            f"add.{m}.f32.{t} {{d}}, {{a}}, {{b}};",
            "f32",
            [t, "f32"],
            lambda x, y, m=m: b(fma("f32", x, 1.0, y, m)),
            arch=100,
        )
        case(
            f"sub.{m}.f32.{t} {{d}}, {{a}}, {{b}};",
            "f32",
            [t, "f32"],
            lambda x, y, m=m: b(fma("f32", x, 1.0, -y if y == y else y, m)),
            arch=100,
        )
        case(
            f"fma.{m}.f32.{t} {{d}}, {{a}}, {{b}}, {{c}};",
            "f32",
            [t, t, "f32"],
            lambda x, y, z, m=m: b(fma("f32", x, y, z, m)),
            arch=100,
        )
case(
    "fma.rn.f32x2 {d}, {a}, {b}, {c};",
    "u64",
    ["f32x2"] * 3,
    lambda x, y, z: b(
        sum(fma("f32", decode("f32", x >> s), decode("f32", y >> s), decode("f32", z >> s)) << s for s in (0, 32))
    ),
    arch=100,
)
case(
    "min.f32 {d}, {a}, {b}, {c};", "f32", ["f32"] * 3, lambda x, y, z: fminmax(fminmax(x, y, False), z, False), arch=100
)
case(
    "max.NaN.f32 {d}, {a}, {b}, {c};",
    "f32",
    ["f32"] * 3,
    lambda x, y, z: NaN if unord(x, y) or z != z else fminmax(fminmax(x, y, True), z, True),
    arch=100,
)

# ---- conversions
FI = {"u8": "u16", "s8": "s16"}
ALLI = ("u8", "s8", *INTS)


def cvt_int(t):
    """Conversion to 8-bit types goes through a 16-bit register, which it sign- or zero-extends."""
    return FI.get(t, t)


for s in ALLI:
    for dt in ALLI:
        case(f"cvt.{dt}.{s} {{d}}, {{a}};", cvt_int(dt), [cvt_int(s)], lambda x, s=s, dt=dt: wrap(dt, wrap(s, x)))
        if clamp(dt, -(1 << 64)) > clamp(s, -(1 << 64)) or clamp(dt, 1 << 64) < clamp(
            s, 1 << 64
        ):  # ptxas refuses .sat that cannot act
            case(
                f"cvt.sat.{dt}.{s} {{d}}, {{a}};",
                cvt_int(dt),
                [cvt_int(s)],
                lambda x, s=s, dt=dt: clamp(dt, wrap(s, x)),
            )
    for dt in FMTS:
        for m in ("rn", "rz", "rm", "rp") if dt != "bf16" or s not in ("u8", "s8") else ():
            case(
                f"cvt.{m}.{dt}.{s} {{d}}, {{a}};",
                dt,
                [cvt_int(s)],
                lambda x, s=s, dt=dt, m=m: b(encode(dt, Fraction(wrap(s, x)), m)),
            )


def to_int(x, mode, s, dt):
    if x != x:
        return wrap(dt, 1 << width(dt) - 1) if s == "f64" or width(dt) == 64 else 0
    return clamp(dt, round_int(x, mode) if math.isfinite(x) else (1 << 70) * (1 if x > 0 else -1))


for s in FMTS:
    for dt in ALLI:
        for m in ("rni", "rzi", "rmi", "rpi") if s != "bf16" or dt not in ("u8", "s8") else ():
            case(f"cvt.{m}.{dt}.{s} {{d}}, {{a}};", cvt_int(dt), [s], lambda x, s=s, dt=dt, m=m: to_int(x, m, s, dt))
    for dt in FMTS:
        wider = {"f16": 0, "bf16": 0, "f32": 1, "f64": 2}
        exact = wider[dt] > wider[s]
        if s == dt:
            if s in ("f32", "f64", "f16"):
                for m in ("rni", "rzi", "rmi", "rpi"):
                    case(
                        f"cvt.{m}.{dt}.{s} {{d}}, {{a}};",
                        dt,
                        [s],
                        lambda x, m=m: x if not math.isfinite(x) else math.copysign(float(round_int(x, m)), x),
                    )
        elif exact:
            case(f"cvt.{dt}.{s} {{d}}, {{a}};", dt, [s], lambda x: x)
        elif not (s in ("f16", "bf16") and dt in ("f16", "bf16")):
            for m in ("rn", "rz", "rm", "rp") if dt in ("f32", "f16") and dt != "bf16" else ("rn", "rz"):
                case(f"cvt.{m}.{dt}.{s} {{d}}, {{a}};", dt, [s], lambda x, dt=dt, m=m: b(encode(dt, x, m)))
case("cvt.sat.f32.f32 {d}, {a};", "f32", ["f32"], lambda x: 0.0 if not x > 0 else min(x, 1.0))
case("cvt.rn.sat.f16.f32 {d}, {a};", "f16", ["f32"], lambda x: 0.0 if not x > 0 else min(x, 1.0))
case("cvt.ftz.f32.f16 {d}, {a};", "f32", ["f16"], lambda x: x)
case("cvt.rn.ftz.f32.f64 {d}, {a};", "f32", ["f64"], lambda x: b(encode("f32", x, ftz=True)))
case("cvt.rzi.ftz.s32.f32 {d}, {a};", "s32", ["f32"], lambda x: to_int(x, "rzi", "f32", "s32"))
case("cvt.rpi.ftz.s32.f32 {d}, {a};", "s32", ["f32"], lambda x: to_int(flush(x), "rpi", "f32", "s32"))
case("cvt.rn.relu.bf16.f32 {d}, {a};", "bf16", ["f32"], lambda x: x if x != x or x > 0 else 0.0)
for t in ("f16", "bf16"):
    for m in ("rn", "rz"):
        case(
            f"cvt.{m}.{t}x2.f32 {{d}}, {{a}}, {{b}};",
            "u32",
            ["f32", "f32"],
            lambda x, y, t=t, m=m: b(encode(t, x, m) << 16 | encode(t, y, m)),
        )
        case(
            f"cvt.{m}.relu.{t}x2.f32 {{d}}, {{a}}, {{b}};",
            "u32",
            ["f32", "f32"],
            lambda x, y, t=t, m=m: b((0 if x <= 0 else encode(t, x, m)) << 16 | (0 if y <= 0 else encode(t, y, m))),
        )


# ---- approximations: within the documented error of the exact function
def F1(f):
    return lambda x: NaN if x != x else f(x)


def safe(f):
    return lambda x: f(x)


def near(name, fn, tol, fmts=("f32",), ftz=("", ".ftz")):
    for t in fmts:
        for z in ftz:
            case(
                f"{name}{z}.{t} {{d}}, {{a}};",
                t,
                [t],
                lambda x, fn=fn, z=z: NaN if x != x else fn(flush(x) if z else x),
                tol=(tol, bool(z)),
            )


def ex2(x):
    return INF if x > 1000 else 0.0 if x < -1000 else 2.0**x


near("ex2.approx", ex2, 2e-6)
near("lg2.approx", lambda x: NaN if x < 0 else -INF if x == 0 else INF if x == INF else math.log2(x), 2e-6)
near(
    "rsqrt.approx",
    lambda x: math.copysign(INF, x) if x == 0 else NaN if x < 0 else 0.0 if x == INF else 1 / math.sqrt(x),
    2e-6,
)
near("sqrt.approx", lambda x: x if x == 0 else NaN if x < 0 else INF if x == INF else math.sqrt(x), 2e-6)
near("rcp.approx", lambda x: math.copysign(INF, x) if x == 0 else 1 / x, 2e-6)
near("tanh.approx", math.tanh, 2e-3, ("f32", "f16", "bf16"), ("",))
near("ex2.approx", ex2, 4e-3, ("f16",), ("",))
near("ex2.approx", ex2, 8e-3, ("bf16",), (".ftz",))
for name, fn in (("sin", math.sin), ("cos", math.cos)):
    near(f"{name}.approx", lambda x, f=fn: f(x) if abs(x) < 1e4 else NaN if math.isinf(x) else None, 2e-6)
case(
    "div.approx.f32 {d}, {a}, {b};",
    "f32",
    ["f32", "f32"],
    lambda x, y: (
        decode("f32", div("f32", x, y))
        if abs(y) <= 2.0**126 or y != y or math.isinf(y)
        else NaN
        if not math.isfinite(x)
        else math.copysign(0.0, -1 if neg(x) != neg(y) else 1)
    ),
    tol=(4e-7, False),
)
case(
    "div.full.f32 {d}, {a}, {b};",
    "f32",
    ["f32", "f32"],
    lambda x, y: decode("f32", div("f32", x, y)),
    tol=(4e-7, False),
)
