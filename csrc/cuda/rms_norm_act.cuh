// RMSNorm over the channels of each pixel, scale and shift, and SiLU, and their derivative, in either layout.
#pragma once

#include "norm_act_device.cuh"
#include "rms_norm_act_plan.h"

namespace ddpm_fast {
namespace cuda {

// Where element e of a row of values is kept: four neighbours together, and neighbouring vectors side by side, so that
// a warp that reads four at a time meets no bank conflict.
template <class T> __device__ __forceinline__ int spot(int e, int columns) {
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
  int pixel, pixels;            // the first, and how many
  int rows, elements, columns;  // elements of a row, in so many vectors
  int channel_columns, pixel_columns;
  uint4 *kept, *kept_grad;
  float *factor, *shift, *rrms, *along;  // of channels and of pixels, at their spots where they run along a row
  float4* of_threads;
  bool kept_at_all;

  __device__ __forceinline__ RmsTile(const RmsNormActOp& op, uint4* memory, int images) {
    sample = blockIdx.x / op.tiles;
    pixel = static_cast<int>(blockIdx.x - sample * op.tiles) * op.step;
    pixels = min(op.step, op.pixels - pixel);
    rows = kLast ? pixels : op.channels;
    elements = kLast ? op.channels : pixels;
    columns = op.columns;
    channel_columns = (op.channels + V - 1) / V;
    pixel_columns = (op.step + V - 1) / V;
    kept_at_all = op.kept;
    const int size = op.kept ? (kLast ? op.step : op.channels) * columns : 0;
    kept = memory;
    kept_grad = kept + size;
    of_threads = reinterpret_cast<float4*>(kept + images * size);
    factor = reinterpret_cast<float*>(of_threads + blockDim.x * (V / 4));
    shift = factor + channel_columns * V;
    rrms = shift + channel_columns * V;
    along = rrms + pixel_columns * V;
  }
  __device__ __forceinline__ int vectors() const { return rows * columns; }
  __device__ __forceinline__ int channel_spot(int c) const { return kLast ? spot<T>(c, channel_columns) : c; }
  __device__ __forceinline__ int pixel_spot(int p) const { return kLast ? p : spot<T>(p, pixel_columns); }
  __device__ __forceinline__ int valid(int column) const { return min(V, elements - column * V); }

  // The values for the elements of a vector.
  __device__ __forceinline__ void of_channels(const float* value, int row, int column, float (&to)[V]) const {
    if constexpr (kLast) {
      read_spots<T>(value, column, channel_columns, to);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = value[row];
    }
  }
  __device__ __forceinline__ void of_pixels(const float* value, int row, int column, float (&to)[V]) const {
    if constexpr (kLast) {
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = value[row];
    } else {
      read_spots<T>(value, column, pixel_columns, to);
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
  if (tile.kept_at_all) return kept[row * tile.columns + column];
  return load(from + row * tile.row_stride(op) + column * kWidth<T>, tile.valid(column));
}

template <class T, class Tile>
__device__ __forceinline__ void keep_tile(uint4* kept, const T* from, const Tile& tile, const RmsNormActOp& op) {
  if (!tile.kept_at_all) return;
  const int64_t stride = tile.row_stride(op);
  const bool whole = rows_aligned(from, stride) && tile.elements % kWidth<T> == 0;
  // With fewer elements in the last tile of a row some columns stay empty.
  const int columns = (tile.elements + kWidth<T> - 1) / kWidth<T>;
  const auto place = [&](int i, int& row, int& column) {
    row = op.by_columns(i);
    column = i - row * tile.columns;
    return column < columns;
  };
  for_vectors(
      threadIdx.x, whole && columns == tile.columns ? tile.vectors() : 0, tile.vectors(), blockDim.x,
      [&](int i) {
        int row, column;
        place(i, row, column);
        return load(from + row * stride + column * kWidth<T>);
      },
      [&](int i) {
        int row, column;
        return place(i, row, column) ? load(from + row * stride + column * kWidth<T>, tile.valid(column))
                                     : make_uint4(0, 0, 0, 0);
      },
      [&](int i, const uint4& v, bool) { kept[i] = v; });
}

// put(row, sum) for each row: the sum over its elements of what value(row, column, terms) gives. A team of neighbouring
// threads a row.
template <class T, class Tile, class Value, class Put>
__device__ __forceinline__ void sum_over_row(const Tile& tile, const Value& value, const Put& put) {
  const int columns = (tile.elements + kWidth<T> - 1) / kWidth<T>;
  int lanes = 1;
  while (lanes < kWarp && lanes < columns) lanes *= 2;
  const int teams = blockDim.x / lanes;
#pragma unroll 1
  for (int first = warp() * (kWarp / lanes); first < tile.rows; first += teams) {
    const int row = first + lane() / lanes;
    float sum = 0;
    if (row < tile.rows) {
#pragma unroll 1
      for (int column = lane() % lanes; column < columns; column += lanes) {
        float terms[kWidth<T>];
        value(row, column, terms);
#pragma unroll
        for (int j = 0; j < kWidth<T>; ++j)
          if (j >= tile.valid(column)) terms[j] = 0.0f;
        sum += tree_sum(terms);
      }
    }
    sum = team_sum(sum, lanes);
    if (row < tile.rows && lane() % lanes == 0) put(row, sum);
  }
}

// put(element, sum) for each element of a row: the sum over all rows. Ends with a barrier.
template <class T, class Tile, class Value, class Put>
__device__ __forceinline__ void sum_over_rows(const Tile& tile, const Value& value, const Put& put) {
  constexpr int V = kWidth<T>;
  const int all = (tile.elements + V - 1) / V, threads = blockDim.x;
#pragma unroll 1
  for (int begin = 0; begin < all; begin += threads) {
    const int columns = min(all - begin, threads), teams = threads / columns;
    const int team = threadIdx.x / columns, column = threadIdx.x - team * columns;
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
    for (int e = threadIdx.x; e < min(columns * V, tile.elements - begin * V); e += threads) {
      const int k = e % V;
      const float* const from = reinterpret_cast<const float*>(tile.of_threads + k / 4 * threads + e / V) + k % 4;
      float total = from[0];
#pragma unroll 1
      for (int r = 1; r < teams; ++r) total += from[r * columns * 4];
      put(begin * V + e, total);
    }
    __syncthreads();
  }
}

// The channels' coefficients, and zeros for what vectors hold beyond the tile's end.
template <class Tile>
__device__ __forceinline__ void fill_channels(const Tile& tile, const Parameters& given, const RmsNormActOp& op) {
#pragma unroll 1
  for (int c = op.channels + threadIdx.x; c < tile.channel_columns * Tile::V; c += blockDim.x)
    tile.factor[tile.channel_spot(c)] = tile.shift[tile.channel_spot(c)] = 0.0f;
#pragma unroll 1
  for (int p = tile.pixels + threadIdx.x; p < tile.pixel_columns * Tile::V; p += blockDim.x)
    tile.rrms[tile.pixel_spot(p)] = tile.along[tile.pixel_spot(p)] = 0.0f;
#pragma unroll 1
  for (int c = threadIdx.x; c < op.channels; c += blockDim.x) {
    const double weight = given.weight ? static_cast<double>(parameter(given.weight, op.weight, 0, c)) : 1.0;
    const double by_scale =
        given.scale ? 1.0 + static_cast<double>(parameter(given.scale, op.scale, tile.sample, c)) : 1.0;
    tile.factor[tile.channel_spot(c)] = static_cast<float>(weight * by_scale);
    tile.shift[tile.channel_spot(c)] = given.shift ? parameter(given.shift, op.shift, tile.sample, c) : 0.0f;
  }
}

template <class T, bool kLast>
__global__ void __launch_bounds__(kRmsThreads, 3)
    rms_norm_act(const T* x, T* out, const void* weight, const void* scale, const void* shift, float* rrms,
                 const RmsNormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const RmsTile<T, kLast> tile(op, memory, 1);
  fill_channels(tile, {weight, nullptr, scale, shift, nullptr}, op);
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
    tile.rrms[tile.pixel_spot(p)] = r;
    if (rrms) rrms[tile.sample * op.pixels + tile.pixel + p] = r;
  };
  if constexpr (kLast) {
    sum_over_row<T>(tile, squares, put);
    __syncthreads();
  } else {
    sum_over_rows<T>(tile, squares, put);
  }
  T* const to = out + tile.offset(op, op.out_stride);
  const bool aligned = rows_aligned(to, tile.row_stride(op));
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.vectors(); i += blockDim.x) {
    const int row = op.by_columns(i), column = i - row * tile.columns;
    if (column * V >= tile.elements) continue;
    float z[V], r[V], factor[V], offset[V];
    unpack<T>(tile_vector(tile.kept, from, row, column, tile, op), z);
    tile.of_pixels(tile.rrms, row, column, r);
    tile.of_channels(tile.factor, row, column, factor);
    tile.of_channels(tile.shift, row, column, offset);
#pragma unroll
    for (int j = 0; j < V; ++j) z[j] = fmaf(z[j] * r[j], factor[j], offset[j]);
    activate(z, op.activation);
    store(to + row * tile.row_stride(op) + column * V, pack<T>(z), aligned, tile.valid(column));
  }
}

// sums: for each tile the channels' sums of grad_z * xhat, x, and of grad_z, y.
template <class T, bool kLast>
__global__ void __launch_bounds__(kRmsThreads, 2)
    rms_norm_act_backward(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* scale,
                          const void* shift, const float* rrms, float2* sums, const RmsNormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const RmsTile<T, kLast> tile(op, memory, 2);
  fill_channels(tile, {weight, nullptr, scale, shift, nullptr}, op);
#pragma unroll 1
  for (int p = threadIdx.x; p < tile.pixels; p += blockDim.x)
    tile.rrms[tile.pixel_spot(p)] = rrms[tile.sample * op.pixels + tile.pixel + p];
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
    tile.of_pixels(tile.rrms, row, column, r);
    tile.of_channels(tile.factor, row, column, factor);
    tile.of_channels(tile.shift, row, column, offset);
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
    const bool is_constant = tile.rrms[tile.pixel_spot(p)] >= constant;
    tile.along[tile.pixel_spot(p)] = is_constant ? 0.0f : sum / static_cast<float>(op.channels);
  };
  float2* const to_sums = sums + static_cast<int64_t>(blockIdx.x) * op.channels;
  const auto put_product = [&](int c, float sum) { to_sums[c].x = sum; };
  const auto put_gradient = [&](int c, float sum) { to_sums[c].y = sum; };
  if constexpr (kLast) {
    sum_over_row<T>(tile, along_terms, put_along);
    sum_over_rows<T>(tile, products, put_product);
    sum_over_rows<T>(tile, gradients, put_gradient);
  } else {
    sum_over_rows<T>(tile, along_terms, put_along);
    sum_over_row<T>(tile, products, put_product);
    sum_over_row<T>(tile, gradients, put_gradient);
  }
  // Either way a barrier has passed since put_along.
  if (grad_x == nullptr) return;
  T* const to = grad_x + tile.offset(op, op.out_stride);
  const bool aligned = rows_aligned(to, tile.row_stride(op));
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.vectors(); i += blockDim.x) {
    const int row = op.by_columns(i), column = i - row * tile.columns;
    if (column * V >= tile.elements) continue;
    float xhat[V], grad[V], factor[V], r[V], along[V];
    read(row, column, xhat, grad, factor);
    tile.of_pixels(tile.rrms, row, column, r);
    tile.of_pixels(tile.along, row, column, along);
#pragma unroll
    for (int j = 0; j < V; ++j) grad[j] = fmaf(-xhat[j], along[j], grad[j] * factor[j]) * r[j];
    store(to + row * tile.row_stride(op) + column * V, pack<T>(grad), aligned, tile.valid(column));
  }
}

constexpr int kRmsRows = 8;

// The sums of a sample's tiles, and with them the gradients of scale and shift. Threads of a warp take channels side by
// side, its warps tiles; a sample has a block for each warp of channels.
static __global__ void __launch_bounds__(kWarp * kRmsRows)
    rms_norm_act_sums(const float2* of_tiles, float2* of_samples, const void* weight, float* grad_scale,
                      float* grad_shift, const RmsNormActOp op) {
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
  const double w = weight ? static_cast<double>(parameter(weight, op.weight, 0, channel)) : 1.0;
  of_samples[at] = make_float2(static_cast<float>(total.x), static_cast<float>(total.y));
  if (grad_scale) grad_scale[at] = static_cast<float>(w * total.x);
  if (grad_shift) grad_shift[at] = static_cast<float>(total.y);
}

static __global__ void __launch_bounds__(kWarp * kRmsRows)
    rms_norm_act_weight(const float2* of_samples, const void* scale, float* grad_weight, int64_t samples,
                        const RmsNormActOp op) {
  __shared__ double of_rows[kRmsRows][kWarp];
  const int channel = blockIdx.x * kWarp + lane();
  double total = 0;
  if (channel < op.channels) {
#pragma unroll 1
    for (int64_t n = warp(); n < samples; n += kRmsRows) {
      const double by_scale = scale ? 1.0 + static_cast<double>(parameter(scale, op.scale, n, channel)) : 1.0;
      total += by_scale * static_cast<double>(of_samples[n * op.channels + channel].x);
    }
  }
  of_rows[warp()][lane()] = total;
  __syncthreads();
  if (warp() != 0 || channel >= op.channels) return;
  for (int row = 1; row < kRmsRows; ++row) total += of_rows[row][lane()];
  grad_weight[channel] = static_cast<float>(total);
}

}  // namespace cuda
}  // namespace ddpm_fast
