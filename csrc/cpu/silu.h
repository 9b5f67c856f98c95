// SiLU on sixteen lanes; included by kernel files, once per instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// 1 + exp(-z), to a relative 1.4e-7 and 1.4e-8 |z| more, what float32's log2(e) lacks; infinite from z = -88.69
// downwards, where z / infinity is -0 as it should be. 2^t is 2^n 2^(k / 8) p(t - n - k / 8): p is a minimax polynomial
// of ours on [-1/16, 1/16], 8 n + k comes out of a sum's low bits, and the table holds the bits of 2^(k / 8) less what
// k, shifted along with n, adds to them.
DDPM_FAST_INLINE F one_plus_exp_neg(F z) {
  constexpr float kRound = 1572864.0f;  // 1.5 * 2^20: one unit in the last place is 1/8
  alignas(64) static constexpr uint32_t kTable[kLanes] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  const F y = min(max(z, -88.72f), 87.0f);
  const F t = fma(y, splat(-0x1.715476p+0f), splat(kRound));
  const F f = fma(y, splat(-0x1.715476p+0f), kRound - t);
  F p = fma(splat(0x1.c690ccp-5f), f, splat(0x1.ec0c22p-3f));
  p = fma(p, f, splat(0x1.62e432p-1f));
  p = fma(p, f, splat(1.0f));
  const U power = lookup8(load(kTable), bits(t)) + shift_left<20>(bits(t));
  return fma(p, from_bits(power), splat(1.0f));
}

DDPM_FAST_INLINE F silu(F z) { return z / one_plus_exp_neg(z); }

// silu'(z) = s (1 + z (1 - s)), s = sigmoid(z).
DDPM_FAST_INLINE F silu_derivative(F z) {
  const F s = splat(1.0f) / one_plus_exp_neg(z);
  return fma(s, z * (1.0f - s), s);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
