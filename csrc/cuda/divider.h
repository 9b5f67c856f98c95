// Division of int by a divisor that is known before the launch: a multiplication and a shift.
#pragma once

#include <cstdint>

namespace ddpm_fast {
namespace cuda {

// Granlund and Montgomery (1994), for dividends below 2^31.
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

}  // namespace cuda
}  // namespace ddpm_fast
