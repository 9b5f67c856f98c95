// What the launch functions are given, and what they hand on to their kernels beside the pointers: plain data, for the
// host's compiler and the device's. No torch header, no CUDA header.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DDPM_FAST_BOTH __host__ __device__
#else
#define DDPM_FAST_BOTH
#endif

namespace ddpm_fast {
namespace cuda {

enum Type : int { kFloat32, kFloat16, kBFloat16, kUint8 };

DDPM_FAST_BOTH constexpr int size_of(Type type) { return type == kFloat32 ? 4 : type == kUint8 ? 1 : 2; }

// The tensor whose memory order a kernel walks in: samples, each one run of memory. Element (c, p) of a sample lies at
// c * pixels + p, or with channels_last at p * channels + c.
struct Target {
  int64_t samples = 0, channels = 0, pixels = 0, sample_stride = 0;
  bool channels_last = false;
  // Elements of a sample: at most 2^34, which is what the noise counter addresses.
  DDPM_FAST_BOTH int64_t size() const { return channels * pixels; }
};

// How a tensor that a kernel reads lies beside the target. Where it does not lie in the same order, element e of a sample
// in the target's order is element (e / inner, e % inner) of two dimensions with strides of their own.
struct View {
  int64_t sample_stride = 0;
  Type type = kFloat32;
  bool in_order = true;
  bool vector = false;  // in order, and every group of elements that a thread reads at once is aligned
  int64_t inner = 1, outer_stride = 0, inner_stride = 0;
};

// What a draw of noise depends on besides the place. It is read on the device, since a captured graph replays with
// other values in the same memory.
struct DrawPointers {
  const int64_t* seed = nullptr;        // null where none is drawn
  const int64_t* sample_ids = nullptr;  // null: the samples are numbered from 0
  const int64_t* step = nullptr;
};

}  // namespace cuda
}  // namespace ddpm_fast
