// SiLU and its derivative in float32.
#pragma once

#include <cstdint>

namespace ddpm_fast {
namespace cuda {

// Flushing to zero costs nothing here: the exponent is in [-1/2, 1/2], and a reciprocal that small is silu's own 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 + exp(-z) by 2^n 2^f: the product with log2(e) is not rounded before its integer part is taken off, which the
// plain ex2(-z log2(e)) would pay for with an error that grows with |z|. n + 127 comes out of a sum's low bits as the
// exponent of a float: 0 for n = -127, infinity for n = 128. z is kept between -128.5 log(2) and 127.5 log(2), within
// which n is no other.
__device__ __forceinline__ float one_plus_exp_neg(float z) {
  constexpr float kRound = 12582912.0f + 127.0f, kMinusLog2E = -0x1.715476p+0f;
  const float y = fminf(fmaxf(z, -89.06f), 88.376f);
  const float t = fmaf(y, kMinusLog2E, kRound);
  const float f = fmaf(y, kMinusLog2E, kRound - t);
  return fmaf(exp2_approximate(f), __uint_as_float(__float_as_uint(t) << 23), 1.0f);
}

__device__ __forceinline__ float silu(float z) { return z * reciprocal_approximate(one_plus_exp_neg(z)); }

// silu'(z) = s (1 + z (1 - s)), s = sigmoid(z).
__device__ __forceinline__ float silu_derivative(float z) {
  const float s = reciprocal_approximate(one_plus_exp_neg(z));
  return fmaf(s, z * (1.0f - s), s);
}

}  // namespace cuda
}  // namespace ddpm_fast
