#include "noise.h"
#include "source.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <class T>
static void noising_tiles(T* out, T* noise_out, const Noising& op, const Tiles& tiles, int64_t begin, int64_t end) {
  const Image& image = op.image;
  const bool from_bytes = op.x0.type == ScalarType::Byte;
  Buffers<4> buffers(tiles);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t sample = tiles.sample(tile), first = tiles.first(tile), count = tiles.count(tile);
    const int64_t at = sample * image.sample_stride + first;
    const float* const x0 = read(op.x0, image, sample, first, count, buffers[0]);
    const float* const row = op.coefficients + 2 * op.t[sample];
    const F signal = splat(row[0]), sigma = splat(row[1]);

    const auto add = [&](const float* noise, int64_t begin, int64_t end) {
      float* const result = std::is_same_v<T, float> ? reinterpret_cast<float*>(out + at) : buffers[3];
      for (int64_t i = begin; i < end; i += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, end - i));
        F x = load_lanes(x0 + i, n);
        if (from_bytes) x = x / splat(127.5f) - splat(1.0f);
        store_lanes(result + i, signal * x + sigma * load_lanes(noise + i, n), n);
      }
      if constexpr (!std::is_same_v<T, float>) narrow(out + at + begin, result + begin, end - begin);
    };
    if (op.draw == nullptr) {
      add(read(op.noise, image, sample, first, count, buffers[1]), 0, count);
      continue;
    }
    const NoiseKey key = noise_key(*op.draw, sample);
    if constexpr (std::is_same_v<T, float>) {
      float* const noise = noise_out == nullptr ? buffers[1] : noise_out + at;
      fill_normal_tile(noise, buffers[2], image, first, count, key,
                       [&](int64_t begin, int64_t end) { add(noise, begin, end); });
    } else {
      draw_tile(noise_out + at, buffers[1], buffers[2], image, first, count, key);
      add(read(op.noise, image, sample, first, count, buffers[1]), 0, count);  // as rounded
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
