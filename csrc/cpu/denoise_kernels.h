#include "noise.h"
#include "source.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

static void denoise_tiles(const Denoise& op, const Tiles& tiles, int64_t begin, int64_t end) {
  const Image& image = op.image;
  Buffers<5> buffers(tiles);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t sample = tiles.sample(tile), first = tiles.first(tile), count = tiles.count(tile);
    const auto tile_of = [&](const Source& source, int buffer) -> const float* {
      return source ? read(source, image, sample, first, count, buffers[buffer]) : nullptr;
    };
    StepRow row;
    std::memcpy(&row, op.coefficients + op.index[sample] * kStepColumns, sizeof row);

    const float* const x_t = tile_of(op.x_t, 0);
    const float* const output = tile_of(op.output, 0);
    const float* const unconditional = tile_of(op.unconditional, 1);
    const float* const variance = tile_of(op.variance_output, 2);
    float* const out = op.out + sample * image.sample_stride + first;
    float* const x0_out = op.x0_out == nullptr ? nullptr : op.x0_out + sample * image.sample_stride + first;
    const float threshold = op.threshold == nullptr ? 0.0f : op.threshold[sample];

    const auto step = [&](const float* noise, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, end - i));
        const F x = load_lanes(x_t + i, n);
        F e = load_lanes(output + i, n);
        if (unconditional != nullptr) e = guide(e, load_lanes(unconditional + i, n), row);
        F mean = e;
        if (op.prediction != kXPrev || x0_out != nullptr) {
          F x0 = predict_x0(x, e, row, op.prediction);
          if (op.clip) x0 = clamp(x0, splat(op.clip_low), splat(op.clip_high));
          if (op.threshold != nullptr) x0 = clamp(x0, splat(-threshold), splat(threshold)) / splat(threshold);
          if (op.prediction != kXPrev) mean = splat(row.mean_from_x0) * x0 + splat(row.mean_from_x) * x;
          if (x0_out != nullptr) store_lanes(x0_out + i, x0, n);
        }
        if (noise != nullptr) {
          F sigma = splat(row.sigma);
          if (variance != nullptr) sigma = learned_sigma(load_lanes(variance + i, n), row, op.variance);
          mean = mean + sigma * load_lanes(noise + i, n);
        }
        store_lanes(out + i, mean, n);
      }
    };
    if (op.draw != nullptr && row.sigma != 0.0f) {
      float* const noise = buffers[3];
      fill_normal_tile(noise, buffers[4], image, first, count, noise_key(*op.draw, sample),
                       [&](int64_t begin, int64_t end) { step(noise, begin, end); });
    } else {
      step(tile_of(op.noise, 3), 0, count);
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
