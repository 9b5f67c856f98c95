// Launch configurations of GroupNorm, as pure functions of a sample's shape, the dtype and the device. The number of
// samples decides on nothing but the number of blocks: a sample is cut in the same way in every batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "norm_act_op.h"

namespace ddpm_fast {
namespace cuda {

struct NormActShape {
  int64_t samples, channels, pixels, groups;
  bool channels_last;
  int element_size;
  int64_t width() const { return channels / groups; }
  int64_t group_size() const { return width() * pixels; }
  int vector() const { return 16 / element_size; }
};

struct NormActDevice {
  int shared_bytes;  // that a block may have
  bool clusters;     // compute capability 9.0 and later
};

struct NormActPlan {
  Statistics statistics;
  int parts, step, slab, slabs, piece, cuts, slots, lanes, span, spans;  // see NormActOp
  int threads, shared_bytes, apply_shared_bytes;
  int64_t blocks;
};

constexpr int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }
constexpr int64_t divide_up(int64_t a, int64_t by) { return (a + by - 1) / by; }

// A block is given up to this much of x at a time where there is a choice, and not less than a quarter: more blocks
// than that gain nothing, as each costs a few microseconds of latency.
constexpr int64_t kTileBytes = 32768;
// Blocks that a sample should give where its groups are large enough to be shared out: a batch of one is what the GPU
// would otherwise be idle for.
constexpr int64_t kBlocksOfSample = 128;
constexpr int64_t kOther = 1024;   // bytes of shared memory that kernels have besides what they are launched with

// Shared memory for a tile: at most half of what a multiprocessor has, where that is much, so that one block reads
// while another writes.
inline int64_t tile_limit(const NormActDevice& device) {
  return device.shared_bytes > 131072 ? device.shared_bytes / 2 : device.shared_bytes;
}

// The tile of a sample that is read twice.
inline int64_t split_bytes(int64_t sample_bytes) {
  return std::clamp(divide_up(sample_bytes, 2 * kBlocksOfSample), kTileBytes / 4, kTileBytes);
}

inline int threads_for(int64_t vectors, int most) {
  int threads = 32;
  while (threads < most && threads * 4 < vectors) threads *= 2;
  return threads;
}

// In how many parts a unit of so many bytes is kept in shared memory: 1, the blocks of a cluster, or 0 where it is not.
// fits(parts) tells whether a part would find room.
template <class Fits>
int resident_parts(int64_t unit_bytes, int64_t units, const NormActDevice& device, const Fits& fits) {
  if (!device.clusters) return unit_bytes <= kTileBytes / 2 * units && fits(1) ? 1 : 0;
  const int64_t wanted =
      std::clamp(divide_up(unit_bytes * units, kBlocksOfSample), kTileBytes / 4, kTileBytes);
  int parts = 1;
  while (parts < kMostOfCluster && parts * wanted < unit_bytes) parts *= 2;
  return fits(parts) ? parts : 0;
}

// How the threads of a tile with channels first share out a channel's sums: a power of two that covers its vectors
// reads shared memory without bank conflicts; a long channel is cut, so that all warps find work.
struct Spans {
  int64_t lanes, span, spans;
};
inline Spans spans_of(const NormActShape& shape, int64_t step) {
  const int64_t vectors = divide_up(shape.pixels, shape.vector());
  Spans result{1, 0, 0};
  while (result.lanes < 32 && result.lanes < vectors) result.lanes *= 2;
  result.span = 4 * result.lanes;
  // Its ends need not be those of vectors.
  result.spans = divide_up(divide_up(std::min(shape.pixels, step), shape.vector()) + 1, result.span);
  return result;
}

inline NormActPlan plan_first(const NormActShape& shape, const NormActDevice& device, int images) {
  const int64_t size = shape.group_size(), item = shape.element_size * images, vector = shape.vector();
  const auto step_of = [&](int64_t parts) { return round_up(divide_up(size, parts), vector); };
  const auto slots = [&](int64_t step) { return std::min(shape.width(), divide_up(step, shape.pixels) + 1); };
  const auto shared = [&](int64_t step) {
    return step * item + 16 * slots(step) * (images == 1 ? 1 : 1 + spans_of(shape, step).spans);
  };
  NormActPlan plan{};
  plan.parts = resident_parts(size * item, shape.groups, device, [&](int64_t parts) {
    return shared(step_of(parts)) + kOther <= tile_limit(device) && step_of(parts) * (parts - 1) < size;
  });
  plan.statistics = plan.parts == 0 ? kGiven : plan.parts == 1 ? kOwn : kCluster;
  int64_t step;
  if (plan.parts > 0) {
    step = step_of(plan.parts);
  } else {
    step = round_up(split_bytes(size * item * shape.groups) / item, vector);
    // Channels of few pixels take more memory for their coefficients than for themselves.
    while (shared(step) + kOther > tile_limit(device)) step = round_up(step / 2, vector);
    plan.parts = static_cast<int>(divide_up(size, step));
  }
  const Spans spans = spans_of(shape, step);
  plan.step = static_cast<int>(step);
  plan.slab = plan.cuts = 1;
  plan.slabs = static_cast<int>(shape.groups);
  plan.piece = static_cast<int>(shape.width());
  plan.slots = static_cast<int>(slots(step));
  plan.lanes = static_cast<int>(spans.lanes);
  plan.span = static_cast<int>(spans.span);
  plan.spans = static_cast<int>(spans.spans);
  plan.threads = threads_for(divide_up(std::min(step, size), vector), kMostThreads);
  plan.shared_bytes = static_cast<int>(shared(step));
  plan.apply_shared_bytes = static_cast<int>(16 * slots(step));
  plan.blocks = shape.samples * shape.groups * plan.parts;
  return plan;
}

// The fewest groups side by side that are whole vectors, where there are such, and at least so many bytes.
inline int64_t groups_of_slab(const NormActShape& shape, int64_t row_bytes) {
  const int64_t vector = shape.vector(), width = shape.width();
  int64_t groups = shape.channels % vector == 0 ? vector / std::gcd(width, vector) : 1;
  while (groups < shape.groups && groups * width * shape.element_size < row_bytes) groups *= 2;
  return std::min(groups, shape.groups);
}

inline NormActPlan plan_last(const NormActShape& shape, const NormActDevice& device, int images) {
  const int most = images == 1 ? kMostThreads : kMostThreadsBackwardLast;
  const int64_t vector = shape.vector(), width = shape.width();
  const auto columns = [&](int64_t channels) { return divide_up(channels, vector); };
  const auto threads = [&](int64_t channels, int64_t step) {
    const int64_t least = round_up(columns(channels), 32);
    return std::max<int64_t>(threads_for(columns(channels) * step, most), least);
  };
  const auto apply_shared = [&](int64_t groups, int64_t channels, int64_t step) {
    return columns(channels) * vector * (16 + 4) + threads(channels, step) * vector * 4 + groups * 40;
  };
  const auto shared = [&](int64_t groups, int64_t channels, int64_t step) {
    return columns(channels) * step * 16 * images + apply_shared(groups, channels, step);
  };
  NormActPlan plan{};
  int64_t slab = groups_of_slab(shape, 64), piece = slab * width, step = shape.pixels;
  if (columns(piece) <= most) {
    plan.parts = resident_parts(
        columns(piece) * 16 * images * shape.pixels, divide_up(shape.groups, slab), device, [&](int64_t parts) {
          const int64_t rows = divide_up(shape.pixels, parts);
          return shared(slab, piece, rows) + kOther <= tile_limit(device) && rows * (parts - 1) < shape.pixels;
        });
  }
  plan.statistics = plan.parts == 0 ? kGiven : plan.parts == 1 ? kOwn : kCluster;
  plan.cuts = 1;
  if (plan.parts > 0) {
    step = divide_up(shape.pixels, plan.parts);
  } else {
    slab = groups_of_slab(shape, 512);
    piece = slab * width;
    if (columns(piece) > most) slab = groups_of_slab(shape, 64);
    piece = slab * width;
    if (columns(piece) > most) {
      slab = 1;
      plan.cuts = static_cast<int>(divide_up(columns(width), most));
      piece = divide_up(columns(width), plan.cuts) * vector;
    }
    const int64_t bytes = split_bytes(shape.channels * shape.pixels * shape.element_size * images);
    step = std::clamp<int64_t>(bytes / (columns(piece) * 16 * images), 1, shape.pixels);
    plan.parts = static_cast<int>(divide_up(shape.pixels, step)) * plan.cuts;
  }
  plan.step = static_cast<int>(step);
  plan.slab = static_cast<int>(slab);
  plan.slabs = static_cast<int>(divide_up(shape.groups, slab));
  plan.piece = static_cast<int>(piece);
  plan.slots = plan.piece;
  plan.threads = static_cast<int>(threads(piece, step));
  plan.shared_bytes = static_cast<int>(shared(slab, piece, step));
  plan.apply_shared_bytes = static_cast<int>(apply_shared(slab, piece, step));
  plan.blocks = shape.samples * plan.slabs * plan.parts;
  return plan;
}

inline NormActPlan plan_norm_act(const NormActShape& shape, const NormActDevice& device) {
  return shape.channels_last ? plan_last(shape, device, 1) : plan_first(shape, device, 1);
}
// The backward pass keeps grad_out beside x.
inline NormActPlan plan_norm_act_backward(const NormActShape& shape, const NormActDevice& device) {
  return shape.channels_last ? plan_last(shape, device, 2) : plan_first(shape, device, 2);
}

// Bytes that the launches need besides: moments of the parts, and mean and rstd where nobody asks for them.
inline int64_t norm_act_workspace(const NormActShape& shape, const NormActPlan& plan) {
  return plan.statistics == kGiven ? shape.samples * shape.groups * (plan.parts + 1) * 16 : 0;
}
// The sums of the tiles, those of the channels where a unit is several launches' work, and the groups' two means.
inline int64_t norm_act_backward_workspace(const NormActShape& shape, const NormActPlan& plan) {
  const int64_t totals = plan.statistics == kGiven ? shape.samples * shape.channels : 0;
  return 16 * (plan.blocks * plan.slots + totals + shape.samples * shape.groups);
}

inline NormActOp op_of(const NormActShape& shape, const NormActPlan& plan) {
  NormActOp op;
  op.group_size = shape.group_size();
  op.channels = static_cast<int>(shape.channels);
  op.groups = static_cast<int>(shape.groups);
  op.width = static_cast<int>(shape.width());
  op.pixels = static_cast<int>(shape.pixels);
  op.parts = plan.parts;
  op.step = plan.step;
  op.slab = plan.slab;
  op.slabs = plan.slabs;
  op.piece = plan.piece;
  op.cuts = plan.cuts;
  op.slots = plan.slots;
  op.lanes = plan.lanes;
  op.span = plan.span;
  op.spans = plan.spans;
  op.statistics = plan.statistics;
  op.by_pixels = Divider(static_cast<uint32_t>(shape.pixels));
  op.by_width = Divider(static_cast<uint32_t>(shape.width()));
  op.by_step = LongDivider(static_cast<uint32_t>(plan.step));
  op.long_by_pixels = LongDivider(static_cast<uint32_t>(shape.pixels));
  return op;
}

}  // namespace cuda
}  // namespace ddpm_fast
