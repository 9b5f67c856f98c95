// Reading what the operators are given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "image.h"

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An image that a kernel reads, in any dtype and any layout whose pixels have one stride.
struct Source {
  Source() = default;
  Source(const Tensor& tensor, const char* name);
  const void* data = nullptr;
  ScalarType type = ScalarType::Float;
  Image image{};
  explicit operator bool() const { return data != nullptr; }
  // The source's channels from `channel` on.
  Source from_channel(int64_t channel) const;
  // Whether a run of the target's memory is a run of this one's, element for element.
  bool aligned_with(const Image& target) const {
    if (target.order() == Order::kChannelsFirst) return image.channels_first();
    return image.channels_last() && image.channels == target.channels;
  }
};

// A (1,) or (N,) int64 tensor, read per sample.
struct PerSample {
  const int64_t* data;
  int64_t stride;  // 0 where one value serves all
  int64_t operator[](int64_t sample) const { return data[sample * stride]; }
};

PerSample per_sample(const Tensor& tensor, int64_t samples, const char* name);

// The same where the values are rows of a table, and so must lie in [0, count).
PerSample rows(const Tensor& tensor, int64_t samples, int64_t count, const char* name);

// The elements of a contiguous float32 tensor (N,).
float* per_sample_result(const Tensor& tensor, int64_t samples, const char* name);

// A contiguous float32 table with so many columns.
const float* table(const Tensor& tensor, int64_t columns, const char* name);

void check_shape(const Image& image, const Image& expected, const char* name);

// The seed, the sample numbers and the stream of a draw. Without sample_ids the samples are numbered from 0.
struct Draw {
  Draw(const Tensor& seed, const std::optional<Tensor>& sample_ids, const Tensor& step, int64_t stream,
       int64_t samples);
  uint32_t key_low, key_high, stream;
  std::optional<PerSample> ids;
  PerSample steps;
  uint32_t id(int64_t sample) const { return static_cast<uint32_t>(ids ? (*ids)[sample] : sample); }
  uint32_t step(int64_t sample) const { return static_cast<uint32_t>(steps[sample]); }
};

}  // namespace ddpm_fast
