// The launch function of the quantile. No torch header, no CUDA header.
#pragma once

#include <cstdint>

namespace ddpm_fast {
namespace cuda {

struct QuantileLayout {
  int64_t samples = 0, size = 0, sample_stride = 0;
  uint32_t rank = 0;  // the number of the value below
  float weight = 0;   // the way from there to the next
  bool vector = false;
};

// Bytes that the kernels need.
int64_t quantile_workspace(int64_t samples);

// Writes the quantile of each sample's magnitudes; null, or CUDA's message where a launch failed.
const char* launch_quantile(const float* x, float* out, void* workspace, QuantileLayout layout, void* stream);

}  // namespace cuda
}  // namespace ddpm_fast
