// The derivative of GroupNorm, scale and shift, and SiLU with channels first.
#pragma once

#include "norm_act_backward.cuh"
#include "norm_act_first.cuh"

namespace ddpm_fast {
namespace cuda {

template <class T>
__device__ __forceinline__ Images<T> tile_of(const T* grad_out, const T* x, T* grad_x, const FirstTile& tile,
                                             const NormActOp& op) {
  const int64_t at = tile.group * op.group_size + tile.start;
  return {grad_out + tile.sample * op.grad_stride + at, x + tile.sample * op.x_stride + at,
          grad_x == nullptr ? nullptr : grad_x + tile.sample * op.out_stride + at};
}

template <class T>
__device__ __forceinline__ uint4 gradient_vector(const Vectors& v, int i, const FirstTile& tile, const NormActOp& op,
                                                 const float4* coefficient, const float2& line) {
  float grad[kWidth<T>], x[kWidth<T>];
  unpack<T>(v.grad, grad);
  unpack<T>(v.x, x);
  for_channels<T>(i, tile, op, coefficient, [&](int j, const float4& k) {
    grad[j] = gradient_of_x(grad[j], x[j], k, line, op.activation);
  });
  return pack<T>(grad);
}

// Of this thread's single element.
template <class T>
__device__ __forceinline__ T gradient_of_single(T grad_out, T x, const FirstTile& tile, const NormActOp& op,
                                                const float4* coefficient, const float2& line) {
  return narrow<T>(gradient_of_x(to_float(grad_out), to_float(x), of_single(tile, op, coefficient), line,
                                 op.activation));
}

// The vectors that are read by one load each, and written by one store.
template <class T>
__device__ __forceinline__ int whole_vectors(const Images<T>& images, const FirstTile& tile) {
  return is_aligned(images.grad_out) && is_aligned(images.x) && is_aligned(images.grad_x) ? tile.vectors : 0;
}

// The sums of one span of vectors of a channel, which op.lanes threads share; elements of other channels at its ends
// are left out.
template <class T>
__device__ __forceinline__ Sums span_sums(int channel, int span, const FirstTile& tile, const NormActOp& op,
                                          const uint4* kept_grad, const uint4* kept_x, const float4& k) {
  constexpr int V = kWidth<T>;
  const int begin = max(channel * op.pixels - tile.pixel, 0);
  const int end = min((channel + 1) * op.pixels - tile.pixel, tile.count);
  const int first = full_vectors_of<T>(begin) + span * op.span, last = min(first + op.span, vectors_of<T>(end));
  Sums sums = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int i = first + lane() % op.lanes; i < last; i += op.lanes) {
    float grad[V], x[V], product[V];
    unpack<T>(kept_grad[i], grad);
    unpack<T>(kept_x[i], x);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      x[j] = (x[j] + k.x) - k.y;
      grad[j] = gradient_of_z(grad[j], x[j], k, op.activation);
    }
    if (i * V < begin || i * V + V > end) {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (i * V + j < begin || i * V + j >= end) grad[j] = x[j] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < V; ++j) product[j] = grad[j] * x[j];
    sums = sums + make_float4(tree_sum(grad), tree_sum(product), tree_sum(x), 0.0f);
  }
  return sums;
}

// One block a tile. sums: op.slots a tile; along: one a group.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 3)
    norm_act_backward_first(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* bias,
                            const void* scale, const void* shift, const void* embedding, const double* mean,
                            const double* rstd, Sums* sums, double2* along, const NormActOp op) {
  extern __shared__ uint4 shared[];
  __shared__ double of_warps[kWarp], more_of_warps[kWarp];
  __shared__ double2 own;
  __shared__ float2 line;
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const FirstTile tile = first_tile<T>(op, blockIdx.x);
  const int most = vectors_of<T>(op.step);
  uint4 *const kept_grad = shared, *const kept_x = shared + most;
  float4* const coefficient = reinterpret_cast<float4*>(kept_x + most);
  Sums* const of_spans = coefficient + op.slots;
  const double2 statistics = make_double2(mean[tile.unit], rstd[tile.unit]);
  const int first_channel = tile.group * op.width + tile.channel, tid = threadIdx.x, threads = blockDim.x;
#pragma unroll 1
  for (int c = tid; c < tile.channels; c += threads)
    coefficient[c] = coefficients<T>(given, op, tile.sample, first_channel + c, statistics.x, statistics.y);
  const Images<T> images = tile_of(grad_out, x, grad_x, tile, op);
  for_vectors<2>(
      tid, whole_vectors(images, tile), vectors_of<T>(tile.count), threads,
      [&](int i) { return Vectors{load(images.grad_out + i * V), load(images.x + i * V)}; },
      [&](int i) {
        const int count = tile.count - i * V;
        return Vectors{load(images.grad_out + i * V, count), load(images.x + i * V, count)};
      },
      [&](int i, const Vectors& v, bool) {
        kept_grad[i] = v.grad;
        kept_x[i] = v.x;
      });
  __syncthreads();

  // Teams of a warp take spans side by side; all of its threads stay for the sums.
  const int teams = threads / op.lanes, spans = tile.channels * op.spans;
#pragma unroll 1
  for (int first = warp() * (kWarp / op.lanes); first < spans; first += teams) {
    const int span = first + lane() / op.lanes, channel = span / op.spans;
    Sums sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (span < spans)
      sum = span_sums<T>(channel, span - channel * op.spans, tile, op, kept_grad, kept_x, coefficient[channel]);
    sum.x = team_sum(sum.x, op.lanes);
    sum.y = team_sum(sum.y, op.lanes);
    sum.z = team_sum(sum.z, op.lanes);
    if (span < spans && lane() % op.lanes == 0) of_spans[span] = sum;
  }
  __syncthreads();
  double2 part = make_double2(0, 0);
#pragma unroll 1
  for (int c = tid; c < tile.channels; c += threads) {
    Sums sum = of_spans[c * op.spans];
#pragma unroll 1
    for (int i = 1; i < op.spans; ++i) sum = sum + of_spans[c * op.spans + i];
    sums[static_cast<int64_t>(blockIdx.x) * op.slots + c] = sum;
    const double2 more = along_of<T>(given, op, tile.sample, first_channel + c, widened(sum), statistics);
    part.x += more.x;
    part.y += more.y;
  }
  if (op.statistics == kGiven) return;

  const bool cluster = op.statistics == kCluster;
  part = make_double2(block_sum(part.x, of_warps), block_sum(part.y, more_of_warps));
  if (cluster) {
    if (tid == 0) own = part;
    cluster_arrive();
    cluster_wait();
    part = lane() < op.parts ? *in_block(&own, lane()) : make_double2(0, 0);
    part = make_double2(team_sum(part.x, kMostOfCluster), team_sum(part.y, kMostOfCluster));
    cluster_arrive();
  }
  if (tid == 0) {
    const double size = static_cast<double>(op.group_size);
    const double2 means = make_double2(part.x / size, part.y / size);
    if (tile.part == 0) along[tile.unit] = means;
    line = line_of(statistics, means);
  }
  __syncthreads();
  if (images.grad_x != nullptr) {
    const bool aligned = is_aligned(images.grad_x);
#pragma unroll 1
    for (int i = tid; i < tile.vectors; i += threads)
      store(images.grad_x + i * V,
            gradient_vector<T>({kept_grad[i], kept_x[i]}, i, tile, op, coefficient, line), aligned, V);
    if (tile.single < tile.count)
      images.grad_x[tile.single] =
          gradient_of_single(reinterpret_cast<const T*>(kept_grad)[tile.single],
                             reinterpret_cast<const T*>(kept_x)[tile.single], tile, op, coefficient, line);
  }
  if (cluster) cluster_wait();
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    norm_act_backward_apply_first(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* bias,
                                  const void* scale, const void* shift, const void* embedding, const double* mean,
                                  const double* rstd, const double2* along, const NormActOp op) {
  extern __shared__ uint4 shared[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const FirstTile tile = first_tile<T>(op, blockIdx.x);
  float4* const coefficient = reinterpret_cast<float4*>(shared);
  const double2 statistics = make_double2(mean[tile.unit], rstd[tile.unit]);
#pragma unroll 1
  for (int c = threadIdx.x; c < tile.channels; c += blockDim.x)
    coefficient[c] = coefficients<T>(given, op, tile.sample, tile.group * op.width + tile.channel + c, statistics.x,
                                  statistics.y);
  const float2 line = line_of(statistics, along[tile.unit]);
  __syncthreads();
  const Images<T> images = tile_of(grad_out, x, grad_x, tile, op);
  for_vectors<2>(
      threadIdx.x, whole_vectors(images, tile), tile.vectors, blockDim.x,
      [&](int i) { return Vectors{load(images.grad_out + i * V), load(images.x + i * V)}; },
      [&](int i) { return Vectors{load(images.grad_out + i * V, V), load(images.x + i * V, V)}; },
      [&](int i, const Vectors& v, bool whole) {
        store(images.grad_x + i * V, gradient_vector<T>(v, i, tile, op, coefficient, line), whole, V);
      });
  if (tile.single < tile.count)
    images.grad_x[tile.single] = gradient_of_single(images.grad_out[tile.single], images.x[tile.single], tile, op,
                                                    coefficient, line);
}

}  // namespace cuda
}  // namespace ddpm_fast
