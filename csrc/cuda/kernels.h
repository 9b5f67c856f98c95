// The launch functions of the elementwise ops, and what they are given: pointers, and a layout that goes to the kernel
// as it is. Each runs its kernel on a stream (a cudaStream_t) of the current device and returns null, or CUDA's message
// where the launch failed. No torch header, no CUDA header.
#pragma once

#include "arguments.h"

namespace ddpm_fast {
namespace cuda {

struct NormalLayout {
  Target target;
  int step_stride = 0;
  uint32_t stream = 0;
  bool vector = false;  // out, in groups of 16 bytes
  int tile_pixels = 0, tile_channels = 0;  // the launch function's
};

struct NormalArguments {
  NormalLayout layout;
  Type type;
  DrawPointers draw;
  void* out;
};

struct NoisingLayout {
  Target target;
  View x0, noise;
  int64_t rows = 0;
  int t_stride = 0, step_stride = 0;
  uint32_t stream = 0;
  bool vector = false;  // out, and noise_out where there is one
  int tile_pixels = 0, tile_channels = 0;
};

struct NoisingArguments {
  NoisingLayout layout;
  Type type;  // of out and noise_out
  const void *x0, *noise;     // noise is null where it is drawn
  const float* coefficients;  // (rows, 2)
  const int64_t* t;
  DrawPointers draw;
  void *out, *noise_out;  // noise_out is null where the noise is given
};

struct DenoiseLayout {
  Target target;
  View x_t, output, unconditional, noise;
  int64_t rows = 0;
  int index_stride = 0;
  uint32_t stream = 0;
  int prediction = 0, variance = 0;
  float clip_low = 0, clip_high = 0;
  bool clip = false;
  bool vector = false;  // out and x0_out
  int tile_pixels = 0, tile_channels = 0;
};

struct DenoiseArguments {
  DenoiseLayout layout;
  const float* x_t;
  const void *output, *variance;  // variance: the output's second half of the channels where it is learned
  const void *unconditional, *noise;
  const float* coefficients;  // (rows, 8): a StepRow each
  const int64_t* index;
  const float* threshold;
  DrawPointers draw;
  float *out, *x0_out;
};

const char* launch_normal(const NormalArguments& arguments, void* stream);
const char* launch_noising(const NoisingArguments& arguments, void* stream);
const char* launch_denoise(const DenoiseArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace ddpm_fast
