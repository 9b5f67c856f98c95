// RMSNorm over the channels of each pixel, scale and shift, and SiLU, and their derivative, in either layout.
#pragma once

#include "norm_act_device.cuh"
#include "rms_norm_act_plan.h"

namespace ddpm_fast {
namespace cuda {

// Where element e of a row of values is kept: four neighbours together, and neighbouring vectors side by side, so that
// a warp that reads four at a time meets no bank conflict.
template <class T> __device__ __forceinline__ unsigned spot(unsigned e, unsigned columns) {
  if constexpr (kWidth<T> == 4) return e;
  return (e / 4 % 2 * columns + e / 8) * 4 + e % 4;
}
template <class T> __device__ __forceinline__ void read_spots(const float* row, int column, int columns,
                                                              float (&value)[kWidth<T>]) {
#pragma unroll
  for (int j = 0; j < kWidth<T> / 4; ++j) {
    const float4 four = reinterpret_cast<const float4*>(row)[j * columns + column];
    value[4 * j] = four.x;
    value[4 * j + 1] = four.y;
    value[4 * j + 2] = four.z;
    value[4 * j + 3] = four.w;
  }
}

// A tile: op.step pixels of a sample at most, with all channels.
template <class T, bool kLast> struct RmsTile {
  static constexpr int V = kWidth<T>;
  int64_t sample;
  int pixel, pixels;   // the first, and how many
  int rows, elements;  // elements of a row
  // Of channels and of pixels, at their spots where they run along a row, which then has whole vectors of them.
  float *factor, *shift, *rrms, *along;
  float4* of_threads;
  uint4 *kept, *kept_grad;

  __device__ __forceinline__ RmsTile(const RmsNormActOp& op, uint4* memory) {
    const unsigned n = blockIdx.x / op.tiles;
    sample = n;
    pixel = static_cast<int>(blockIdx.x - n * op.tiles) * op.step;
    pixels = min(op.step, op.pixels - pixel);
    rows = kLast ? pixels : op.channels;
    elements = kLast ? op.channels : pixels;
    of_threads = reinterpret_cast<float4*>(memory);
    factor = reinterpret_cast<float*>(of_threads + kRmsThreads * (V / 4));
    shift = factor + op.channel_columns * V;
    rrms = shift + op.channel_columns * V;
    along = rrms + op.pixel_columns * V;
    kept = reinterpret_cast<uint4*>(along + op.pixel_columns * V);
    kept_grad = kept + vectors(op);
  }
  __device__ __forceinline__ int vectors(const RmsNormActOp& op) const { return rows * op.columns; }
  // Places for values of channels and pixels, and which of these have theirs there: what fills a row's vectors has those
  // of the last one.
  __device__ __forceinline__ int channel_slots(const RmsNormActOp& op) const {
    return kLast ? op.channel_columns * V : op.channels;
  }
  __device__ __forceinline__ int pixel_slots(const RmsNormActOp& op) const {
    return kLast ? pixels : op.pixel_columns * V;
  }
  __device__ __forceinline__ int channel_of(int slot, const RmsNormActOp& op) const {
    return kLast ? min(slot, op.channels - 1) : slot;
  }
  __device__ __forceinline__ int pixel_of(int slot) const { return kLast ? slot : min(slot, pixels - 1); }
  __device__ __forceinline__ int channel_spot(int c, const RmsNormActOp& op) const {
    return kLast ? spot<T>(c, op.channel_columns) : c;
  }
  __device__ __forceinline__ int pixel_spot(int p, const RmsNormActOp& op) const {
    return kLast ? p : spot<T>(p, op.pixel_columns);
  }
  // Elements from a column on: a vector's or more where it is full, none or fewer where it is empty.
  __device__ __forceinline__ int left(int column) const { return elements - column * V; }

  // The values for the elements of a vector.
  __device__ __forceinline__ void of_channels(const float* value, int row, int column, const RmsNormActOp& op,
                                              float (&to)[V]) const {
    if constexpr (kLast) {
      read_spots<T>(value, column, op.channel_columns, to);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = value[row];
    }
  }
  __device__ __forceinline__ void of_pixels(const float* value, int row, int column, const RmsNormActOp& op,
                                            float (&to)[V]) const {
    if constexpr (kLast) {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = value[row];
    } else {
      read_spots<T>(value, column, op.pixel_columns, to);
    }
  }
  __device__ __forceinline__ int64_t offset(const RmsNormActOp& op, int64_t stride) const {
    return sample * stride + static_cast<int64_t>(pixel) * (kLast ? op.channels : 1);
  }
  __device__ __forceinline__ int64_t row_stride(const RmsNormActOp& op) const { return kLast ? op.channels : op.pixels; }
};

// Whether vectors at the same columns of all rows are aligned.
template <class T> __device__ __forceinline__ bool rows_aligned(const T* p, int64_t row_stride) {
  return is_aligned(p) && row_stride % kWidth<T> == 0;
}

// A vector of a tile, from shared memory or again from where it came.
template <class T, class Tile>
__device__ __forceinline__ uint4 tile_vector(const uint4* kept, const T* from, int row, int column, const Tile& tile,
                                             const RmsNormActOp& op) {
  if (op.kept) return kept[row * op.columns + column];
  return load(from + row * tile.row_stride(op) + column * kWidth<T>, tile.left(column));
}

template <class T, class Tile>
__device__ __forceinline__ void keep_tile(uint4* kept, const T* from, const Tile& tile, const RmsNormActOp& op) {
  if (!op.kept) return;
  const int64_t stride = tile.row_stride(op);
  const bool whole = rows_aligned(from, stride) && tile.elements == op.columns * kWidth<T>;
  const auto place = [&](int i, int& row, int& column) {
    row = op.by_columns(i);
    column = i - row * op.columns;
    return from + row * stride + column * kWidth<T>;
  };
  for_vectors(
      threadIdx.x, whole ? tile.vectors(op) : 0, tile.vectors(op), kRmsThreads,
      [&](int i) {
        int row, column;
        return load(place(i, row, column));
      },
      [&](int i) {
        int row, column;
        const T* const at = place(i, row, column);
        return load(at, tile.left(column));
      },
      [&](int i, const uint4& v, bool) { kept[i] = v; });
}

// put(row, sum) for each row: the sum over its elements of what value(row, column, terms) gives, zeros for those that only
// fill a vector. A team of neighbouring threads a row.
template <class T, class Tile, class Value, class Put>
__device__ __forceinline__ void sum_over_row(const Tile& tile, const RmsNormActOp& op, const Value& value,
                                             const Put& put) {
  const int lanes = 1 << op.team, rows_of_warp = kWarp >> op.team;
#pragma unroll 1
  for (int first = warp() * rows_of_warp; first < tile.rows; first += kRmsThreads >> op.team) {
    const int row = first + (lane() >> op.team);
    float sum = 0;
    if (row < tile.rows) {
#pragma unroll 1
      for (int column = lane() & (lanes - 1); tile.left(column) > 0; column += lanes) {
        float terms[kWidth<T>];
        value(row, column, terms);
        sum += tree_sum(terms);
      }
    }
    sum = team_sum(sum, lanes);
    if (row < tile.rows && (lane() & (lanes - 1)) == 0) put(row, sum);
  }
}

// put(element, sum) for each of a row's first elements: the sum over all rows. Ends with a barrier.
template <class T, class Tile, class Value, class Put>
__device__ __forceinline__ void sum_over_rows(const Tile& tile, const RmsNormActOp& op, unsigned elements,
                                              const Value& value, const Put& put) {
  constexpr unsigned V = kWidth<T>, threads = kRmsThreads;
#pragma unroll 1
  for (unsigned begin = 0; begin < op.columns; begin += threads) {
    const unsigned columns = min(op.columns - begin, threads), teams = threads / columns;
    const unsigned team = threadIdx.x / columns, column = threadIdx.x - team * columns;
    float sum[V];
#pragma unroll
    for (int j = 0; j < V; ++j) sum[j] = 0.0f;
    if (team < teams) {
#pragma unroll 1
      for (int row = team; row < tile.rows; row += teams) {
        float terms[V];
        value(row, begin + column, terms);
#pragma unroll
        for (int j = 0; j < V; ++j) sum[j] += terms[j];
      }
    }
#pragma unroll
    for (int j = 0; j < V / 4; ++j)
      tile.of_threads[j * threads + threadIdx.x] =
          make_float4(sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]);
    __syncthreads();
#pragma unroll 1
    for (unsigned e = threadIdx.x; e < min(columns * V, elements - begin * V); e += threads) {
      const unsigned k = e % V;
      const float* const from = reinterpret_cast<const float*>(tile.of_threads + k / 4 * threads + e / V) + k % 4;
      float total = from[0];
#pragma unroll 1
      for (unsigned r = 1; r < teams; ++r) total += from[r * columns * 4];
      put(begin * V + e, total);
    }
    __syncthreads();
  }
}

template <class T, class Tile>
__device__ __forceinline__ void fill_channels(const Tile& tile, const Parameters& given, const RmsNormActOp& op) {
#pragma unroll 1
  for (int slot = threadIdx.x; slot < tile.channel_slots(op); slot += kRmsThreads) {
    const int c = tile.channel_of(slot, op);
    const double weight = given.weight ? static_cast<double>(parameter<T>(given.weight, op.weight, 0, c)) : 1.0;
    const double by_scale =
        given.scale ? 1.0 + static_cast<double>(parameter<T>(given.scale, op.scale, tile.sample, c)) : 1.0;
    tile.factor[tile.channel_spot(slot, op)] = static_cast<float>(weight * by_scale);
    tile.shift[tile.channel_spot(slot, op)] = given.shift ? parameter<T>(given.shift, op.shift, tile.sample, c) : 0.0f;
  }
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kRmsThreads, 3)
    rms_norm_act(const T* x, T* out, const void* weight, const void* scale, const void* shift, float* rrms,
                 const RmsNormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const RmsTile<T, kLast> tile(op, memory);
  fill_channels<T>(tile, {weight, nullptr, scale, shift, nullptr}, op);
  const T* const from = x + tile.offset(op, op.x_stride);
  keep_tile(tile.kept, from, tile, op);
  __syncthreads();
  const auto squares = [&](int row, int column, float (&terms)[V]) {
    unpack<T>(tile_vector(tile.kept, from, row, column, tile, op), terms);
#pragma unroll
    for (int j = 0; j < V; ++j) terms[j] *= terms[j];
  };
  const auto put = [&](int p, float sum) {
    // fmaxf would drop a NaN.
    const float r = sum == sum ? op.root / fmaxf(sqrtf(sum), op.eps) : sum;
    tile.rrms[tile.pixel_spot(p, op)] = r;
    if (rrms && (kLast || p < tile.pixels)) rrms[tile.sample * op.pixels + tile.pixel + p] = r;
  };
  if constexpr (kLast) {
    sum_over_row<T>(tile, op, squares, put);
    __syncthreads();
  } else {
    sum_over_rows<T>(tile, op, tile.pixel_slots(op), squares, put);
  }
  T* const to = out + tile.offset(op, op.out_stride);
  const bool aligned = rows_aligned(to, tile.row_stride(op));
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.vectors(op); i += kRmsThreads) {
    const int row = op.by_columns(i), column = i - row * op.columns;
    float z[V], r[V], factor[V], offset[V];
    unpack<T>(tile_vector(tile.kept, from, row, column, tile, op), z);
    tile.of_pixels(tile.rrms, row, column, op, r);
    tile.of_channels(tile.factor, row, column, op, factor);
    tile.of_channels(tile.shift, row, column, op, offset);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = fmaf(z[j] * r[j], factor[j], offset[j]);
    activate(z, op.activation);
    store(to + row * tile.row_stride(op) + column * V, pack<T>(z), aligned, tile.left(column));
  }
}

// sums: for each tile the channels' sums of grad_z * xhat, x, and of grad_z, y.
template <class T, bool kLast>
__global__ void __launch_bounds__(kRmsThreads, 2)
    rms_norm_act_backward(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* scale,
                          const void* shift, const float* rrms, float2* sums, const RmsNormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const RmsTile<T, kLast> tile(op, memory);
  fill_channels<T>(tile, {weight, nullptr, scale, shift, nullptr}, op);
#pragma unroll 1
  for (int slot = threadIdx.x; slot < tile.pixel_slots(op); slot += kRmsThreads)
    tile.rrms[tile.pixel_spot(slot, op)] = rrms[tile.sample * op.pixels + tile.pixel + tile.pixel_of(slot)];
  const T* const from = x + tile.offset(op, op.x_stride);
  const T* const from_grad = grad_out + tile.offset(op, op.grad_stride);
  keep_tile(tile.kept, from, tile, op);
  keep_tile(tile.kept_grad, from_grad, tile, op);
  __syncthreads();
  // xhat and the gradient of z, and the channels' factors.
  const auto read = [&](int row, int column, float (&xhat)[V], float (&grad)[V], float (&factor)[V]) {
    float r[V], offset[V];
    unpack<T>(tile_vector(tile.kept, from, row, column, tile, op), xhat);
    unpack<T>(tile_vector(tile.kept_grad, from_grad, row, column, tile, op), grad);
    tile.of_pixels(tile.rrms, row, column, op, r);
    tile.of_channels(tile.factor, row, column, op, factor);
    tile.of_channels(tile.shift, row, column, op, offset);
#pragma unroll
    for (int j = 0; j < V; ++j) xhat[j] *= r[j];
    if (!op.activation) return;
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] *= silu_derivative(fmaf(xhat[j], factor[j], offset[j]));
  };
  const auto along_terms = [&](int row, int column, float (&terms)[V]) {
    float xhat[V], factor[V];
    read(row, column, xhat, terms, factor);
#pragma unroll
    for (int j = 0; j < V; ++j) terms[j] *= factor[j] * xhat[j];
  };
  const auto products = [&](int row, int column, float (&terms)[V]) {
    float xhat[V], factor[V];
    read(row, column, xhat, terms, factor);
#pragma unroll
    for (int j = 0; j < V; ++j) terms[j] *= xhat[j];
  };
  const auto gradients = [&](int row, int column, float (&terms)[V]) {
    float xhat[V], factor[V];
    read(row, column, xhat, terms, factor);
  };
  // Where the norm is below eps, the reciprocal is a constant.
  const float constant = op.root / op.eps;
  const auto put_along = [&](int p, float sum) {
    const bool is_constant = tile.rrms[tile.pixel_spot(p, op)] >= constant;
    tile.along[tile.pixel_spot(p, op)] = is_constant ? 0.0f : sum / static_cast<float>(op.channels);
  };
  float2* const to_sums = sums + static_cast<int64_t>(blockIdx.x) * op.channels;
  const auto put_product = [&](int c, float sum) { to_sums[c].x = sum; };
  const auto put_gradient = [&](int c, float sum) { to_sums[c].y = sum; };
  if constexpr (kLast) {
    sum_over_row<T>(tile, op, along_terms, put_along);
    sum_over_rows<T>(tile, op, op.channels, products, put_product);
    sum_over_rows<T>(tile, op, op.channels, gradients, put_gradient);
  } else {
    sum_over_rows<T>(tile, op, tile.pixel_slots(op), along_terms, put_along);
    sum_over_row<T>(tile, op, products, put_product);
    sum_over_row<T>(tile, op, gradients, put_gradient);
  }
  // Either way a barrier has passed since put_along.
  if (grad_x == nullptr) return;
  T* const to = grad_x + tile.offset(op, op.out_stride);
  const bool aligned = rows_aligned(to, tile.row_stride(op));
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.vectors(op); i += kRmsThreads) {
    const int row = op.by_columns(i), column = i - row * op.columns;
    float xhat[V], grad[V], factor[V], r[V], along[V];
    read(row, column, xhat, grad, factor);
    tile.of_pixels(tile.rrms, row, column, op, r);
    tile.of_pixels(tile.along, row, column, op, along);
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] = fmaf(-xhat[j], along[j], grad[j] * factor[j]) * r[j];
    store(to + row * tile.row_stride(op) + column * V, pack<T>(grad), aligned, tile.left(column));
  }
}

constexpr int kRmsRows = 8;

// The sums of a sample's tiles, and with them the gradients of scale and shift, and a sample's part of that of weight.
// Threads of a warp take channels side by side, its warps tiles; a sample has a block for each warp of channels.
static __global__ void __launch_bounds__(kWarp * kRmsRows)
    rms_norm_act_sums(const float2* of_tiles, float* of_samples, const void* weight, const void* scale,
                      float* grad_scale, float* grad_shift, const RmsNormActOp op) {
  __shared__ double2 of_rows[kRmsRows][kWarp];
  const unsigned across = static_cast<unsigned>(op.channels + kWarp - 1) / kWarp;
  const int64_t n = blockIdx.x / across;
  const int channel = static_cast<int>(blockIdx.x % across) * kWarp + lane();
  double2 total = make_double2(0, 0);
  if (channel < op.channels) {
#pragma unroll 4
    for (int i = warp(); i < op.tiles; i += kRmsRows) {
      const float2 part = of_tiles[(n * op.tiles + i) * op.channels + channel];
      total.x += static_cast<double>(part.x);
      total.y += static_cast<double>(part.y);
    }
  }
  of_rows[warp()][lane()] = total;
  __syncthreads();
  if (warp() != 0 || channel >= op.channels) return;
  for (int row = 1; row < kRmsRows; ++row) {
    total.x += of_rows[row][lane()].x;
    total.y += of_rows[row][lane()].y;
  }
  const int64_t at = n * op.channels + channel;
  const double by_scale = scale ? 1.0 + static_cast<double>(parameter(scale, op.scale, n, channel)) : 1.0;
  of_samples[at] = static_cast<float>(by_scale * total.x);
  const double by_weight = weight ? static_cast<double>(parameter(weight, op.weight, 0, channel)) : 1.0;
  if (grad_scale) grad_scale[at] = static_cast<float>(by_weight * total.x);
  if (grad_shift) grad_shift[at] = static_cast<float>(total.y);
}

static __global__ void __launch_bounds__(kWarp * kRmsRows)
    rms_norm_act_weight(const float* of_samples, float* grad_weight, int64_t samples, int channels) {
  __shared__ double of_rows[kRmsRows][kWarp];
  const int channel = blockIdx.x * kWarp + lane();
  double total = 0;
  if (channel < channels) {
#pragma unroll 1
    for (int64_t n = warp(); n < samples; n += kRmsRows) total += static_cast<double>(of_samples[n * channels + channel]);
  }
  of_rows[warp()][lane()] = total;
  __syncthreads();
  if (warp() != 0 || channel >= channels) return;
  for (int row = 1; row < kRmsRows; ++row) total += of_rows[row][lane()];
  grad_weight[channel] = static_cast<float>(total);
}

}  // namespace cuda
}  // namespace ddpm_fast
