// What the RMSNorm kernels are told. A batch is cut into chunks of a sample's pixels, by the sample's shape alone, so
// that neither the batch nor the number of threads changes a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "norm_act.h"

namespace ddpm_fast {

struct RmsNormAct {
  static constexpr int64_t kChunk = 256;  // pixels

  int64_t samples, channels, pixels;
  Order order;
  bool activation;
  double eps;
  ChannelRows weight, scale, shift;

  // The largest r, that of every pixel whose norm is below eps.
  float limit() const { return static_cast<float>(std::sqrt(static_cast<double>(channels)) / eps); }
  int64_t chunks() const { return (pixels + kChunk - 1) / kChunk; }
  int64_t pixel(int64_t chunk) const { return chunk * kChunk; }
  int64_t pixels_of(int64_t chunk) const { return std::min(kChunk, pixels - pixel(chunk)); }
  // Where a pixel begins in a sample.
  int64_t offset(int64_t pixel) const { return order == Order::kChannelsFirst ? pixel : pixel * channels; }
};

// z = x * r * factor + shift, in one sample; both rows hold all channels.
struct RmsChannels {
  const float* factor;
  const float* shift;
};

// What the backward pass sums up over the pixels of a chunk, for each channel: grad_z, and grad_z * x * r.
struct RmsSums {
  float* gradient;
  float* product;
};

}  // namespace ddpm_fast
