"""Device functions of one denoising step, each operation rounded on its own, in the order of the reference's step.

Kernels that use them are compiled without fusion. Comparisons that keep the value where they fail let a NaN through,
as torch's clamp does.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(0)
X0 = tl.constexpr(1)
V = tl.constexpr(2)
X_PREV = tl.constexpr(3)

FIXED = tl.constexpr(0)
LEARNED = tl.constexpr(1)
LEARNED_RANGE = tl.constexpr(2)

_hex = float.fromhex
_LOG2_E = tl.constexpr(_hex("0x1.715476p+0"))
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits
_LN2_HIGH = tl.constexpr(_hex("0x1.62e4p-1"))
_LN2_LOW = tl.constexpr(_hex("0x1.7f7d1cp-20"))
_EXP6 = tl.constexpr(_hex("0x1.6a2430p-10"))
_EXP5 = tl.constexpr(_hex("0x1.1239e4p-7"))
_EXP4 = tl.constexpr(_hex("0x1.5558f2p-5"))
_EXP3 = tl.constexpr(_hex("0x1.555492p-3"))
_EXP2 = tl.constexpr(_hex("0x1.fffffcp-2"))


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def exp_poly(x):
    """exp on [-87, 88], clamped there, within 1 ulp: the same polynomial in every backend."""
    y = tl.clamp(x, -87.0, 88.0, propagate_nan=tl.PropagateNan.ALL)
    t = y * _LOG2_E + _ROUND
    n = t - _ROUND
    r = (y - n * _LN2_HIGH) - n * _LN2_LOW
    p = r * _EXP6 + _EXP5
    p = p * r + _EXP4
    p = p * r + _EXP3
    p = p * r + _EXP2
    p = ((p * r) * r + r) + 1.0
    exponent = t.to(tl.int32, bitcast=True) << 23
    scaled = (p.to(tl.int32, bitcast=True) + exponent).to(tl.float32, bitcast=True)
    # The bits of a GPU's NaN, all ones, turn into a number when an exponent is added.
    return tl.where(x == x, scaled, x)


@triton.jit
def guide(conditional, unconditional, guidance_scale):
    return unconditional + guidance_scale * (conditional - unconditional)


@triton.jit
def predict_x0(x_t, output, x0_from_x, x0_from_output, mean_from_x0, mean_from_x, PREDICTION: tl.constexpr):
    if PREDICTION == X0:
        x0 = output
    elif PREDICTION == X_PREV:
        x0 = tl.div_rn(output - mean_from_x * x_t, mean_from_x0)
    else:
        x0 = x0_from_x * x_t - x0_from_output * output
    return x0


@triton.jit
def learned_sigma(output, sigma, log_min, log_max, VARIANCE: tl.constexpr):
    """The standard deviation from the output's variance channels; the row's sigma masks the last step."""
    log_variance = output
    if VARIANCE == LEARNED_RANGE:
        fraction = (output + 1.0) * 0.5
        log_variance = fraction * log_max + (1.0 - fraction) * log_min
    return sigma * exp_poly(0.5 * log_variance)
