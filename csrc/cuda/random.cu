// Standard normals: the noise of the contract, written once.
#include "kernels.h"
#include "launch.cuh"
#include "noise.cuh"

namespace ddpm_fast {
namespace cuda {

// kTiled: for a channels_last image.
template <class T, bool kTiled>
__global__ void __launch_bounds__(kThreads)
normal_kernel(T* out, const int64_t* seed, const int64_t* sample_ids, const int64_t* step, NormalLayout layout) {
  constexpr int V = kTiled ? 4 : 16 / sizeof(T);
  extern __shared__ __align__(16) float tile[];
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < layout.target.samples; n += gridDim.y) {
    const NoiseKey key = noise_key({seed, sample_ids, step}, layout, layout.step_stride, n);
    T* const sample = out + n * layout.target.sample_stride;
    walk<V, kTiled>(tile, layout, true, key, [&](int64_t e, int count, const auto& draw) {
      F z[V];
      draw(z);
      write(sample + e, z, count, layout.vector);
    });
  }
}

template <class T> static const char* launch(const NormalArguments& a, cudaStream_t stream) {
  NormalLayout layout = a.layout;
  const bool tiled = layout.target.channels_last;
  const int vector = tiled ? 4 : 16 / sizeof(T);
  layout.vector = in_groups(a.out, a.type, layout.target, vector);
  return launch_walk(layout, tiled, false, vector, [&](auto by_tiles, auto, const NormalLayout& with_tile, dim3 grid, int shared) {
    normal_kernel<T, by_tiles.value><<<grid, kThreads, shared, stream>>>(
        static_cast<T*>(a.out), a.draw.seed, a.draw.sample_ids, a.draw.step, with_tile);
  });
}

const char* launch_normal(const NormalArguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (arguments.type) {
    case kFloat16: return launch<__half>(arguments, on);
    case kBFloat16: return launch<__nv_bfloat16>(arguments, on);
    default: return launch<float>(arguments, on);
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
