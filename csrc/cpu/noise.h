// Normals for runs of elements of one sample, as docs/noise.md defines them; included by kernel files, once per
// instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// What selects the noise of one sample at one step.
struct NoiseKey {
  PhiloxKey key;
  uint32_t sample_id, step, stream;
};

DDPM_FAST_INLINE NoiseKey noise_key(const Draw& draw, int64_t sample) {
  return {{draw.key_low, draw.key_high}, draw.id(sample), draw.step(sample), draw.stream};
}

// Sixteen blocks of four normals, in element order. Lane 4q+j works on block 4j+q, so that the 4x4 transposes
// leave each vector with sixteen successive elements.
DDPM_FAST_INLINE void normal64(float* out, uint32_t first_block, const NoiseKey& noise) {
  alignas(64) static constexpr uint32_t kBlock[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  W r[4] = {spread(splat(noise.sample_id)), spread(load(kBlock) + splat(first_block)), spread(splat(noise.step)),
            spread(splat(noise.stream))};
  philox(r, noise.key);
  F a, b, c, d;
  normal_pair(gather_words(r[0]), gather_words(r[1]), a, b);
  normal_pair(gather_words(r[2]), gather_words(r[3]), c, d);
  transpose4(a, b, c, d);
  store(out, a);
  store(out + 16, b);
  store(out + 32, c);
  store(out + 48, d);
}

// count normals out of the sixty-four that start at a block, leaving out the first `skip`.
static void fill_part(float* out, uint32_t first_block, int64_t skip, int64_t count, const NoiseKey& noise) {
  float whole[64];
  normal64(whole, first_block, noise);
  std::memcpy(out, whole + skip, count * sizeof(float));
}

// Elements first .. first + count - 1 of the sample, in logical (C, *) order.
static void fill_normal(float* out, int64_t first, int64_t count, const NoiseKey& key) {
  const NoiseKey noise = key;  // a copy, which the stores below cannot alias
  uint32_t block = static_cast<uint32_t>(first / 4);
  if (const int64_t skip = first % 4; skip != 0) {
    const int64_t n = std::min(64 - skip, count);
    fill_part(out, block, skip, n, noise);
    out += n;
    count -= n;
    block += 16;
  }
  for (; count >= 64; count -= 64, out += 64, block += 16) normal64(out, block, noise);
  if (count > 0) fill_part(out, block, 0, count, noise);
}

// Elements first .. first + count - 1 of the sample in memory order; scratch holds as many floats as a tile.
static inline void fill_normal_tile(float* out, float* scratch, const Image& image, int64_t first, int64_t count,
                                    const NoiseKey& noise) {
  if (image.order() == Order::kChannelsFirst) return fill_normal(out, first, count, noise);
  const int64_t channels = image.channels, pixel = first / channels, pixels = count / channels;
  for (int64_t c = 0; c < channels; ++c) {
    fill_normal(scratch, c * image.pixels + pixel, pixels, noise);
    for (int64_t i = 0; i < pixels; ++i) out[i * channels + c] = scratch[i];
  }
}

// Rounds a tile to the dtype of where it goes.
template <class T> static void narrow(T* out, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    store_lanes(out + i, load_lanes(from + i, n), n);
  }
}

// The noise of one tile, written where it belongs in its own dtype.
template <class T>
static void draw_tile(T* out, float* buffer, float* scratch, const Image& image, int64_t first, int64_t count,
                              const NoiseKey& noise) {
  if constexpr (std::is_same_v<T, float>) {
    fill_normal_tile(out, scratch, image, first, count, noise);
  } else {
    fill_normal_tile(buffer, scratch, image, first, count, noise);
    narrow(out, buffer, count);
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
