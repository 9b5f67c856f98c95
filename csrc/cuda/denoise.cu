// One step of the reverse process. The step's number, its coefficients, the seed and the samples' numbers are read from
// device memory, so that a captured graph replays every step. What the network predicts, its variance and the rest are
// the same for all threads: a branch on them costs an instruction or two, and kernels for each would multiply.
#include "kernels.h"
#include "launch.cuh"
#include "noise.cuh"

namespace ddpm_fast {
namespace cuda {

constexpr int V = 4;  // of the state, which is float32: 16 bytes

// kTiled: the noise is drawn for a channels_last image.
template <bool kTiled>
__global__ void __launch_bounds__(kThreads, 3)  // 80 registers
denoise_kernel(const float* x_t, const void* output, const void* variance, const void* unconditional,
               const void* noise, const float* coefficients, const int64_t* index, const float* threshold,
               const int64_t* seed, const int64_t* sample_ids, float* out, float* x0_out, DenoiseLayout layout) {
  extern __shared__ __align__(16) float tile[];
  for (int64_t n = blockIdx.y; n < layout.target.samples; n += gridDim.y) {
    const float* const c = coefficients + 8 * row_of(index[n * layout.index_stride], layout.rows);
    const StepRow row = {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
    const F bound = {threshold == nullptr ? 0.0f : threshold[n]};
    const bool draws = seed != nullptr && row.sigma != 0.0f;
    NoiseKey key{};
    if (draws) key = noise_key({seed, sample_ids, index}, layout, layout.index_stride, n);
    const Reader states(x_t, layout.x_t, n), outputs(output, layout.output, n), variances(variance, layout.output, n),
        others(unconditional, layout.unconditional, n), given(noise, layout.noise, n);
    const int64_t sample = n * layout.target.sample_stride;

    walk<V, kTiled>(tile, layout, draws, key, [&](int64_t e, int count, const auto& draw) {
      // Everything is read before anything is written, since out may be x_t.
      const Raw<V> x_raw = states.read<V>(e, count), output_raw = outputs.read<V>(e, count);
      Raw<V> other_raw, variance_raw, noise_raw;
      if (others) other_raw = others.read<V>(e, count);
      if (variances) variance_raw = variances.read<V>(e, count);
      if (given) noise_raw = given.read<V>(e, count);

      F z[V], x[V], mean[V];
      if (draws) draw(z);
      if (given) widen(z, noise_raw, layout.noise.type);
      widen(x, x_raw, layout.x_t.type);
      widen(mean, output_raw, layout.output.type);
      if (others) {
        F u[V];
        widen(u, other_raw, layout.unconditional.type);
#pragma unroll
        for (int j = 0; j < V; ++j) mean[j] = guide(mean[j], u[j], row);
      }
      if (layout.prediction != kXPrev || x0_out != nullptr) {
        F x0[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          x0[j] = predict_x0(x[j], mean[j], row, layout.prediction);
          if (layout.clip) x0[j] = clamp(x0[j], splat(layout.clip_low), splat(layout.clip_high));
          if (threshold != nullptr) x0[j] = clamp(x0[j], splat(-bound.v), bound) / bound;
          if (layout.prediction != kXPrev) mean[j] = splat(row.mean_from_x0) * x0[j] + splat(row.mean_from_x) * x[j];
        }
        if (x0_out != nullptr) write(x0_out + sample + e, x0, count, layout.vector);
      }
      if (draws || given) {
        F sigma[V];
        if (variances) widen(sigma, variance_raw, layout.output.type);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sigma[j] = variances ? learned_sigma(sigma[j], row, layout.variance) : splat(row.sigma);
          mean[j] = mean[j] + sigma[j] * z[j];
        }
      }
      write(out + sample + e, mean, count, layout.vector);
    });
  }
}

const char* launch_denoise(const DenoiseArguments& a, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  DenoiseLayout layout = a.layout;
  const Target& target = layout.target;
  const bool tiled = a.draw.seed != nullptr && target.channels_last;
  layout.x_t.vector = in_groups(a.x_t, layout.x_t, target, V);
  layout.output.vector =
      in_groups(a.output, layout.output, target, V) && in_groups(a.variance, layout.output, target, V);
  layout.unconditional.vector = in_groups(a.unconditional, layout.unconditional, target, V);
  layout.noise.vector = in_groups(a.noise, layout.noise, target, V);
  layout.vector = in_groups(a.out, kFloat32, target, V) && in_groups(a.x0_out, kFloat32, target, V);
  return launch_walk(layout, tiled, V, [&](auto by_tiles, const DenoiseLayout& with_tile, Grid grid, int shared) {
    denoise_kernel<by_tiles.value><<<to_dim3(grid), kThreads, shared, on>>>(
        a.x_t, a.output, a.variance, a.unconditional, a.noise, a.coefficients, a.index, a.threshold, a.draw.seed,
        a.draw.sample_ids, a.out, a.x0_out, with_tile);
  });
}

}  // namespace cuda
}  // namespace ddpm_fast
