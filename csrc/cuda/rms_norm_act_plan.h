// Launch configurations of RMSNorm, as pure functions of a sample's shape, the dtype and the device.
//
// A tile is a run of pixels with all of their channels: rows of memory, whose vectors are its columns. With channels
// last a row is a pixel, with channels first a channel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "divider.h"
#include "norm_act_op.h"

namespace ddpm_fast {
namespace cuda {

struct RmsNormActShape {
  int64_t samples, channels, pixels;
  bool channels_last;
  int element_size;
  int vector() const { return 16 / element_size; }
};

struct RmsNormActOp {
  int64_t x_stride = 0, out_stride = 0, grad_stride = 0;  // as in NormActOp
  float eps = 0, root = 0;  // root: of the number of channels
  int32_t channels = 0, pixels = 0;
  int32_t step = 0;     // pixels of a tile
  int32_t tiles = 0;    // of a sample
  int32_t columns = 0;  // vectors of a row at most
  int32_t channel_columns = 0, pixel_columns = 0;  // those that hold a value of each channel, and of each pixel of a tile
  int32_t team = 0;     // threads that sum up a row, the logarithm of their number
  int32_t kept = 0;     // whether a tile stays in shared memory, or is read again
  int32_t activation = 0;
  Divider by_columns;
  ParameterLayout weight, scale, shift;
};

struct RmsNormActPlan {
  RmsNormActOp op;
  int threads, shared_bytes;
  int64_t blocks;
};

constexpr int kRmsThreads = 256;
// The coefficients of all channels lie in shared memory, on every device.
constexpr int64_t kMostRmsChannels = 4096;

// images: that a tile keeps, 1 forward and 2 backward.
inline RmsNormActPlan plan_rms_norm_act(const RmsNormActShape& shape, int shared_bytes, int images) {
  constexpr int64_t kTile = 16384, kStatic = 1024;
  const int64_t vector = shape.vector(), pixel_bytes = shape.channels * shape.element_size * images;
  const auto up = [](int64_t a, int64_t by) { return (a + by - 1) / by; };
  int64_t step;
  if (shape.channels_last) {
    step = std::clamp<int64_t>(kTile / pixel_bytes, 1, shape.pixels);
  } else {
    // 64 bytes of a row, as few as 16 where a tile would else find no room, and more where rows are few.
    const int64_t room = std::min<int64_t>(shared_bytes - kStatic, 65536) / 2;
    step = vector * std::clamp<int64_t>(kTile / (pixel_bytes * vector), pixel_bytes * vector * 4 <= room ? 4 : 1, 64);
    step = std::min(step, up(shape.pixels, vector) * vector);
  }
  RmsNormActPlan plan{};
  RmsNormActOp& op = plan.op;
  op.channels = static_cast<int>(shape.channels);
  op.root = std::sqrt(static_cast<float>(shape.channels));
  op.pixels = static_cast<int>(shape.pixels);
  op.step = static_cast<int>(step);
  op.tiles = static_cast<int>(up(shape.pixels, step));
  op.columns = static_cast<int>(up(shape.channels_last ? shape.channels : step, vector));
  op.by_columns = Divider(static_cast<uint32_t>(op.columns));
  const int64_t rows = shape.channels_last ? step : shape.channels;
  op.channel_columns = static_cast<int>(up(shape.channels, vector));
  op.pixel_columns = static_cast<int>(up(step, vector));
  while (op.team < 5 && 1 << op.team < op.columns) ++op.team;
  // factor and shift of channels, two values of pixels, a value of each thread's elements.
  const int64_t others = 8 * vector * (op.channel_columns + op.pixel_columns) + kRmsThreads * vector * 4;
  const int64_t tile = rows * op.columns * 16 * images;
  op.kept = tile + others + kStatic <= shared_bytes;
  plan.threads = kRmsThreads;
  plan.shared_bytes = static_cast<int>(others + (op.kept ? tile : 0));
  plan.blocks = shape.samples * op.tiles;
  return plan;
}

// Bytes for the sums of channels over the pixels of each tile, and of each sample.
inline int64_t rms_norm_act_backward_workspace(const RmsNormActShape& shape, const RmsNormActPlan& plan) {
  return shape.channels * (8 * plan.blocks + 4 * shape.samples);
}

}  // namespace cuda
}  // namespace ddpm_fast
