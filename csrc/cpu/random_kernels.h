#include "noise.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <class T>
static void normal_tiles(T* out, const Image& image, const Tiles& tiles, const Draw& draw, int64_t begin, int64_t end) {
  Buffers<2> buffers(tiles);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t sample = tiles.sample(tile), first = tiles.first(tile);
    draw_tile(out + sample * image.sample_stride + first, buffers[0], buffers[1], image, first, tiles.count(tile),
              noise_key(draw, sample));
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
