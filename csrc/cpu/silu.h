// SiLU on sixteen lanes; included by kernel files, once per instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// u = rest + r, r in sixteenths; power = 4^r, infinite from r = 64 on, anything small where it cannot count beside 1.
struct Power {
  F power, rest;
};

// r comes out of a sum, whose low bits are the eighths of 2 r: they choose 2^(k / 8) from a table. All instruction sets
// give the same bits wherever 1 + 4^r differs from 1 and from infinity.
#if defined(DDPM_FAST_ISA_AVX512)
DDPM_FAST_INLINE Power power_of_four(F u) {
  alignas(64) static constexpr float kTable[kLanes] = {
      1.0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f, 0x1.6a09e6p+0f, 0x1.8ace54p+0f, 0x1.ae89fap+0f,
      0x1.d5818ep+0f, 1.0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f, 0x1.6a09e6p+0f, 0x1.8ace54p+0f,
      0x1.ae89fap+0f, 0x1.d5818ep+0f};
  constexpr float kRound = 1572864.0f;  // 1.5 * 2^20: one unit in the last place is 1/8
  const F t = fma(u, splat(2.0f), splat(kRound));
  const F eighth = from_bits(lookup8(bits(load(kTable)), bits(t)));
  constexpr int kSixteenths = 4 << 4;  // four bits of fraction, rounded to nearest
  return {{_mm512_scalef_ps(eighth.v, (t - kRound).v)}, {_mm512_reduce_ps(u.v, kSixteenths)}};
}
#else
// Here 2^n is shifted into place and added to the bits of 2^(k / 8) less what k, shifted along with n, adds.
DDPM_FAST_INLINE Power power_of_four(F u) {
  alignas(64) static constexpr uint32_t kTable[kLanes] = {
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
      0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
  constexpr float kRound = 786432.0f;  // 1.5 * 2^19: one unit in the last place is 1/16
  const F bounded = min(max(u, -63.0f), 64.0f);
  const F t = bounded + kRound;
  return {from_bits(lookup8(load(kTable), bits(t)) + shift_left<20>(bits(t))), bounded - (t - kRound)};
}
#endif

// factor * (1 + 4^u), to a relative 1.4e-7; the polynomial, a minimax one of ours on [-1/32, 1/32], is that of 4^u.
template <int n> DDPM_FAST_INLINE void one_plus_powers_of_four(const F (&u)[n], double factor, F (&result)[n]) {
  const auto times = [factor](double coefficient) { return splat(static_cast<float>(factor * coefficient)); };
  Power whole[n];
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) whole[i] = power_of_four(u[i]);
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i)
    result[i] = fma(times(0x1.c690ccp-2), whole[i].rest, times(0x1.ec0c22p-1));
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) result[i] = fma(result[i], whole[i].rest, times(0x1.62e432p+0));
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) result[i] = fma(result[i], whole[i].rest, times(1.0));
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) result[i] = fma(result[i], whole[i].power, times(1.0));
}
DDPM_FAST_INLINE F one_plus_power_of_four(F u, double factor) {
  const F one[1] = {u};
  F result[1];
  one_plus_powers_of_four(one, factor, result);
  return result[0];
}

// SiLU of z, from u = kSiluUnit z.
DDPM_FAST_INLINE F silu_in_units(F u) { return u / one_plus_power_of_four(u, kSiluUnit); }

// The derivatives of SiLU by u, in the place of each u: (s + s z (1 - s)) / kSiluUnit, s = sigmoid(z), of which
// s / kSiluUnit is one division. Of several vectors at once, whose long chains of operations fill each other's gaps.
template <int n> DDPM_FAST_INLINE void silu_derivatives_in_units(F (&u)[n]) {
  constexpr float kOne = static_cast<float>(1.0 / kSiluUnit);
  F s[n];
  one_plus_powers_of_four(u, kSiluUnit, s);
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) s[i] = splat(1.0f) / s[i];
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) u[i] = fma(s[i], u[i] * (kOne - s[i]), s[i]);
}

DDPM_FAST_INLINE F one_plus_exp_neg(F z) { return one_plus_power_of_four(z * static_cast<float>(kSiluUnit), 1.0); }

DDPM_FAST_INLINE F silu(F z) { return z / one_plus_exp_neg(z); }

// silu'(z) = s (1 + z (1 - s)), s = sigmoid(z).
DDPM_FAST_INLINE F silu_derivative(F z) {
  const F s = splat(1.0f) / one_plus_exp_neg(z);
  return fma(s, z * (1.0f - s), s);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
