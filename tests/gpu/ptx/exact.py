"""Exact semantics of PTX arithmetic: integers of a width, and floats by rational arithmetic with one rounding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

# Bits of the significand, smallest and largest exponent.
FORMAT = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}
PACKED_WIDTH = {"f16x2": 32, "bf16x2": 32, "f32x2": 64, "s16x2": 32, "u16x2": 32}
WIDTH = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f64": 0x7FFFFFFFFFFFFFFF}
INF, NaN = math.inf, math.nan


def width(t: str) -> int:
    """Bits of a type."""
    return WIDTH.get(t) or PACKED_WIDTH.get(t) or int(t[1:])


def decode(t: str, bits: int) -> Any:
    """Register bits -> Python value (int, or float that holds any of the formats exactly)."""
    w = width(t)
    bits &= (1 << w) - 1
    if t not in FORMAT:
        return bits - (1 << w) if t[0] == "s" and bits >> (w - 1) and "x" not in t else bits
    p, emin, _emax = FORMAT[t]
    sign, e, m = bits >> (w - 1), bits >> (p - 1) & ((1 << (w - p)) - 1), bits & ((1 << (p - 1)) - 1)
    if e == (1 << (w - p)) - 1:
        return NaN if m else -INF if sign else INF
    v = math.ldexp(m, emin - p + 1) if e == 0 else math.ldexp(m | 1 << (p - 1), e - 1 + emin - p + 1)
    return -v if sign else v


def encode(t: str, x: float | Fraction, mode: str = "rn", zero_sign: int = 0, ftz: bool = False) -> int:
    """Value (int, float or Fraction) -> register bits with one correct rounding."""
    w = width(t)
    if t not in FORMAT:
        return int(x) & ((1 << w) - 1)
    p, emin, emax = FORMAT[t]
    if isinstance(x, float):
        if x != x:
            return NAN[t]
        zero_sign = int(math.copysign(1, x) < 0)
        if math.isinf(x):
            return zero_sign << (w - 1) | ((1 << (w - p)) - 1) << (p - 1)
        x = Fraction(x)
    sign = int(x < 0) if x else zero_sign
    a = abs(Fraction(x))
    if not a:
        return sign << (w - 1)
    e = a.numerator.bit_length() - a.denominator.bit_length()
    e -= a < Fraction(2) ** e
    e = max(e, emin)
    q = a / Fraction(2) ** (e - p + 1)
    n, rest = q.numerator // q.denominator, q - q.numerator // q.denominator
    up = {
        "rn": rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n & 1),
        "rz": False,
        "rm": rest > 0 and sign,
        "rp": rest > 0 and not sign,
    }[mode]
    n += bool(up)
    if n >> p:
        n, e = n >> 1, e + 1
    if e > emax:
        inf = mode == "rn" or (mode == "rp" and not sign) or (mode == "rm" and sign)
        return sign << (w - 1) | (((1 << (w - p)) - 1) << (p - 1) if inf else (((1 << (w - p)) - 1) << (p - 1)) - 1)
    if n < 1 << (p - 1):
        return sign << (w - 1) | (0 if ftz else n)
    return sign << (w - 1) | (e - emin + 1) << (p - 1) | (n - (1 << (p - 1)))


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def neg(x: float) -> bool:
    return math.copysign(1, x) < 0


def fma(t: str, a: float, b: float, c: float, mode: str = "rn", ftz: bool = False) -> int:
    """a * b + c, rounded once; also add (b = 1) and mul (c = -0)."""
    if ftz:
        a, b, c = flush(a), flush(b), flush(c)
    if not all(map(math.isfinite, (a, b, c))):
        p = (
            NaN
            if (a == 0 or b == 0) and (math.isinf(a) or math.isinf(b))
            else a * b
            if not (math.isfinite(a) and math.isfinite(b))
            else math.copysign(1.0, a) * math.copysign(1.0, b)
        )
        return encode(t, p + c)
    r = Fraction(a) * Fraction(b) + Fraction(c)
    ps, cs = neg(a) != neg(b), neg(c)
    return encode(t, r, mode, int(ps if ps == cs else mode == "rm"), ftz)


def mul(t: str, a: float, b: float, mode: str = "rn", ftz: bool = False) -> int:
    if ftz:
        a, b = flush(a), flush(b)
    if not (math.isfinite(a) and math.isfinite(b)):
        return encode(t, a * b)
    return encode(t, Fraction(a) * Fraction(b), mode, int(neg(a) != neg(b)), ftz)


def div(t: str, a: float, b: float, mode: str = "rn", ftz: bool = False) -> int:
    if ftz:
        a, b = flush(a), flush(b)
    s = -1.0 if neg(a) != neg(b) else 1.0
    if a != a or b != b or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return encode(t, NaN)
    if math.isinf(a) or b == 0:
        return encode(t, s * INF)
    return encode(t, s * 0.0) if math.isinf(b) else encode(t, Fraction(a) / Fraction(b), mode, int(s < 0), ftz)


def sqrt(t: str, a: float, mode: str = "rn", ftz: bool = False) -> int:
    a = flush(a) if ftz else a
    if a != a or a < 0:
        return encode(t, NaN)
    if a == 0 or math.isinf(a):
        return encode(t, a)
    f = Fraction(a)
    k = 2 * (FORMAT[t][0] + 8) + f.denominator.bit_length() + 2  # 2**(2k) scaling keeps enough bits; sticky below
    r = math.isqrt((f.numerator << (2 * k)) // f.denominator)
    exact = r * r * f.denominator == f.numerator << (2 * k)
    return encode(t, Fraction(2 * r + (not exact), 1 << (k + 1)), mode, 0, ftz)


def round_int(x: float, mode: str) -> int:
    """The integer that a float rounds to."""
    rules: dict[str, Callable[[Fraction], int]] = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}
    return rules[mode](Fraction(x))


def edges(t: str) -> list[int]:
    w = width(t)
    if t in FORMAT:
        one = encode(t, 1.0)
        m = [
            0,
            1,
            (1 << (FORMAT[t][0] - 1)) - 1,
            1 << (FORMAT[t][0] - 1),
            one,
            one + 1,
            one - 1,
            encode(t, 0.5),
            encode(t, 1.5),
            encode(t, 2.5),
            encode(t, 100.0),
            encode(t, INF) - 1,
            encode(t, INF),
            encode(t, 3e4),
            encode(t, 65535.0),
            encode(t, 2.0**31) if t != "f16" else 77,
        ]
        return m + [x | 1 << (w - 1) for x in m] + [NAN[t], encode(t, INF) + 1]
    return sorted(
        {
            x & ((1 << w) - 1)
            for x in [
                0,
                1,
                2,
                3,
                5,
                7,
                31,
                32,
                33,
                63,
                64,
                255,
                256,
                0xFFFF,
                0x7FFF,
                -1,
                -2,
                -3,
                -128,
                1 << (w - 1),
                (1 << (w - 1)) - 1,
                (1 << (w - 1)) + 1,
                0x5555555555555555,
                0x0123456789ABCDEF,
            ]
        }
    )


def inputs(t: str, n: int, rng: random.Random) -> list[int]:
    """n register values: edges, and random bits of random magnitude."""
    w, e = width(t), edges(t)
    out = []
    for _k in range(n):
        r = rng.random()
        if r < 0.4:
            out.append(rng.choice(e))
        elif r < 0.7:
            out.append(rng.getrandbits(w))
        elif t in FORMAT:
            out.append(encode(t, rng.uniform(-8, 8) * 2.0 ** rng.randint(-12, 10)))
        else:
            v = rng.getrandbits(rng.randint(1, w))
            out.append((-v if rng.random() < 0.3 else v) & ((1 << w) - 1))
    return out
