#include "noise.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

DDPM_FAST_INLINE NoiseKey noise_key(const Draw& draw, int64_t sample) {
  return {{draw.key_low, draw.key_high}, draw.id(sample), draw.step(sample), draw.stream};
}

template <class T>
static void normal_tiles(T* out, const Image& image, const Tiles& tiles, const Draw& draw, int64_t begin, int64_t end) {
  std::vector<float> buffer(2 * tiles.elements());
  float* const values = buffer.data();
  float* const scratch = values + tiles.elements();
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t sample = tiles.sample(tile), first = tiles.first(tile), count = tiles.count(tile);
    fill_normal_tile(values, scratch, image, first, count, noise_key(draw, sample));
    T* const to = out + sample * image.sample_stride + first;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(values + i));
    if (i < count) store(to + i, load(values + i, static_cast<int>(count - i)), static_cast<int>(count - i));
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
