// GroupNorm, scale and shift, and SiLU with channels first: a group is one run of memory.
#pragma once

#include "norm_act_device.cuh"

namespace ddpm_fast {
namespace cuda {

// Elements start .. start + count - 1 of a group: vectors from there on, and fewer than kWidth elements that fill none,
// one for each of the first threads.
struct FirstTile {
  int64_t start;
  int sample, group, unit, part, count, vectors;
  int single;                    // this thread's element behind the vectors, if that is below count
  int channel, channels, pixel;  // the channels of the group that it touches, and the first of its pixels in the first
};

template <class T> __device__ __forceinline__ FirstTile first_tile(const NormActOp& op, int index) {
  FirstTile tile;
  tile.unit = index / op.parts;
  tile.part = index - tile.unit * op.parts;
  tile.sample = tile.unit / op.groups;
  tile.group = tile.unit - tile.sample * op.groups;
  tile.start = static_cast<int64_t>(tile.part) * op.step;
  tile.count = static_cast<int>(min(static_cast<int64_t>(op.step), op.group_size - tile.start));
  tile.vectors = full_vectors_of<T>(tile.count);
  tile.single = tile.vectors * kWidth<T> + static_cast<int>(threadIdx.x);
  tile.channel = static_cast<int>(op.long_by_pixels(tile.start));
  tile.pixel = static_cast<int>(tile.start - static_cast<int64_t>(tile.channel) * op.pixels);
  tile.channels = op.by_pixels(tile.pixel + tile.count - 1) + 1;
  return tile;
}

// Calls f(j, k) for each element j of vector i, k the tile's coefficients of its channel.
template <class T, class F>
__device__ __forceinline__ void for_channels(int i, const FirstTile& tile, const NormActOp& op,
                                             const float4* of_channel, const F& f) {
  int pixel = tile.pixel + i * kWidth<T>, channel = op.by_pixels(pixel);
  pixel -= channel * op.pixels;
  if (pixel + kWidth<T> <= op.pixels) {
    const float4 k = of_channel[channel];
#pragma unroll
    for (int j = 0; j < kWidth<T>; ++j) f(j, k);
    return;
  }
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) {
    f(j, of_channel[channel]);
    if (++pixel == op.pixels) {
      pixel = 0;
      ++channel;
    }
  }
}

// The tile's coefficients of the channel of this thread's single element.
__device__ __forceinline__ const float4& of_single(const FirstTile& tile, const NormActOp& op,
                                                   const float4* of_channel) {
  return of_channel[op.by_pixels(tile.pixel + tile.single)];
}

template <class T>
__device__ __forceinline__ uint4 normalised(const uint4& v, int i, const FirstTile& tile, const NormActOp& op,
                                            const float4* coefficient) {
  float z[kWidth<T>];
  unpack<T>(v, z);
  for_channels<T>(i, tile, op, coefficient, [&](int j, const float4& k) { z[j] = normalised(z[j], k); });
  activate(z, op.activation);
  return pack<T>(z);
}

template <class T>
__device__ __forceinline__ T normalised_single(T x, const FirstTile& tile, const NormActOp& op,
                                               const float4* coefficient) {
  float z[1] = {normalised(to_float(x), of_single(tile, op, coefficient))};
  activate(z, op.activation);
  return narrow<T>(z[0]);
}

// Reads a tile into `kept` and `single`, and takes its moments in two passes; every thread of the first warp gets them.
template <class T>
__device__ __forceinline__ double2 tile_moments(const T* x, const FirstTile& tile, const NormActOp& op, bool embedded,
                                                const float4* coefficient, uint4* kept, T& single) {
  constexpr int V = kWidth<T>;
  __shared__ float of_warps[kWarp];
  __shared__ float2 two_of_warps[kWarp];
  const int tid = threadIdx.x, threads = blockDim.x;
  const bool has_single = tile.single < tile.count;
  if (has_single) single = x[tile.single];
  for_vectors(
      tid, is_aligned(x) ? tile.vectors : 0, tile.vectors, threads, [&](int i) { return load(x + i * V); },
      [&](int i) { return load(x + i * V, V); }, [&](int i, const uint4& v, bool) { kept[i] = v; });
  // Calls use(value) for each of this thread's vectors, their embedding added.
  const auto for_values = [&](const auto& use) {
#pragma unroll 2
    for (int i = tid; i < tile.vectors; i += threads) {
      float value[V];
      unpack<T>(kept[i], value);
      if (embedded)
        for_channels<T>(i, tile, op, coefficient, [&](int j, const float4& k) { value[j] += k.x; });
      use(value);
    }
  };

  float value_of_single = 0.0f;
  if (has_single) value_of_single = to_float(single) + (embedded ? of_single(tile, op, coefficient).x : 0.0f);
  float sum = value_of_single;
  for_values([&](const float (&value)[V]) { sum += tree_sum(value); });
  const float about = block_sum(sum, of_warps) / static_cast<float>(tile.count);

  const float difference = has_single ? value_of_single - about : 0.0f;
  float2 sums = make_float2(difference, difference * difference);  // of the differences to `about`, and their squares
  for_values([&](float (&value)[V]) {
    float square[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      value[j] -= about;
      square[j] = value[j] * value[j];
    }
    sums.x += tree_sum(value);
    sums.y += tree_sum(square);
  });
  sums.x = warp_sum(sums.x);
  sums.y = warp_sum(sums.y);
  if (lane() == 0) two_of_warps[warp()] = sums;
  __syncthreads();
  if (warp() != 0) return make_double2(0, 0);
  sums = lane() < warps() ? two_of_warps[lane()] : make_float2(0.0f, 0.0f);
  const Moments m = moments_about(about, warp_sum(static_cast<double>(sums.x)),
                                  warp_sum(static_cast<double>(sums.y)), tile.count);
  return make_double2(m.mean, m.deviation);
}

// One block a tile: keeps it in shared memory between its statistics and its result, or, where op.statistics is
// kGiven, writes its moments for norm_act_combine and leaves the rest to norm_act_apply_first.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 3)
    norm_act_first(const T* x, T* out, const void* weight, const void* bias, const void* scale, const void* shift,
                   const void* embedding, double* mean, double* rstd, double2* moments, const NormActOp op) {
  extern __shared__ uint4 shared[];
  __shared__ double2 statistics, own;
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const FirstTile tile = first_tile<T>(op, blockIdx.x);
  uint4* const kept = shared;
  float4* const coefficient = reinterpret_cast<float4*>(shared + vectors_of<T>(op.step));
  const int first_channel = tile.group * op.width + tile.channel;
  const int64_t at = tile.group * op.group_size + tile.start;
  if (embedding) {
#pragma unroll 1
    for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
      coefficient[c].x = embedding_of<T>(given, op, tile.sample, first_channel + c);
    __syncthreads();
  }
  const T* const from = x + tile.sample * op.x_stride + at;
  T single;
  const double2 part = tile_moments(from, tile, op, embedding != nullptr, coefficient, kept, single);
  if (op.statistics == kGiven) {
    if (threadIdx.x == 0) moments[blockIdx.x] = part;
    return;
  }
  const bool cluster = op.statistics == kCluster;
  if (threadIdx.x == 0) own = part;
  if (cluster) {
    cluster_arrive();
    cluster_wait();
  }
  if (warp() == 0) {
    const double2 all = combine<true>(
        op.parts, static_cast<double>(op.group_size), op.eps,
        [&](int i) { return cluster ? *in_block(&own, i) : own; },
        [&](int i) {
          return static_cast<double>(min(static_cast<int64_t>(op.step), op.group_size - i * int64_t{op.step}));
        });
    if (lane() == 0) {
      statistics = all;
      if (mean && tile.part == 0) mean[tile.unit] = all.x;
      if (rstd && tile.part == 0) rstd[tile.unit] = all.y;
    }
  }
  if (cluster) cluster_arrive();
  __syncthreads();
#pragma unroll 1
  for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
    coefficient[c] = coefficients<T>(given, op, tile.sample, first_channel + c, statistics.x, statistics.y);
  __syncthreads();
  T* const to = out + tile.sample * op.out_stride + at;
  const bool aligned = is_aligned(to);
#pragma unroll 1
  for (int i = threadIdx.x; i < tile.vectors; i += blockDim.x)
    store(to + i * V, normalised<T>(kept[i], i, tile, op, coefficient), aligned, V);
  if (tile.single < tile.count) to[tile.single] = normalised_single(single, tile, op, coefficient);
  if (cluster) cluster_wait();
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 3)
    norm_act_apply_first(const T* x, T* out, const void* weight, const void* bias, const void* scale,
                         const void* shift, const void* embedding, const double* mean, const double* rstd,
                         const NormActOp op) {
  extern __shared__ uint4 shared[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const FirstTile tile = first_tile<T>(op, blockIdx.x);
  float4* const coefficient = reinterpret_cast<float4*>(shared);
  const int64_t at = tile.group * op.group_size + tile.start;
#pragma unroll 1
  for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
    coefficient[c] = coefficients<T>(given, op, tile.sample, tile.group * op.width + tile.channel + c, mean[tile.unit],
                                     rstd[tile.unit]);
  __syncthreads();
  const T* const from = x + tile.sample * op.x_stride + at;
  T* const to = out + tile.sample * op.out_stride + at;
  for_vectors(
      threadIdx.x, is_aligned(from) && is_aligned(to) ? tile.vectors : 0, tile.vectors, blockDim.x,
      [&](int i) { return load(from + i * V); }, [&](int i) { return load(from + i * V, V); },
      [&](int i, const uint4& v, bool whole) {
        store(to + i * V, normalised<T>(v, i, tile, op, coefficient), whole, V);
      });
  if (tile.single < tile.count)
    to[tile.single] = normalised_single(from[tile.single], tile, op, coefficient);
}

}  // namespace cuda
}  // namespace ddpm_fast
