// One step of the reverse process. The step's number, its coefficients, the seed and the samples' numbers are read from
// device memory, so that a captured graph replays every step. What the network predicts, its variance and the rest are
// the same for all threads: a branch on them costs an instruction or two, and kernels for each would multiply.
#include "kernels.h"
#include "launch.cuh"
#include "noise.cuh"

namespace ddpm_fast {
namespace cuda {

constexpr int V = 4;  // of the state, which is float32: 16 bytes

// kType: of the network's outputs. kTiled: the noise is drawn for a channels_last image. kGeneral: an output or the noise
// lies in another order than the state, or has another dtype than kType and float32.
template <Type kType, bool kTiled, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kTiled || kGeneral ? 2 : 3)
denoise_kernel(const float* x_t, const void* output, const void* variance, const void* unconditional,
               const void* noise, const float* coefficients, const int64_t* index, const float* threshold,
               const int64_t* seed, const int64_t* sample_ids, float* out, float* x0_out, DenoiseLayout layout) {
  const bool guided = unconditional != nullptr;
  // Noise is either given or drawn; and with channels last an output of twice the channels is not a plain one.
  const bool given = !kTiled && noise != nullptr, learned = (kGeneral || !kTiled) && layout.variance != kFixed;
  extern __shared__ __align__(16) float tile[];
#pragma unroll 1
  for (int64_t n = blockIdx.y; n < layout.target.samples; n += gridDim.y) {
    const float* const c = coefficients + 8 * row_of(index[n * layout.index_stride], layout.rows);
    const StepRow row = {c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]};
    const F bound = {threshold == nullptr ? 0.0f : threshold[n]};
    const bool draws = (kTiled || seed != nullptr) && row.sigma != 0.0f;
    NoiseKey key{};
    if (draws) key = noise_key({seed, sample_ids, index}, layout, layout.index_stride, n);
    const PlainReader<kFloat32> states(x_t, layout.x_t, n);
    const Reader<kGeneral, kType> outputs(output, layout.output, n), variances(variance, layout.output, n),
        others(unconditional, layout.unconditional, n);
    const Reader<kGeneral, kFloat32> noises(noise, layout.noise, n);
    const int64_t sample = n * layout.target.sample_stride;

    walk<V, kTiled>(tile, layout, draws, key, [&](int64_t e, int count, const auto& draw) {
      // What is read before the noise is made arrives while it is made.
      const Raw<V> x_raw = states.template read<V>(e, count), output_raw = outputs.template read<V>(e, count);
      F z[V], x[V], mean[V], sigma[V];
      if (draws) draw(z);
      states.widen(x, x_raw);
      outputs.widen(mean, output_raw);
      if (guided) {
        F u[V];
        others.widen(u, others.template read<V>(e, count));
#pragma unroll
        for (int j = 0; j < V; ++j) mean[j] = guide(mean[j], u[j], row);
      }
      if (given) noises.widen(z, noises.template read<V>(e, count));
      if (learned) variances.widen(sigma, variances.template read<V>(e, count));
      // From here on nothing is read: out may be x_t.
      F x0[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        x0[j] = predict_x0(x[j], mean[j], row, layout.prediction);
        if (layout.clip) x0[j] = clamp(x0[j], splat(layout.clip_low), splat(layout.clip_high));
        if (threshold != nullptr) x0[j] = clamp(x0[j], splat(-bound.v), bound) / bound;
        if (layout.prediction != kXPrev) mean[j] = splat(row.mean_from_x0) * x0[j] + splat(row.mean_from_x) * x[j];
      }
      if (x0_out != nullptr) write(x0_out + sample + e, x0, count, layout.vector);
      if (draws || given) {
#pragma unroll
        for (int j = 0; j < V; ++j) {
          sigma[j] = learned ? learned_sigma(sigma[j], row, layout.variance) : splat(row.sigma);
          mean[j] = mean[j] + sigma[j] * z[j];
        }
      }
      write(out + sample + e, mean, count, layout.vector);
    });
  }
}

template <Type kType> static const char* launch(const DenoiseArguments& a, cudaStream_t stream) {
  DenoiseLayout layout = a.layout;
  const Target& target = layout.target;
  const bool tiled = a.draw.seed != nullptr && target.channels_last;
  const bool general = !is_plain(a.output, layout.output, kType) ||
                       !is_plain(a.unconditional, layout.unconditional, kType) ||
                       !is_plain(a.noise, layout.noise, kFloat32);
  layout.x_t.vector = in_groups(a.x_t, layout.x_t, target, V);
  layout.output.vector =
      in_groups(a.output, layout.output, target, V) && in_groups(a.variance, layout.output, target, V);
  layout.unconditional.vector = in_groups(a.unconditional, layout.unconditional, target, V);
  layout.noise.vector = in_groups(a.noise, layout.noise, target, V);
  layout.vector = in_groups(a.out, kFloat32, target, V) && in_groups(a.x0_out, kFloat32, target, V);
  return launch_walk(layout, tiled, general, V,
                     [&](auto by_tiles, auto is_general, const DenoiseLayout& with_tile, dim3 grid, int shared) {
                       // The general kernel asks for the dtypes itself.
                       constexpr Type kKnown = is_general.value ? kFloat32 : kType;
                       denoise_kernel<kKnown, by_tiles.value, is_general.value><<<grid, kThreads, shared, stream>>>(
                           a.x_t, a.output, a.variance, a.unconditional, a.noise, a.coefficients, a.index, a.threshold,
                           a.draw.seed, a.draw.sample_ids, a.out, a.x0_out, with_tile);
                     });
}

const char* launch_denoise(const DenoiseArguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (arguments.layout.output.type) {
    case kFloat16: return launch<kFloat16>(arguments, on);
    case kBFloat16: return launch<kBFloat16>(arguments, on);
    default: return launch<kFloat32>(arguments, on);
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
