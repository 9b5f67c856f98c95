// GroupNorm, scale and shift, and SiLU with channels last: a pixel is one run of memory, in which the groups lie side
// by side.
#pragma once

#include "norm_act_device.cuh"

namespace ddpm_fast {
namespace cuda {

// A run of pixels of a run of channels. A thread works on one column of kWidth channels, in every `rows`-th pixel.
struct LastTile {
  int sample, slab, part;
  int channel, channels, groups;  // the first channel, their number, and that of the groups that they belong to
  int pixel, pixels;
  int columns, rows;
  int column, row, valid;  // this thread's, and the channels of its column; none where it has no work
};

template <class T> __device__ __forceinline__ LastTile last_tile(const NormActOp& op, int index) {
  constexpr int V = kWidth<T>;
  LastTile tile;
  const int unit = index / op.parts;
  tile.part = index - unit * op.parts;
  tile.sample = unit / op.slabs;
  tile.slab = unit - tile.sample * op.slabs;
  const int chunk = tile.part / op.cuts, cut = tile.part - chunk * op.cuts;
  tile.groups = min(op.slab, op.groups - tile.slab * op.slab);
  tile.channel = tile.slab * op.slab * op.width + cut * op.piece;
  tile.channels = min(op.piece, tile.groups * op.width - cut * op.piece);
  tile.pixel = chunk * op.step;
  tile.pixels = min(op.step, op.pixels - tile.pixel);
  tile.columns = vectors_of<T>(tile.channels);
  tile.rows = blockDim.x / tile.columns;
  tile.row = threadIdx.x / tile.columns;
  tile.column = threadIdx.x - tile.row * tile.columns;
  tile.valid = tile.row < tile.rows ? min(V, tile.channels - tile.column * V) : 0;
  return tile;
}

// The k-th channel of this thread's column, in the tile; the last one for what lies beyond, which is never used.
template <class T> __device__ __forceinline__ int own_channel(const LastTile& tile, int k) {
  return min(tile.column * kWidth<T> + k, tile.channels - 1);
}

// Whether this thread's vectors of all pixels are aligned, its first being at p.
template <class T> __device__ __forceinline__ bool all_aligned(const T* p, const NormActOp& op) {
  return is_aligned(p) && op.channels % kWidth<T> == 0;
}

// The pixels that one load reads this thread's column of.
template <class T>
__device__ __forceinline__ int whole_pixels(const T* p, const LastTile& tile, const NormActOp& op) {
  return tile.valid == kWidth<T> && all_aligned(p, op) ? tile.pixels : 0;
}

// Shared memory of a block; `step`, `piece` and the threads decide on its parts.
template <class T> struct LastShared {
  uint4* kept;          // step pixels of columns, for each image that is kept
  float4* of_threads;   // kWidth / 4 planes, a value of each thread's channels
  float4* coefficient;  // of a channel
  double2* of_group;    // of a group: what this tile knows of it
  double2* statistics;  // of a group: mean and rstd
  float2* lines;        // of a group, in the backward pass
  float* of_channel;
  __device__ __forceinline__ LastShared(uint4* memory, const NormActOp& op, int images) {
    const int columns = vectors_of<T>(op.piece);
    kept = memory;
    coefficient = reinterpret_cast<float4*>(kept + images * op.step * columns);
    of_threads = coefficient + columns * kWidth<T>;
    of_group = reinterpret_cast<double2*>(of_threads + blockDim.x * (kWidth<T> / 4));
    statistics = of_group + op.slab;
    lines = reinterpret_cast<float2*>(statistics + op.slab);
    of_channel = reinterpret_cast<float*>(lines + op.slab);
  }
};

// Sums the threads' values over the rows and calls put(c, sum) for each of the tile's channels; ends with a barrier.
template <class T, class Put>
__device__ __forceinline__ void sum_rows(const float (&value)[kWidth<T>], const LastTile& tile, float4* of_threads,
                                         const Put& put) {
  constexpr int V = kWidth<T>;
#pragma unroll
  for (int j = 0; j < V / 4; ++j)
    of_threads[j * blockDim.x + threadIdx.x] =
        make_float4(value[4 * j], value[4 * j + 1], value[4 * j + 2], value[4 * j + 3]);
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < tile.channels; c += blockDim.x) {
    const unsigned k = static_cast<unsigned>(c) % V;
    const float* const from = reinterpret_cast<const float*>(of_threads + k / 4 * blockDim.x + full_vectors_of<T>(c)) + k % 4;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    int r = 0;
#pragma unroll 1
    for (; r + 4 <= tile.rows; r += 4)
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += from[(r + i) * tile.columns * 4];
#pragma unroll 1
    for (; r < tile.rows; ++r) sum[0] += from[r * tile.columns * 4];
    put(c, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  __syncthreads();
}

// The sum of a group's channels, for a whole warp.
__device__ __forceinline__ double sum_channels(const float* of_channel, int group, const LastTile& tile,
                                               const NormActOp& op) {
  const int first = group * op.width, end = min(first + op.width, tile.channels);
  double sum = 0;
#pragma unroll 1
  for (int c = first + lane(); c < end; c += kWarp) sum += static_cast<double>(of_channel[c]);
  return warp_sum(sum);
}

// Calls put(g, moments) for each of a tile's groups, in the first thread of warp g, g + warps() and so on.
template <class T, class Put>
__device__ __forceinline__ void tile_moments(const T* x, const LastTile& tile, const NormActOp& op, bool embedded,
                                             const LastShared<T>& shared, const Put& put) {
  constexpr int V = kWidth<T>;
  const int first = tile.valid > 0 ? tile.row : tile.pixels;
  float embedding[V], sum[V], about[V], square[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    embedding[k] = embedded ? shared.coefficient[own_channel<T>(tile, k)].x : 0.0f;
    sum[k] = square[k] = 0.0f;
  }
  for_vectors(
      first, whole_pixels(x, tile, op), tile.pixels, tile.rows,
      [&](int p) { return load(x + static_cast<int64_t>(p) * op.channels); },
      [&](int p) { return load(x + static_cast<int64_t>(p) * op.channels, tile.valid); },
      [&](int p, const uint4& v, bool) { shared.kept[p * tile.columns + tile.column] = v; });
#pragma unroll 2
  for (int p = first; p < tile.pixels; p += tile.rows) {
    float value[V];
    unpack<T>(shared.kept[p * tile.columns + tile.column], value);
#pragma unroll
    for (int k = 0; k < V; ++k) sum[k] += value[k] + embedding[k];
  }
  const auto keep_sum = [&](int channel, float of_rows) { shared.of_channel[channel] = of_rows; };
  sum_rows<T>(sum, tile, shared.of_threads, keep_sum);
  const int width = min(op.width, tile.channels);
  const double size = static_cast<double>(width) * tile.pixels;
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    const double total = sum_channels(shared.of_channel, g, tile, op);
    if (lane() == 0) shared.of_group[g].x = static_cast<double>(static_cast<float>(total / size));
  }
  __syncthreads();

  // The sums of the differences to the group's value of before, and of their squares.
#pragma unroll
  for (int k = 0; k < V; ++k) {
    about[k] = static_cast<float>(shared.of_group[op.by_width(own_channel<T>(tile, k))].x);
    sum[k] = 0.0f;
  }
#pragma unroll 2
  for (int p = first; p < tile.pixels; p += tile.rows) {
    float value[V];
    unpack<T>(shared.kept[p * tile.columns + tile.column], value);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float difference = (value[k] + embedding[k]) - about[k];
      sum[k] += difference;
      square[k] = fmaf(difference, difference, square[k]);
    }
  }
  sum_rows<T>(sum, tile, shared.of_threads, keep_sum);
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    const double total = sum_channels(shared.of_channel, g, tile, op);
    if (lane() == 0) shared.of_group[g].y = total;
  }
  sum_rows<T>(square, tile, shared.of_threads, keep_sum);
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    const double squares = sum_channels(shared.of_channel, g, tile, op);
    if (lane() == 0) {
      const double2 known = shared.of_group[g];
      const Moments m = moments_about(known.x, known.y, squares, size);
      put(g, make_double2(m.mean, m.deviation));
    }
  }
}

template <class T>
__device__ __forceinline__ void fill_coefficients(const Parameters& given, const NormActOp& op, const LastTile& tile,
                                                  const LastShared<T>& shared) {
#pragma unroll 1
  for (int c = threadIdx.x; c < tile.channels; c += blockDim.x) {
    const double2 statistics = shared.statistics[op.by_width(c)];
    shared.coefficient[c] =
        coefficients<T>(given, op, tile.sample, tile.channel + c, statistics.x, statistics.y);
  }
}

template <class T>
__device__ __forceinline__ uint4 normalised(const uint4& v, const float4 (&k)[kWidth<T>], const NormActOp& op) {
  float z[kWidth<T>];
  unpack<T>(v, z);
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) z[j] = normalised(z[j], k[j]);
  activate(z, op.activation);
  return pack<T>(z);
}

// This thread's coefficients.
template <class T>
__device__ __forceinline__ void own_coefficients(const LastTile& tile, const float4* coefficient,
                                                 float4 (&own)[kWidth<T>]) {
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k)
    own[k] = coefficient[own_channel<T>(tile, k)];
}

// As norm_act_first; the moments of group g and part i of a sample are at (g * parts + i).
template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    norm_act_last(const T* x, T* out, const void* weight, const void* bias, const void* scale, const void* shift,
                  const void* embedding, double* mean, double* rstd, double2* moments, const NormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const LastTile tile = last_tile<T>(op, blockIdx.x);
  const LastShared<T> shared(memory, op, 1);
  const int64_t at = static_cast<int64_t>(tile.pixel) * op.channels + tile.channel + tile.column * V;
  if (embedding) {
#pragma unroll 1
    for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
      shared.coefficient[c].x = embedding_of<T>(given, op, tile.sample, tile.channel + c);
    __syncthreads();
  }
  const int64_t first_group = static_cast<int64_t>(tile.sample) * op.groups + tile.slab * op.slab;
  tile_moments(x + tile.sample * op.x_stride + at, tile, op, embedding != nullptr, shared,
               [&](int g, const double2& of_tile) {
                 if (op.statistics == kGiven) moments[(first_group + g) * op.parts + tile.part] = of_tile;
                 else shared.of_group[g] = of_tile;
               });
  if (op.statistics == kGiven) return;
  const bool cluster = op.statistics == kCluster;
  if (cluster) {
    cluster_arrive();
    cluster_wait();
  }
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    const double2 all = combine<true>(
        op.parts, static_cast<double>(op.group_size), op.eps,
        [&](int i) { return cluster ? *in_block(&shared.of_group[g], i) : shared.of_group[g]; },
        [&](int i) { return static_cast<double>(op.width) * min(op.step, op.pixels - i * op.step); });
    if (lane() == 0) {
      shared.statistics[g] = all;
      if (mean && tile.part == 0) mean[first_group + g] = all.x;
      if (rstd && tile.part == 0) rstd[first_group + g] = all.y;
    }
  }
  if (cluster) cluster_arrive();
  __syncthreads();
  fill_coefficients(given, op, tile, shared);
  __syncthreads();
  float4 own[V];
  own_coefficients<T>(tile, shared.coefficient, own);
  T* const to = out + tile.sample * op.out_stride + at;
  const bool aligned = all_aligned(to, op);
  if (tile.valid > 0)
#pragma unroll 1
    for (int p = tile.row; p < tile.pixels; p += tile.rows)
      store(to + static_cast<int64_t>(p) * op.channels,
            normalised<T>(shared.kept[p * tile.columns + tile.column], own, op), aligned, tile.valid);
  if (cluster) cluster_wait();
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    norm_act_apply_last(const T* x, T* out, const void* weight, const void* bias, const void* scale,
                        const void* shift, const void* embedding, const double* mean, const double* rstd,
                        const NormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const LastTile tile = last_tile<T>(op, blockIdx.x);
  const LastShared<T> shared(memory, op, 0);
  const int64_t first_group = static_cast<int64_t>(tile.sample) * op.groups + tile.slab * op.slab;
#pragma unroll 1
  for (int g = threadIdx.x; g < tile.groups; g += blockDim.x)
    shared.statistics[g] = make_double2(mean[first_group + g], rstd[first_group + g]);
  __syncthreads();
  fill_coefficients(given, op, tile, shared);
  __syncthreads();
  if (tile.valid == 0) return;
  float4 own[V];
  own_coefficients<T>(tile, shared.coefficient, own);
  const int64_t at = static_cast<int64_t>(tile.pixel) * op.channels + tile.channel + tile.column * V;
  const T* const from = x + tile.sample * op.x_stride + at;
  T* const to = out + tile.sample * op.out_stride + at;
  for_vectors(
      tile.row, min(whole_pixels(from, tile, op), whole_pixels(to, tile, op)), tile.pixels, tile.rows,
      [&](int p) { return load(from + static_cast<int64_t>(p) * op.channels); },
      [&](int p) { return load(from + static_cast<int64_t>(p) * op.channels, tile.valid); },
      [&](int p, const uint4& v, bool whole) {
        store(to + static_cast<int64_t>(p) * op.channels, normalised<T>(v, own, op), whole, whole ? V : tile.valid);
      });
}

}  // namespace cuda
}  // namespace ddpm_fast
