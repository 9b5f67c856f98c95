// q_sample: x_t = signal * x0 + sigma * noise, the noise read, or made on the way and written beside x_t.
#include "kernels.h"
#include "launch.cuh"
#include "noise.cuh"

namespace ddpm_fast {
namespace cuda {

// kTiled: the noise is drawn, for a channels_last image. kGeneral: x0 or the noise has another order or dtype than out.
template <class T, bool kTiled, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral ? 2 : 3)
noising_kernel(const void* x0, const void* noise, const float* coefficients, const int64_t* t, const int64_t* seed,
               const int64_t* sample_ids, const int64_t* step, T* out, T* noise_out, NoisingLayout layout) {
  constexpr int V = kTiled ? 4 : 16 / sizeof(T);
  extern __shared__ __align__(16) float tile[];
  const bool draws = kTiled || seed != nullptr;
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < layout.target.samples; n += gridDim.y) {
    const int64_t row = row_of(t[n * layout.t_stride], layout.rows);
    const F signal = {coefficients[2 * row]}, sigma = {coefficients[2 * row + 1]};
    NoiseKey key{};
    if (draws) key = noise_key({seed, sample_ids, step}, layout, layout.step_stride, n);
    const Reader<kGeneral, kTypeOf<T>, kTypeOf<T> == kFloat32> images(x0, layout.x0, n);  // bytes become float32
    const Reader<kGeneral, kTypeOf<T>> given(noise, layout.noise, n);
    const int64_t sample = n * layout.target.sample_stride;

    walk<V, kTiled>(tile, layout, draws, key, [&](int64_t e, int count, const auto& draw) {
      const Raw<V> image = images.template read<V>(e, count);
      F x[V], z[V];
      if (draws) {
        draw(z);
        // x_t is made of the noise that is returned, which is rounded to its dtype.
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = rounded<T>(z[j]);
        write(noise_out + sample + e, z, count, layout.vector);
      } else {
        given.widen(z, given.template read<V>(e, count));
      }
      images.widen(x, image);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (images.is_bytes()) x[j] = x[j] / splat(127.5f) - splat(1.0f);
        x[j] = signal * x[j] + sigma * z[j];
      }
      write(out + sample + e, x, count, layout.vector);
    });
  }
}

template <class T> static const char* launch(const NoisingArguments& a, cudaStream_t stream) {
  NoisingLayout layout = a.layout;
  const Target& target = layout.target;
  const bool draws = a.draw.seed != nullptr, tiled = draws && target.channels_last;
  const int vector = tiled ? 4 : 16 / sizeof(T);
  layout.x0.vector = in_groups(a.x0, layout.x0, target, vector);
  layout.noise.vector = in_groups(a.noise, layout.noise, target, vector);
  layout.vector = in_groups(a.out, a.type, target, vector) && in_groups(a.noise_out, a.type, target, vector);
  const bool general = !is_plain(a.x0, layout.x0, a.type) || !is_plain(a.noise, layout.noise, a.type);
  return launch_walk(layout, tiled, general, vector, [&](auto by_tiles, auto is_general, const NoisingLayout& with_tile, dim3 grid, int shared) {
    noising_kernel<T, by_tiles.value, is_general.value><<<grid, kThreads, shared, stream>>>(
        a.x0, a.noise, a.coefficients, a.t, a.draw.seed, a.draw.sample_ids, a.draw.step, static_cast<T*>(a.out),
        static_cast<T*>(a.noise_out), with_tile);
  });
}

const char* launch_noising(const NoisingArguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (arguments.type) {
    case kFloat16: return launch<__half>(arguments, on);
    case kBFloat16: return launch<__nv_bfloat16>(arguments, on);
    default: return launch<float>(arguments, on);
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
