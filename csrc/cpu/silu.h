// SiLU on sixteen lanes; included by kernel files, once per instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// 1 + exp(-z), to a relative 2e-7 and 1.4e-8 |z| more, what float32's log2(e) lacks; infinite from z = -88.4
// downwards, where z / infinity is -0 as it should be. 2^t is 2^n p(t - n), p a minimax polynomial of ours, and
// n + 127 comes out of a sum's low bits as the exponent of a float: 0 for n = -127, infinity for n = 128.
DDPM_FAST_INLINE F one_plus_exp_neg(F z) {
  constexpr float kRound = 12582912.0f + 127.0f;
  const F y = min(max(z, -88.9f), 88.0f);
  const F t = fma(y, splat(-0x1.715476p+0f), splat(kRound));
  const F f = fma(y, splat(-0x1.715476p+0f), kRound - t);
  F p = fma(splat(0x1.5bda56p-10f), f, splat(0x1.3ce8aep-7f));
  p = fma(p, f, splat(0x1.c6b6d8p-5f));
  p = fma(p, f, splat(0x1.ebf9c2p-3f));
  p = fma(p, f, splat(0x1.62e42ap-1f));
  p = fma(p, f, splat(1.0f));
  return fma(p, from_bits(shift_left<23>(bits(t))), splat(1.0f));
}

DDPM_FAST_INLINE F silu(F z) { return z / one_plus_exp_neg(z); }

// silu'(z) = s (1 + z (1 - s)), s = sigmoid(z).
DDPM_FAST_INLINE F silu_derivative(F z) {
  const F s = splat(1.0f) / one_plus_exp_neg(z);
  return fma(s, z * (1.0f - s), s);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
