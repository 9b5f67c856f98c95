// Division by a divisor that is known before the launch: a multiplication and a shift.
#pragma once

#include <cstdint>

namespace ddpm_fast {
namespace cuda {

// Granlund and Montgomery (1994), for dividends of int that are not negative.
struct Divider {
  uint32_t divisor = 1, multiplier = 1, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t by) : divisor(by) {
    while ((uint64_t{1} << shift) < by) ++shift;
    multiplier = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by) / by + 1);
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int operator()(int n) const {
    return static_cast<int>((__umulhi(static_cast<uint32_t>(n), multiplier) + static_cast<uint32_t>(n)) >> shift);
  }
#endif
};

// The same for dividends of int64_t, and divisors below 2^31.
struct LongDivider {
  uint64_t multiplier = 1;
  uint32_t shift = 0;

  LongDivider() = default;
  explicit LongDivider(uint32_t by) {
    while ((uint64_t{1} << shift) < by) ++shift;
    // 2^64 (2^shift - by) / by + 1, a word of 32 bits at a time.
    const uint64_t over = ((uint64_t{1} << shift) - by) << 32;
    multiplier = (over / by << 32) + (over % by << 32) / by + 1;
  }
#ifdef __CUDACC__
  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return static_cast<int64_t>((__umul64hi(static_cast<uint64_t>(n), multiplier) + static_cast<uint64_t>(n)) >> shift);
  }
#endif
};

}  // namespace cuda
}  // namespace ddpm_fast
