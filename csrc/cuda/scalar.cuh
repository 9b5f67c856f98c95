// The shared arithmetic of csrc/include/ddpm_fast on a GPU: F is a float, U a word. Intrinsics that round each
// operation on its own and are never contracted, whatever flags the compiler is given.
#pragma once

#include <cstdint>

#include "convert.cuh"

#define DDPM_FAST_INLINE __device__ __forceinline__

namespace ddpm_fast {
namespace cuda {

struct F { float v; };
struct U { uint32_t v; };
struct Mask { bool v; };

DDPM_FAST_INLINE F splat(float x) { return {x}; }
DDPM_FAST_INLINE U splat(uint32_t x) { return {x}; }
DDPM_FAST_INLINE F operator+(F a, F b) { return {__fadd_rn(a.v, b.v)}; }
DDPM_FAST_INLINE F operator-(F a, F b) { return {__fsub_rn(a.v, b.v)}; }
DDPM_FAST_INLINE F operator*(F a, F b) { return {__fmul_rn(a.v, b.v)}; }
DDPM_FAST_INLINE F operator/(F a, F b) { return {__fdiv_rn(a.v, b.v)}; }
DDPM_FAST_INLINE F sqrt(F a) { return {__fsqrt_rn(a.v)}; }
// The second operand where either is NaN.
DDPM_FAST_INLINE F min(F a, F b) { return {a.v < b.v ? a.v : b.v}; }
DDPM_FAST_INLINE F max(F a, F b) { return {a.v > b.v ? a.v : b.v}; }
DDPM_FAST_INLINE U operator+(U a, U b) { return {a.v + b.v}; }
DDPM_FAST_INLINE U operator-(U a, U b) { return {a.v - b.v}; }
DDPM_FAST_INLINE U operator&(U a, U b) { return {a.v & b.v}; }
DDPM_FAST_INLINE U operator^(U a, U b) { return {a.v ^ b.v}; }
template <int n> DDPM_FAST_INLINE U shift_left(U a) { return {a.v << n}; }
DDPM_FAST_INLINE F from_int(U a) { return {__int2float_rn(static_cast<int>(a.v))}; }  // read as signed
DDPM_FAST_INLINE U bits(F a) { return {__float_as_uint(a.v)}; }
DDPM_FAST_INLINE F from_bits(U a) { return {__uint_as_float(a.v)}; }
DDPM_FAST_INLINE Mask negative(U a) { return {static_cast<int>(a.v) < 0}; }
DDPM_FAST_INLINE F select(Mask m, F yes, F no) { return m.v ? yes : no; }

using W = uint64_t;
DDPM_FAST_INLINE W multiply(W a, uint32_t m) { return static_cast<uint64_t>(static_cast<uint32_t>(a)) * m; }
DDPM_FAST_INLINE W high(W a) { return a >> 32; }
DDPM_FAST_INLINE W mix(W a, W b, uint32_t key) { return a ^ b ^ key; }

#pragma nv_diag_suppress 1675  // g++'s pragma to unroll, which nvcc does of its own accord
#include "ddpm_fast/normal.h"
#include "ddpm_fast/philox.h"
#include "ddpm_fast/step.h"

DDPM_FAST_INLINE uint32_t bits_of(float x) { return __float_as_uint(x); }
DDPM_FAST_INLINE uint32_t bits_of(__half x) { return __half_as_ushort(x); }
DDPM_FAST_INLINE uint32_t bits_of(__nv_bfloat16 x) { return __bfloat16_as_ushort(x); }

template <class T> DDPM_FAST_INLINE F rounded(F x) { return {to_float(narrow<T>(x.v))}; }

}  // namespace cuda
}  // namespace ddpm_fast
