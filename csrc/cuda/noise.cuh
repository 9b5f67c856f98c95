// Normals as docs/noise.md defines them, four a call of Philox, and the two ways that kernels walk through a tensor
// while they make them.
#pragma once

#include "memory.cuh"
#include "plan.h"

namespace ddpm_fast {
namespace cuda {

// What selects the noise of one sample at one step.
struct NoiseKey {
  PhiloxKey key;
  uint32_t sample_id, step, stream;
};

// Layout: what has the stream's number.
template <class Layout>
DDPM_FAST_INLINE NoiseKey noise_key(const DrawPointers& draw, const Layout& layout, int step_stride, int64_t sample) {
  const uint64_t seed = static_cast<uint64_t>(*draw.seed);
  const uint32_t id = static_cast<uint32_t>(draw.sample_ids == nullptr ? sample : draw.sample_ids[sample]);
  const uint32_t step = static_cast<uint32_t>(draw.step[sample * step_stride]);
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}, id, step, layout.stream};
}

DDPM_FAST_INLINE void normal4(F* z, uint32_t block, const NoiseKey& noise) {
  W r[4] = {noise.sample_id, block, noise.step, noise.stream};
  philox(r, noise.key);
  normal_pair({static_cast<uint32_t>(r[0])}, {static_cast<uint32_t>(r[1])}, z[0], z[1]);
  normal_pair({static_cast<uint32_t>(r[2])}, {static_cast<uint32_t>(r[3])}, z[2], z[3]);
}

struct Tile {
  uint64_t first_pixel, first_channel;
  unsigned pixels, channels;
  unsigned pitch;  // element (c, p) of the tile has its noise at p * pitch + c
};

// The logarithm of how many neighbouring channels neighbouring threads take, a power of two, so that what a warp writes at
// once goes to 32 different banks. With g = gcd(pitch, 32) the pitch times four pixels, the four pixels and the g channels
// reach them all.
DDPM_FAST_INLINE int log_of_side(unsigned pitch) { return ::min(__ffs(pitch) - 1, 5); }

static __device__ void fill_tile(float* tile, const Tile& at, uint64_t pixels, const NoiseKey& noise) {
  const int shift = log_of_side(at.pitch);
  const unsigned side = 1u << shift;
  // Blocks of four that a run of so many pixels touches, in the channel where it is aligned worst.
  const unsigned blocks = (at.pixels + (pixels % 4 == 0 ? 3 : 6)) / 4, row = blocks << shift;
  const unsigned tasks = ((at.channels + side - 1) >> shift) * row;
  const unsigned turn = threadIdx.x % 32 >> ::max(shift, 3);
#pragma unroll 1
  for (unsigned task = threadIdx.x; task < tasks; task += kThreads) {
    // Beyond the last channel there is room for these few, as the pitch is a multiple of them.
    const unsigned channel = (task / row << shift) + task % side, block = task % row >> shift;
    const uint64_t first = (at.first_channel + channel) * pixels + at.first_pixel;
    F z[4];
    normal4(z, static_cast<uint32_t>(first / 4) + block, noise);
    // Each eight lanes begin with another of the four.
    if (turn & 1) {
      const F head = z[0];
      z[0] = z[1], z[1] = z[2], z[2] = z[3], z[3] = head;
    }
    if (turn & 2) {
      const F head = z[0], next = z[1];
      z[0] = z[2], z[1] = z[3], z[2] = head, z[3] = next;
    }
    // The tile's pixel of the block's first normal. Those before the tile become too large, as those behind it are.
    const unsigned start = 4 * block - static_cast<unsigned>(first % 4);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned pixel = start + (j + turn) % 4;
      if (pixel < at.pixels) tile[pixel * at.pitch + channel] = z[j].v;
    }
  }
}

// Walks through a sample by tiles whose noise lies in shared memory.
template <class Layout, class Body>
DDPM_FAST_INLINE void walk_tiles(float* tile, const Layout& layout, bool draws, const NoiseKey& key,
                                 const Body& body) {
  const uint64_t all_channels = layout.target.channels, all_pixels = layout.target.pixels;
  const unsigned most_channels = layout.tile_channels, most_pixels = layout.tile_pixels;
  // Whole pixels are one run of memory; otherwise each pixel's channels are, in tiles of kTileChannels.
  const bool whole = most_channels == all_channels;
#pragma unroll 1
  for (uint64_t c = uint64_t{blockIdx.z} * most_channels; c < all_channels; c += uint64_t{gridDim.z} * most_channels) {
    const unsigned channels = static_cast<unsigned>(::min(uint64_t{most_channels}, all_channels - c));
#pragma unroll 1
    for (uint64_t p = uint64_t{blockIdx.x} * most_pixels; p < all_pixels; p += uint64_t{gridDim.x} * most_pixels) {
      const unsigned pixels = static_cast<unsigned>(::min(uint64_t{most_pixels}, all_pixels - p));
      if (draws) {
        __syncthreads();  // the last tile has been read
        fill_tile(tile, {p, c, pixels, channels, most_channels}, all_pixels, key);
        __syncthreads();
      }
      const unsigned length = whole ? pixels * channels : channels;
#pragma unroll 1
      for (unsigned i = threadIdx.x * 4; i < pixels * most_channels; i += kThreads * 4) {
        const unsigned run = whole ? 0 : i / kTileChannels, at = whole ? i : i % kTileChannels;
        if (at >= length) continue;
        const unsigned count = ::min(4u, length - at);
        body((p + run) * all_channels + c + at, count, [&](F (&z)[4]) {
          if (count == 4) {
            const float4 values = *reinterpret_cast<const float4*>(tile + i);
            z[0].v = values.x, z[1].v = values.y, z[2].v = values.z, z[3].v = values.w;
            return;
          }
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (j == 0 || j < count) z[j].v = tile[i + j];
        });
      }
    }
  }
}

// Walks through a sample in memory order: `body(e, count, draw)` for groups of V elements, of which the last may be
// incomplete; `draw(z)` gives the group's noise, where there is any.
template <int V, bool kTiled, class Layout, class Body>
DDPM_FAST_INLINE void walk(float* tile, const Layout& layout, bool draws, const NoiseKey& key, const Body& body) {
  if constexpr (kTiled) {
    walk_tiles(tile, layout, draws, key, body);
  } else {
    const int64_t size = layout.target.size(), step = static_cast<int64_t>(gridDim.x) * kThreads * V;
#pragma unroll 1
    for (int64_t e = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * V; e < size; e += step) {
      const int count = static_cast<int>(::min(static_cast<int64_t>(V), size - e));
      body(e, count, [&](F (&z)[V]) {
#pragma unroll
        for (int q = 0; q < V; q += 4) normal4(z + q, static_cast<uint32_t>((e + q) / 4), key);
      });
    }
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
