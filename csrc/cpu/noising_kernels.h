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
    if (noise_out != nullptr)
      draw_tile(noise_out + at, buffers[0], buffers[1], image, first, count, noise_key(*op.draw, sample));
    else if (op.draw != nullptr)
      fill_normal_tile(buffers[3], buffers[0], image, first, count, noise_key(*op.draw, sample));
    const float* const x0 = read(op.x0, image, sample, first, count, buffers[0]);
    const float* const noise = op.noise ? read(op.noise, image, sample, first, count, buffers[1]) : buffers[3];
    const float* const row = op.coefficients + 2 * op.t[sample];
    const F signal = splat(row[0]), sigma = splat(row[1]);
    float* const result = std::is_same_v<T, float> ? reinterpret_cast<float*>(out + at) : buffers[2];
    for (int64_t i = 0; i < count; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      F x = load_lanes(x0 + i, n);
      if (from_bytes) x = x / splat(127.5f) - splat(1.0f);
      store_lanes(result + i, signal * x + sigma * load_lanes(noise + i, n), n);
    }
    if constexpr (!std::is_same_v<T, float>) narrow(out + at, result, count);
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
