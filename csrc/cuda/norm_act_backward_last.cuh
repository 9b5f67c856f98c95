// The derivative of GroupNorm, scale and shift, and SiLU with channels last.
#pragma once

#include "norm_act_backward.cuh"
#include "norm_act_last.cuh"

namespace ddpm_fast {
namespace cuda {

// This thread's first vector in each.
template <class T>
__device__ __forceinline__ Images<T> tile_of(const T* grad_out, const T* x, T* grad_x, const LastTile& tile,
                                             const NormActOp& op) {
  const int64_t at = static_cast<int64_t>(tile.pixel) * op.channels + tile.channel + tile.column * kWidth<T>;
  return {grad_out + tile.sample * op.grad_stride + at, x + tile.sample * op.x_stride + at,
          grad_x == nullptr ? nullptr : grad_x + tile.sample * op.out_stride + at};
}

// The pixels of which this thread's columns are read by one load each, and written by one store.
template <class T>
__device__ __forceinline__ int whole_pixels(const Images<T>& images, const LastTile& tile, const NormActOp& op) {
  return min(min(whole_pixels(images.grad_out, tile, op), whole_pixels(images.x, tile, op)),
             whole_pixels(images.grad_x, tile, op));
}

template <class T> __device__ __forceinline__ Vectors load_pixel(const Images<T>& images, int p, const NormActOp& op) {
  const int64_t at = static_cast<int64_t>(p) * op.channels;
  return {load(images.grad_out + at), load(images.x + at)};
}
template <class T>
__device__ __forceinline__ Vectors load_pixel(const Images<T>& images, int p, const NormActOp& op, int valid) {
  const int64_t at = static_cast<int64_t>(p) * op.channels;
  return {load(images.grad_out + at, valid), load(images.x + at, valid)};
}

template <class T>
__device__ __forceinline__ uint4 gradient_vector(const Vectors& v, const float4 (&k)[kWidth<T>],
                                                 const float2 (&line)[kWidth<T>], const NormActOp& op) {
  float grad[kWidth<T>], x[kWidth<T>];
  unpack<T>(v.grad, grad);
  unpack<T>(v.x, x);
#pragma unroll
  for (int j = 0; j < kWidth<T>; ++j) grad[j] = gradient_of_x(grad[j], x[j], k[j], line[j], op.activation);
  return pack<T>(grad);
}

// This thread's lines, from those of the groups.
template <class T>
__device__ __forceinline__ void own_lines(const LastTile& tile, const NormActOp& op, const float2* of_group,
                                          float2 (&own)[kWidth<T>]) {
#pragma unroll
  for (int k = 0; k < kWidth<T>; ++k)
    own[k] = of_group[op.by_width(own_channel<T>(tile, k))];
}

// LastShared with both vectors of a place kept, grad_out's after x's.
template <class T>
__global__ void __launch_bounds__(kMostThreadsBackwardLast, 3)
    norm_act_backward_last(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* bias,
                           const void* scale, const void* shift, const void* embedding, const double* mean,
                           const double* rstd, Sums* sums, double2* along, const NormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const LastTile tile = last_tile<T>(op, blockIdx.x);
  const LastShared<T> shared(memory, op, 2);
  uint4* const kept_grad = shared.kept + op.step * vectors_of<T>(op.piece);
  const int64_t first_group = static_cast<int64_t>(tile.sample) * op.groups + tile.slab * op.slab;
#pragma unroll 1
  for (int g = threadIdx.x; g < tile.groups; g += blockDim.x)
    shared.statistics[g] = make_double2(mean[first_group + g], rstd[first_group + g]);
  __syncthreads();
  fill_coefficients(given, op, tile, shared);
  __syncthreads();
  const Images<T> images = tile_of(grad_out, x, grad_x, tile, op);
  const int first = tile.valid > 0 ? tile.row : tile.pixels;
  for_vectors(
      first, whole_pixels(images, tile, op), tile.pixels, tile.rows, [&](int p) { return load_pixel(images, p, op); },
      [&](int p) { return load_pixel(images, p, op, tile.valid); },
      [&](int p, const Vectors& v, bool) {
        kept_grad[p * tile.columns + tile.column] = v.grad;
        shared.kept[p * tile.columns + tile.column] = v.x;
      });
  float gradient[V], product[V], difference[V];
#pragma unroll
  for (int k = 0; k < V; ++k) gradient[k] = product[k] = difference[k] = 0.0f;
  {
    float4 own[V];
    own_coefficients<T>(tile, shared.coefficient, own);
#pragma unroll 1
    for (int p = first; p < tile.pixels; p += tile.rows) {
      float grad[V], value[V];
      unpack<T>(kept_grad[p * tile.columns + tile.column], grad);
      unpack<T>(shared.kept[p * tile.columns + tile.column], value);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float d = (value[k] + own[k].x) - own[k].y, g = gradient_of_z(grad[k], d, own[k], op.activation);
        gradient[k] += g;
        product[k] = fmaf(g, d, product[k]);
        difference[k] += d;
      }
    }
  }

  // The three sums of a channel meet in the thread that takes it in sum_rows.
  Sums* const to = sums + static_cast<int64_t>(blockIdx.x) * op.slots;
  sum_rows<T>(gradient, tile, shared.of_threads, [&](int c, float sum) { to[c].x = sum; });
  sum_rows<T>(product, tile, shared.of_threads, [&](int c, float sum) { to[c].y = sum; });
  sum_rows<T>(difference, tile, shared.of_threads, [&](int c, float sum) { to[c].z = sum; });
  if (op.statistics == kGiven) return;

  const bool cluster = op.statistics == kCluster;
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    double2 part = make_double2(0, 0);
#pragma unroll 1
    for (int c = g * op.width + lane(); c < (g + 1) * op.width; c += kWarp) {
      const double2 more =
          along_of<T>(given, op, tile.sample, tile.channel + c, widened(to[c]), shared.statistics[g]);
      part.x += more.x;
      part.y += more.y;
    }
    part = make_double2(warp_sum(part.x), warp_sum(part.y));
    if (lane() == 0) shared.of_group[g] = part;
  }
  if (cluster) {
    cluster_arrive();
    cluster_wait();
  }
  // A unit of one part is read by the thread that wrote it.
#pragma unroll 1
  for (int g = warp(); g < tile.groups; g += warps()) {
    double2 part = make_double2(0, 0);
    if (lane() < op.parts) part = cluster ? *in_block(&shared.of_group[g], lane()) : shared.of_group[g];
    const double size = static_cast<double>(op.group_size);
    part = make_double2(team_sum(part.x, kMostOfCluster), team_sum(part.y, kMostOfCluster));
    const double2 means = make_double2(part.x / size, part.y / size);
    if (lane() == 0) {
      if (tile.part == 0) along[first_group + g] = means;
      shared.lines[g] = line_of(shared.statistics[g], means);
    }
  }
  if (cluster) cluster_arrive();
  __syncthreads();
  if (images.grad_x != nullptr && tile.valid > 0) {
    // Read again rather than kept in registers through the sums.
    float4 own[V];
    own_coefficients<T>(tile, shared.coefficient, own);
    float2 line[V];
    own_lines<T>(tile, op, shared.lines, line);
    const bool aligned = all_aligned(images.grad_x, op);
#pragma unroll 1
    for (int p = tile.row; p < tile.pixels; p += tile.rows) {
      const int at = p * tile.columns + tile.column;
      store(images.grad_x + static_cast<int64_t>(p) * op.channels,
            gradient_vector<T>({kept_grad[at], shared.kept[at]}, own, line, op), aligned, tile.valid);
    }
  }
  if (cluster) cluster_wait();
}

template <class T>
__global__ void __launch_bounds__(kMostThreadsBackwardLast, 3)
    norm_act_backward_apply_last(const T* grad_out, const T* x, T* grad_x, const void* weight, const void* bias,
                                 const void* scale, const void* shift, const void* embedding, const double* mean,
                                 const double* rstd, const double2* along, const NormActOp op) {
  extern __shared__ uint4 memory[];
  constexpr int V = kWidth<T>;
  const Parameters given{weight, bias, scale, shift, embedding};
  const LastTile tile = last_tile<T>(op, blockIdx.x);
  const LastShared<T> shared(memory, op, 0);
  const int64_t first_group = static_cast<int64_t>(tile.sample) * op.groups + tile.slab * op.slab;
#pragma unroll 1
  for (int g = threadIdx.x; g < tile.groups; g += blockDim.x) {
    shared.statistics[g] = make_double2(mean[first_group + g], rstd[first_group + g]);
    shared.lines[g] = line_of(shared.statistics[g], along[first_group + g]);
  }
  __syncthreads();
  fill_coefficients(given, op, tile, shared);
  __syncthreads();
  if (tile.valid == 0) return;
  float4 own[V];
  own_coefficients<T>(tile, shared.coefficient, own);
  float2 line[V];
  own_lines<T>(tile, op, shared.lines, line);
  const Images<T> images = tile_of(grad_out, x, grad_x, tile, op);
  for_vectors<2>(
      tile.row, whole_pixels(images, tile, op), tile.pixels, tile.rows,
      [&](int p) { return load_pixel(images, p, op); },
      [&](int p) { return load_pixel(images, p, op, tile.valid); },
      [&](int p, const Vectors& v, bool whole) {
        store(images.grad_x + static_cast<int64_t>(p) * op.channels, gradient_vector<T>(v, own, line, op), whole,
              whole ? V : tile.valid);
      });
}

}  // namespace cuda
}  // namespace ddpm_fast
