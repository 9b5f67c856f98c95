// What the quantile's kernels share: the values' order as integers, and the place of a quantile among them.
#pragma once

#include <cmath>
#include <cstdint>

namespace ddpm_fast {

// The bits of |x| in float32 are in the order of the values, NaN above infinity; they are counted digit by digit.
constexpr uint32_t kInfinityKey = 0x7f800000u;
constexpr int kDigits = 3, kMostBins = 2048;
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int bins_of(int digit) { return digit == 0 ? kMostBins : 1024; }
#ifdef __CUDACC__
__host__ __device__
#endif
constexpr int shift_of(int digit) { return 20 - 10 * digit; }

// The place of the q quantile among `size` ascending values, as torch.quantile computes it: in float32 as far as that
// holds it exactly.
struct Rank {
  int64_t below;  // the number of the value below
  float weight;   // the way from there to the next
};

inline Rank rank_of(double q, int64_t size) {
  const int64_t last = size - 1;
  const double place = last < (int64_t{1} << 24) ? static_cast<double>(static_cast<float>(q) * static_cast<float>(last))
                                                 : q * static_cast<double>(last);
  const int64_t below = static_cast<int64_t>(std::floor(place));
  return {below, static_cast<float>(place - static_cast<double>(below))};
}

}  // namespace ddpm_fast
