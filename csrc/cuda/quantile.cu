// The quantile of each sample's magnitudes by counting, as csrc/cpu/quantile.cpp does it: a launch a digit of the value
// at the rank, whose blocks share a sample and add their counts up in memory; a launch for the value after it; and one
// that writes the results. Counts are integers: their sums do not depend on an order.
#include <cuda_runtime.h>

#include "ddpm_fast/quantile.h"
#include "launch.cuh"
#include "memory.cuh"
#include "quantile.h"

namespace ddpm_fast {
namespace cuda {

constexpr int V = 4;  // floats read at once

// What the launches hand on for one sample; all zero at first.
struct Counts {
  uint32_t digit[kDigits][kMostBins];
  uint32_t has_nan;
  uint32_t next;  // the smallest key above the rank's, inverted
};

DDPM_FAST_INLINE uint32_t key_of(uint32_t bits) { return bits & 0x7fffffffu; }

// The bin that holds the value of a rank; `rank` becomes its rank inside the bin. All threads of the block take part.
static __device__ uint32_t bin_of(const uint32_t* counts, int bins, uint32_t& rank, uint32_t* scratch) {
  const unsigned thread = threadIdx.x, each = bins / kThreads;
  uint32_t own = 0;
  for (unsigned i = 0; i < each; ++i) own += counts[thread * each + i];
  uint32_t sum = own;  // over this thread and those before it
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, sum, step);
    if (thread % 32 >= step) sum += other;
  }
  if (thread % 32 == 31) scratch[thread / 32] = sum;
  __syncthreads();
  for (unsigned warp = 0; warp < thread / 32; ++warp) sum += scratch[warp];
  if (sum - own <= rank && rank < sum) {
    uint32_t left = rank - (sum - own);
    unsigned bin = thread * each;
    while (left >= counts[bin]) left -= counts[bin++];
    scratch[kThreads / 32] = bin;
    scratch[kThreads / 32 + 1] = left;
  }
  __syncthreads();
  // No barrier behind these: another call writes the two after its first one.
  rank = scratch[kThreads / 32 + 1];
  return scratch[kThreads / 32];
}

// The first `digits` digits of the key at a rank, as one number.
static __device__ uint32_t prefix_of(const Counts& counts, int digits, uint32_t& rank, uint32_t* scratch) {
  uint32_t prefix = 0;
  for (int digit = 0; digit < digits; ++digit)
    prefix = prefix * bins_of(digit) + bin_of(counts.digit[digit], bins_of(digit), rank, scratch);
  return prefix;
}

template <class Body>
DDPM_FAST_INLINE void for_each_key(const float* x, const QuantileLayout& layout, int64_t sample, const Body& body) {
  View view;
  view.sample_stride = layout.sample_stride;
  view.vector = layout.vector;
  const PlainReader<kFloat32> reader(x, view, sample);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads * V;
#pragma unroll 1
  for (int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; e < layout.size; e += step) {
    const int count = static_cast<int>(::min(static_cast<int64_t>(V), layout.size - e));
    const Raw<V> raw = reader.template read<V>(e, count);
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (j == 0 || j < count) body(key_of(raw.word[j]));
  }
}

template <int kDigit>
__global__ void __launch_bounds__(kThreads) count_kernel(const float* x, Counts* counts, QuantileLayout layout) {
  constexpr int kBins = bins_of(kDigit), kShift = shift_of(kDigit);
  static_assert(kBins % kThreads == 0);
  __shared__ uint32_t local[kBins];
  __shared__ uint32_t scratch[kThreads / 32 + 2];
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < layout.samples; n += gridDim.y) {
    Counts& own = counts[n];
    uint32_t rank = layout.rank;
    const uint32_t prefix = prefix_of(own, kDigit, rank, scratch);
#pragma unroll
    for (int i = 0; i < kBins / kThreads; ++i) local[i * kThreads + threadIdx.x] = 0;
    __syncthreads();
    bool has_nan = false;
    for_each_key(x, layout, n, [&](uint32_t key) {
      has_nan |= key > kInfinityKey;
      if (kDigit == 0 || (key >> kShift) / kBins == prefix) atomicAdd(&local[(key >> kShift) % kBins], 1u);
    });
    if (kDigit == 0 && has_nan) atomicOr(&own.has_nan, 1u);
    __syncthreads();
    // Each thread clears for the next sample what it adds up of this one.
#pragma unroll
    for (int i = 0; i < kBins / kThreads; ++i) {
      const int bin = i * kThreads + threadIdx.x;
      if (local[bin] != 0) atomicAdd(&own.digit[kDigit][bin], local[bin]);
    }
  }
}

__global__ void __launch_bounds__(kThreads) next_kernel(const float* x, Counts* counts, QuantileLayout layout) {
  __shared__ uint32_t scratch[kThreads / 32 + 2];
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < layout.samples; n += gridDim.y) {
    uint32_t rank = layout.rank;
    const uint32_t low = prefix_of(counts[n], kDigits, rank, scratch);
    uint32_t next = 0;
    for_each_key(x, layout, n, [&](uint32_t key) {
      if (key > low) next = ::max(next, ~key);
    });
#pragma unroll
    for (int step = 16; step > 0; step /= 2) next = ::max(next, __shfl_xor_sync(0xffffffffu, next, step));
    if (threadIdx.x % 32 == 0 && next != 0) atomicMax(&counts[n].next, next);
  }
}

// A block a sample.
__global__ void __launch_bounds__(kThreads) result_kernel(const Counts* counts, float* out, QuantileLayout layout) {
  __shared__ uint32_t scratch[kThreads / 32 + 2];
#pragma unroll 1
  for (int64_t n = blockIdx.x; n < layout.samples; n += gridDim.x) {
    const Counts& own = counts[n];
    uint32_t rank = layout.rank;
    const uint32_t key = prefix_of(own, kDigits, rank, scratch);
    if (threadIdx.x != 0) continue;
    const uint32_t equal = own.digit[kDigits - 1][key % bins_of(kDigits - 1)];
    const F low = from_bits({key}), weight = {layout.weight};
    const bool steps_up = layout.weight > 0.0f && rank + 1 >= equal;
    const F high = steps_up ? from_bits({~own.next}) : low;
    // torch.lerp's formula, exact at both ends.
    const F between =
        layout.weight < 0.5f ? low + weight * (high - low) : high - (high - low) * (splat(1.0f) - weight);
    out[n] = own.has_nan ? __uint_as_float(0x7fc00000u) : between.v;
  }
}

int64_t quantile_workspace(int64_t samples) { return samples * static_cast<int64_t>(sizeof(Counts)); }

const char* launch_quantile(const float* x, float* out, void* workspace, QuantileLayout layout, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  Counts* const counts = static_cast<Counts*>(workspace);
  layout.vector = reinterpret_cast<uintptr_t>(x) % 16 == 0 && (layout.samples == 1 || layout.sample_stride % V == 0);
  const Grid grid = plan_flat(layout.samples, layout.size, V * kCountedGroups, processors());
  cudaMemsetAsync(counts, 0, quantile_workspace(layout.samples), on);
  count_kernel<0><<<to_dim3(grid), kThreads, 0, on>>>(x, counts, layout);
  count_kernel<1><<<to_dim3(grid), kThreads, 0, on>>>(x, counts, layout);
  count_kernel<2><<<to_dim3(grid), kThreads, 0, on>>>(x, counts, layout);
  if (layout.weight > 0.0f) next_kernel<<<to_dim3(grid), kThreads, 0, on>>>(x, counts, layout);
  result_kernel<<<to_dim3(plan_flat(1, layout.samples * kThreads, 1, processors())), kThreads, 0, on>>>(counts, out, layout);
  return launch_error();
}

}  // namespace cuda
}  // namespace ddpm_fast
