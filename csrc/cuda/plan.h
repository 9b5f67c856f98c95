// Launch configurations, as pure functions of the sizes and of the device's number of multiprocessors. They decide
// where an element is computed and never what it becomes.
#pragma once

#include <algorithm>
#include <cstdint>

namespace ddpm_fast {
namespace cuda {

constexpr int kThreads = 256;  // of a block
constexpr int64_t kMostSamples = 65535;  // the limit of grid.y; kernels loop over the rest
// Blocks for each multiprocessor before threads take more than one group of elements: four times what is resident.
constexpr int64_t kBlocksPerProcessor = 32;

struct Grid {
  unsigned x, y, z;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A thread takes `vector` neighbouring elements of a sample at a time: x counts groups of them, y samples.
inline Grid plan_flat(int64_t samples, int64_t size, int vector, int processors) {
  const int64_t y = std::min(samples, kMostSamples);
  const int64_t enough = std::max<int64_t>(ceil_div(processors * kBlocksPerProcessor, std::max<int64_t>(y, 1)), 1);
  const int64_t x = std::min(ceil_div(size, int64_t{kThreads} * vector), enough);
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), 1};
}

// Noise for a channels_last image: a call of Philox serves four pixels of a channel, which lie apart. A block makes the
// noise of a tile, pixels times channels, in shared memory and then walks through it in memory order.
struct TilePlan {
  Grid grid;  // x counts tiles along the pixels, y samples, z tiles along the channels
  int pixels, channels;
  int shared_bytes;
};

constexpr int64_t kTileElements = 2048;  // two calls of Philox a thread; 8 KiB of shared memory
constexpr int64_t kTileChannels = 256;

inline TilePlan plan_tiles(int64_t samples, int64_t channels, int64_t pixels, int processors) {
  const int64_t tile_channels = std::min(channels, kTileChannels);
  // A multiple of eight keeps tiles aligned, for vectors of any dtype and for Philox's four. 
  const int64_t most = std::max<int64_t>(kTileElements / tile_channels / 8 * 8, 8);
  const int64_t tile_pixels = std::min(most, ceil_div(pixels, 8) * 8);
  const int64_t y = std::min(samples, kMostSamples), z = std::min(ceil_div(channels, tile_channels), kMostSamples);
  const int64_t enough = std::max<int64_t>(ceil_div(processors * kBlocksPerProcessor, std::max<int64_t>(y * z, 1)), 1);
  const int64_t x = std::min(ceil_div(pixels, tile_pixels), enough);
  return {{static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)},
          static_cast<int>(tile_pixels),
          static_cast<int>(tile_channels),
          static_cast<int>(tile_pixels * tile_channels * 4)};
}

}  // namespace cuda
}  // namespace ddpm_fast
