// Reading what the operators are given.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

namespace ddpm_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A (1,) or (N,) int64 tensor, read per sample.
struct PerSample {
  const int64_t* data;
  int64_t stride;  // 0 where one value serves all
  int64_t operator[](int64_t sample) const { return data[sample * stride]; }
};

PerSample per_sample(const Tensor& tensor, int64_t samples, const char* name);

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
