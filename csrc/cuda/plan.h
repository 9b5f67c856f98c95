// Launch configurations, as pure functions of the sizes and of the device's number of multiprocessors. They decide
// where an element is computed and never what it becomes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace ddpm_fast {
namespace cuda {

constexpr int kThreads = 256;  // of a block
// Blocks for each multiprocessor, before threads take more than one group of elements: a few times what is resident.
constexpr int64_t kBlocksPerProcessor = 32;
constexpr int64_t kMostY = 65535;  // the hardware's limit for grid.y and grid.z

struct Grid {
  unsigned x, y, z;
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cuts (x, y, z) down to what keeps the device busy, x first: kernels loop over the rest.
inline Grid limited(int64_t x, int64_t y, int64_t z, int processors) {
  const int64_t enough = processors * kBlocksPerProcessor;
  z = std::min({z, enough, kMostY});
  y = std::min({y, ceil_div(enough, z), kMostY});
  x = std::min(x, ceil_div(enough, y * z));
  return {static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)};
}

// A thread takes `vector` neighbouring elements of a sample at a time: x counts blocks of them, y samples.
inline Grid plan_flat(int64_t samples, int64_t size, int vector, int processors) {
  return limited(ceil_div(size, int64_t{kThreads} * vector), samples, 1, processors);
}

// Groups of elements that a thread of the quantile's counting takes at least: a block's own counts take as long to clear
// and to add up as that many to count.
constexpr int kCountedGroups = 8;

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
  // A multiple of eight keeps tiles aligned, for vectors of any dtype and for Philox's four. With this many a warp makes
  // the noise of one group of channels, and its writes meet no bank twice.
  const int64_t whole_warps = std::max<int64_t>(128 / std::gcd(tile_channels, int64_t{16}), 8);
  const int64_t most = std::max<int64_t>(kTileElements / tile_channels, 8), unit = most < whole_warps ? 8 : whole_warps;
  const int64_t tile_pixels = std::min(most / unit * unit, ceil_div(pixels, 8) * 8);
  const int64_t x = ceil_div(pixels, tile_pixels), z = ceil_div(channels, tile_channels);
  return {limited(x, samples, z, processors), static_cast<int>(tile_pixels), static_cast<int>(tile_channels),
          static_cast<int>(tile_pixels * tile_channels * 4)};
}

}  // namespace cuda
}  // namespace ddpm_fast
