// The arithmetic of one denoising step, each operation rounded on its own.
//
// Written in F and U, which the including file defines; no include guard, see philox.h.

// exp on [-87, 88], clamped there, within 1 ulp: a polynomial of ours, since libm and the GPUs differ.
DDPM_FAST_INLINE F exp_poly(F x) {
  x = max(min(x, splat(88.0f)), splat(-87.0f));
  const F t = x * splat(0x1.715476p+0f) + splat(12582912.0f);
  const F n = t - splat(12582912.0f);
  const F r = (x - n * splat(0x1.62e4p-1f)) - n * splat(0x1.7f7d1cp-20f);
  F p = splat(0x1.6a2430p-10f) * r + splat(0x1.1239e4p-7f);
  p = p * r + splat(0x1.5558f2p-5f);
  p = p * r + splat(0x1.555492p-3f);
  p = p * r + splat(0x1.fffffcp-2f);
  p = ((p * r) * r + r) + splat(1.0f);
  return from_bits(bits(p) + shift_left<23>(bits(t)));
}
