// Two random words to two standard normals: Box-Muller with the logarithm, sine and cosine as polynomials, every
// operation rounded on its own, so that every backend gives the same bits. docs/noise.md is the contract.
//
// Written in F and U, which the including file defines; no include guard, see philox.h.

DDPM_FAST_INLINE void normal_pair(U r0, U r1, F& first, F& second) {
  // Radius: sqrt(-2 ln u) with u = 2^e * (1 - f), f in (-1/3, 1/3].
  const U sign_bit = splat(0x80000000u);
  const F u = max(from_bits(bits(from_int(r0) * splat(0x1p-31f)) & splat(0x7fffffffu)), splat(0x1p-33f));
  const U b = bits(u);
  const U k = (b - splat(0x3f2aaaabu)) & splat(0xff800000u);
  const F f = splat(1.0f) - from_bits(b - k);
  F p = splat(0x1.177b0ep-2f) * f + splat(0x1.41e0f8p-2f);
  p = p * f + splat(0x1.1fbd08p-2f);
  p = p * f + splat(0x1.4f121ep-2f);
  p = p * f + splat(0x1.99d41ap-2f);
  p = p * f + splat(0x1.0019e4p-1f);
  p = p * f + splat(0x1.5554b8p-1f);
  p = p * f + splat(0x1.ffffd6p-1f);
  p = p * f + splat(2.0f);
  const F radius = sqrt(from_int(k) * splat(-0x1.62e430p-23f) + p * f);

  // Angle: an eighth of a turn to either side, the octant's swap and sign from the words' top bits.
  const F x = from_int(shift_left<1>(r1)) * splat(0x1p-34f);
  const F z = x * x;
  F s = splat(-0x1.330c96p+6f) * z + splat(0x1.468064p+6f);
  s = s * z + splat(-0x1.4abc24p+5f);
  s = s * z + splat(0x1.921fb6p+2f);
  s = s * x;
  F c = splat(-0x1.4e6694p+6f) * z + splat(0x1.03b034p+6f);
  c = c * z + splat(-0x1.3bd39ep+4f);
  c = c * z + splat(1.0f);
  c = from_bits(bits(c) ^ (r0 & sign_bit));

  const F a = radius * c, d = radius * s;
  const Mask swap = negative(r1);
  first = select(swap, d, a);
  second = select(swap, a, d);
}
