// The quantile of each sample's magnitudes by counting: the values' bits are in their order, so that the digits of the
// one at a rank follow from counts, in three passes and without moving anything.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "ddpm_fast/quantile.h"
#include "image.h"
#include "kernels.h"

namespace ddpm_fast {
namespace {

uint32_t key_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x7fffffffu;
}

float value_of(uint32_t key) {
  float x;
  std::memcpy(&x, &key, 4);
  return x;
}

// torch.lerp's formula, exact at both ends.
float between(float low, float high, float weight) {
  return weight < 0.5f ? low + weight * (high - low) : high - (high - low) * (1.0f - weight);
}

float quantile_of(const float* x, int64_t size, Rank rank, std::vector<int64_t>& counts) {
  uint32_t prefix = 0;  // of the value's key, as far as it is known
  int64_t left = rank.below, equal = 0;
  for (int digit = 0; digit < kDigits; ++digit) {
    const int shift = shift_of(digit);
    const uint32_t bins = bins_of(digit);
    std::fill(counts.begin(), counts.end(), 0);
    bool has_nan = false;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t key = key_of(x[i]);
      has_nan |= key > kInfinityKey;
      if (digit == 0 || (key >> shift) / bins == prefix) ++counts[(key >> shift) % bins];
    }
    if (has_nan) return std::numeric_limits<float>::quiet_NaN();
    uint32_t bin = 0;
    while (left >= counts[bin]) left -= counts[bin++];
    prefix = prefix * bins + bin;
    equal = counts[bin];
  }
  uint32_t next = prefix;
  if (rank.weight > 0.0f && left + 1 >= equal) {
    next = kInfinityKey;
    for (int64_t i = 0; i < size; ++i) {
      const uint32_t key = key_of(x[i]);
      if (key > prefix) next = std::min(next, key);
    }
  }
  return between(value_of(prefix), value_of(next), rank.weight);
}

}  // namespace

void abs_quantile(Tensor x, double q, Tensor out) {
  const Image image = dense_image_of(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float &&
                      out.scalar_type() == torch::headeronly::ScalarType::Float,
                  "x and out must be float32");
  STD_TORCH_CHECK(out.numel() == image.samples && out.is_contiguous(), "out must be contiguous and have ",
                  image.samples, " elements");
  STD_TORCH_CHECK(image.size() > 0 && q >= 0 && q <= 1, "q must lie in [0, 1], and a sample have an element");
  const Rank rank = rank_of(q, image.size());
  const float* const from = static_cast<const float*>(x.const_data_ptr());
  float* const to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, image.samples, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts(kMostBins);
    for (int64_t n = begin; n < end; ++n)
      to[n] = quantile_of(from + n * image.sample_stride, image.size(), rank, counts);
  });
}

}  // namespace ddpm_fast
