// Normals for runs of elements of one sample, as docs/noise.md defines them; included by kernel files, once per
// instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

#include "abreast.h"

// What selects the noise of one sample at one step.
struct NoiseKey {
  PhiloxKey key;
  uint32_t sample_id, step, stream;
};

DDPM_FAST_INLINE NoiseKey noise_key(const Draw& draw, int64_t sample) {
  return {{draw.key_low, draw.key_high}, draw.id(sample), draw.step(sample), draw.stream};
}

// n times sixty-four normals, in element order, from as many blocks of four. Lane 4q+j of a vector works on block 4j+q
// of its sixteen, so that the 4x4 transposes leave each vector with sixteen successive elements.
template <int n> DDPM_FAST_INLINE void normals(float* out, uint32_t first_block, const NoiseKey& noise) {
  alignas(64) static constexpr uint32_t kBlock[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  using Words = Abreast<n>;
  Row<n, U> block;
  DDPM_FAST_UNROLL for (uint32_t i = 0; i < n; ++i) block.v[i] = load(kBlock) + splat(first_block + 16 * i);
  Row<n, W> r[4] = {spread(Words::splat(noise.sample_id)), spread(block), spread(Words::splat(noise.step)),
                    spread(Words::splat(noise.stream))};
  Words::philox(r, {noise.key.low, noise.key.high});
  // Both pairs of every block at once.
  Row<2 * n, U> first, second;
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) {
    first.v[i] = gather_words(r[0].v[i]), second.v[i] = gather_words(r[1].v[i]);
    first.v[n + i] = gather_words(r[2].v[i]), second.v[n + i] = gather_words(r[3].v[i]);
  }
  Row<2 * n, F> even, odd;
  Abreast<2 * n>::normal_pair(first, second, even, odd);
  DDPM_FAST_UNROLL for (int i = 0; i < n; ++i, out += 64) {
    transpose4(even.v[i], odd.v[i], even.v[n + i], odd.v[n + i]);
    store(out, even.v[i]);
    store(out + 16, odd.v[i]);
    store(out + 32, even.v[n + i]);
    store(out + 48, odd.v[n + i]);
  }
}

// Elements first .. first + count - 1 of the sample, in logical (C, *) order; done(begin, end) is called for each run of
// them as soon as it is made.
template <class Done>
DDPM_FAST_INLINE void fill_normal(float* out, int64_t first, int64_t count, const NoiseKey& key, const Done& done) {
  const NoiseKey noise = key;  // a copy, which the stores below cannot alias
  for (int64_t i = 0, n; i < count; i += n) {
    const uint32_t block = static_cast<uint32_t>((first + i) / 4);
    const int64_t skip = (first + i) % 4;
    n = std::min(count - i, 64 - skip);
    if (skip == 0 && count - i >= 128) {
      n = 128;
      normals<2>(out + i, block, noise);
    } else {
      float whole[64];
      normals<1>(whole, block, noise);
      std::memcpy(out + i, whole + skip, n * sizeof(float));
    }
    done(i, i + n);
  }
}

// planes[c][i] to out[i][c].
static void interleave(float* out, const float* planes, int64_t channels, int64_t pixels) {
  int64_t done = 0;
  if (channels == 3) {
    for (; done + kLanes <= pixels; done += kLanes) {
      const float* const plane = planes + done;
      store_threes(out + 3 * done, load(plane), load(plane + pixels), load(plane + 2 * pixels));
    }
  } else {
    // Sixteen pixels are written four channels at a time. What the last four have too many runs over into the next
    // pixel, which is written later; hence the tile's last pixel, which has none behind it, is left to the end.
    while (pixels > kLanes && done + 1 < pixels) {
      const int64_t pixel = std::min(done, pixels - 1 - kLanes);
      for (int64_t c = (channels - 1) / 4 * 4; c >= 0; c -= 4) {
        const auto plane = [&](int64_t i) { return load(planes + std::min(c + i, channels - 1) * pixels + pixel); };
        F v[4] = {plane(0), plane(1), plane(2), plane(3)};
        transpose4(v[0], v[1], v[2], v[3]);
        store_quarters_in_turn(out + pixel * channels + c, channels, v[0], v[1], v[2], v[3]);
      }
      done = pixel + kLanes;
    }
  }
  for (; done < pixels; ++done)
    for (int64_t c = 0; c < channels; ++c) out[done * channels + c] = planes[c * pixels + done];
}

// Elements first .. first + count - 1 of the sample in memory order; scratch holds as many floats as a tile. done() as
// above: whoever reads images along with the noise gives the processor time to fetch them.
template <class Done>
DDPM_FAST_INLINE void fill_normal_tile(float* out, float* scratch, const Image& image, int64_t first, int64_t count,
                                       const NoiseKey& noise, const Done& done) {
  if (image.order() == Order::kChannelsFirst) return fill_normal(out, first, count, noise, done);
  const int64_t channels = image.channels, pixel = first / channels, pixels = count / channels;
  for (int64_t p = 0, n; p < pixels; p += n) {
    n = std::min<int64_t>(128, pixels - p);
    for (int64_t c = 0; c < channels; ++c)
      fill_normal(scratch + c * n, c * image.pixels + pixel + p, n, noise, [](int64_t, int64_t) {});
    interleave(out + p * channels, scratch, channels, n);
    done(p * channels, (p + n) * channels);
  }
}

static void fill_normal_tile(float* out, float* scratch, const Image& image, int64_t first, int64_t count,
                             const NoiseKey& noise) {
  fill_normal_tile(out, scratch, image, first, count, noise, [](int64_t, int64_t) {});
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
