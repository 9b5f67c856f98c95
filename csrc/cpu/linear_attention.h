// What the linear attention kernels are told, and how the work is cut.
//
// A head of a sample is cut into chunks of pixels, by the sample's shape alone, so that neither the batch nor the
// number of threads changes a bit. A chunk's keys and values come to a Part; the parts of a head are put together in
// their order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "image.h"

namespace ddpm_fast {

// A matrix, its columns a run of memory.
struct Rows {
  const float* data;
  int64_t stride;
};

inline int64_t whole_vectors(int64_t channels) { return (channels + 15) / 16 * 16; }

struct LinearAttention {
  static constexpr int64_t kChunk = 1024;  // pixels
  static constexpr int64_t kBlock = 64;    // pixels that are worked through together, in the first-level cache

  int64_t heads, dim;  // dim: channels of a head
  Image qkv, out;
  const float* memory;    // null, or keys and then values, each (heads, dim, memories)
  int64_t memories;
  float scale;

  int64_t pixels() const { return qkv.pixels; }
  int64_t units() const { return qkv.samples * heads; }
  int64_t chunks() const { return (pixels() + kChunk - 1) / kChunk; }
  int64_t pixel(int64_t chunk) const { return chunk * kChunk; }
  int64_t pixels_of(int64_t chunk) const { return std::min(kChunk, pixels() - pixel(chunk)); }
  int64_t padded() const { return whole_vectors(dim); }  // a head's channels
  int64_t part_size() const { return (dim + 2) * padded(); }
};

// The projections around the attention, as the kernels read them: weights transposed and filled up with zeros to whole
// vectors, a head's a run of memory.
struct Projections {
  int64_t channels, outputs;
  const float *queries, *keys, *values;  // (heads, channels, dim)
  const float* out;                      // (heads, dim, out_columns)
  const float* bias;                     // null, or (outputs,)

  int64_t columns() const { return whole_vectors(channels); }
  int64_t out_columns() const { return whole_vectors(outputs); }
};

// What a run of pixels comes to: for each key channel its largest value, the sum of exp(k - largest), and that sum
// weighted with each value channel, (dim, whole vectors of these).
struct Part {
  Part(const LinearAttention& op, float* data)
      : largest(data), sum(data + op.padded()), context(data + 2 * op.padded()) {}
  float *largest, *sum, *context;
};

}  // namespace ddpm_fast
