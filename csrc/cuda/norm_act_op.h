// What the GroupNorm kernels are told besides their pointers.
//
// With channels first a tile is a run of elements of one group. With channels last it is a run of pixels of a slab of
// channels: several whole groups, or a cut of one that is very wide. A tile is a block's work and goes to its shared
// memory; the tiles that share statistics are the parts of a unit.
#pragma once

#include <cstdint>

#include "divider.h"

namespace ddpm_fast {
namespace cuda {

// Of a block; two or three share a multiprocessor's registers. The second is for the backward pass with channels last,
// whose threads keep the coefficients and sums of kWidth channels each.
constexpr int kMostThreads = 256, kMostThreadsBackwardLast = 128;
constexpr int kMostOfCluster = 8;  // blocks, on any device that has clusters

// How a parameter of one value a channel lies in memory: elements from sample to sample (0 where all share it) and
// from channel to channel, and a Type.
struct ParameterLayout {
  int64_t row = 0, column = 0;
  int32_t type = 0;
};

// Where the statistics of a unit come from.
enum Statistics : int32_t {
  kOwn,      // the unit is one tile
  kCluster,  // its tiles are the blocks of a cluster
  kGiven,    // its parts were summed up by a launch before
};

struct NormActOp {
  int64_t x_stride = 0, out_stride = 0, grad_stride = 0;  // elements from one sample of x, out or grad_x, grad_out
                                                          // to the next
  int64_t group_size = 0;
  double eps = 0;
  int32_t channels = 0, groups = 0, width = 0, pixels = 0;  // width: channels of a group
  int32_t parts = 0;                                        // of a unit
  int32_t step = 0;    // of a tile: elements with channels first, pixels with channels last
  int32_t slab = 0;    // groups of a slab
  int32_t slabs = 0;   // of a sample
  int32_t piece = 0;   // channels of a tile at most: slab * width, or fewer where a group is cut
  int32_t cuts = 0;    // of a group
  int32_t slots = 0;   // backward: channels that a tile may touch
  int32_t lanes = 0;   // backward with channels first: threads that sum up a span of a channel,
  int32_t span = 0;    // its vectors,
  int32_t spans = 0;   // and how many a channel may have in a tile
  int32_t activation = 0;
  int32_t statistics = 0;
  Divider by_pixels, by_width;
  LongDivider by_step, long_by_pixels;  // of places in a group
  ParameterLayout weight, bias, scale, shift, embedding;
};

}  // namespace cuda
}  // namespace ddpm_fast
