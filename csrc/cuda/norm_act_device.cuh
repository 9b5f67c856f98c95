// What the GroupNorm kernels of both layouts share: parameters, coefficients and statistics.
#pragma once

#include <cooperative_groups.h>

#include "arguments.h"
#include "block.cuh"
#include "convert.cuh"
#include "ddpm_fast/moments.h"
#include "norm_act_op.h"
#include "silu.cuh"
#include "vector.cuh"

namespace ddpm_fast {
namespace cuda {

// The pointers to one value a channel; null where the op goes without.
struct Parameters {
  const void *weight, *bias, *scale, *shift, *embedding;
};

// Of float32 or of x's type T, of any type where a kernel does not know x's.
template <class T = void>
__device__ __forceinline__ float parameter(const void* data, const ParameterLayout& layout, int64_t sample,
                                           int channel) {
  const int64_t at = sample * layout.row + channel * layout.column;
  if constexpr (std::is_void_v<T> || std::is_same_v<T, __half>)
    if (layout.type == kFloat16) return to_float(static_cast<const __half*>(data)[at]);
  if constexpr (std::is_void_v<T> || std::is_same_v<T, __nv_bfloat16>)
    if (layout.type == kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[at]);
  return static_cast<const float*>(data)[at];
}

// With v = x + embedding, z = (v - center) * factor + offset.
struct Coefficients {
  float embedding, center, factor, offset;
};
static_assert(sizeof(Coefficients) == sizeof(float4));

template <class T>
__device__ __forceinline__ float embedding_of(const Parameters& given, const NormActOp& op, int64_t sample,
                                              int channel) {
  return given.embedding ? parameter<T>(given.embedding, op.embedding, sample, channel) : 0.0f;
}

template <class T>
__device__ __forceinline__ double one_plus_scale(const Parameters& given, const NormActOp& op, int64_t sample,
                                                 int channel) {
  return given.scale ? 1.0 + static_cast<double>(parameter<T>(given.scale, op.scale, sample, channel)) : 1.0;
}

template <class T>
__device__ __forceinline__ float4 coefficients(const Parameters& given, const NormActOp& op, int64_t sample,
                                               int channel, double mean, double rstd) {
  const double by_scale = one_plus_scale<T>(given, op, sample, channel);
  double factor = rstd * by_scale, offset = 0.0;
  if (given.weight) factor *= static_cast<double>(parameter<T>(given.weight, op.weight, 0, channel));
  if (given.bias) offset = static_cast<double>(parameter<T>(given.bias, op.bias, 0, channel)) * by_scale;
  if (given.shift) offset += static_cast<double>(parameter<T>(given.shift, op.shift, sample, channel));
  return make_float4(embedding_of<T>(given, op, sample, channel), static_cast<float>(mean),
                     static_cast<float>(factor), static_cast<float>(offset - below_float(mean) * factor));
}

__device__ __forceinline__ float normalised(float x, const float4& k) {
  return fmaf((x + k.x) - k.y, k.z, k.w);
}

template <int kCount> __device__ __forceinline__ void activate(float (&z)[kCount], bool activation) {
  if (!activation) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) z[k] = silu(z[k]);
}

template <int kCount> __device__ __forceinline__ float tree_sum(const float (&x)[kCount]) {
  if constexpr (kCount == 4) {
    return (x[0] + x[1]) + (x[2] + x[3]);
  } else {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
}

// The sum of f(i) over the parts of a unit, for the first lane of a warp. kFew: they are the blocks of a cluster.
template <bool kFew, class F> __device__ __forceinline__ double sum_parts(int parts, const F& f) {
  if constexpr (kFew) {
    return team_sum(lane() < parts ? f(lane()) : 0.0, kMostOfCluster);
  } else {
    double sum = 0;
#pragma unroll 1
    for (int i = lane(); i < parts; i += kWarp) sum += f(i);
    return warp_sum(sum);
  }
}

// Mean and reciprocal standard deviation of `count` values from the moments of their parts, for the first lane of a
// warp: part(i) gives moments and size(i) the number of values of part i. Chan, Golub and LeVeque's (1979) update for
// all parts at once.
template <bool kFew, class Part, class Size>
__device__ __forceinline__ double2 combine(int parts, double count, double eps, const Part& part, const Size& size) {
  const double mean = sum_parts<kFew>(parts, [&](int i) { return size(i) * part(i).x; }) / count;
  const double deviation = sum_parts<kFew>(parts, [&](int i) {
    const double2 moments = part(i);
    const double apart = moments.x - mean;
    return moments.y + size(i) * (apart * apart);
  });
  return make_double2(mean, 1.0 / sqrt(deviation / count + eps));
}

// A block of a cluster must not end while others may read its shared memory, nor be read before it has written it.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
// The same place in the shared memory of another block of the cluster.
template <class N> __device__ __forceinline__ const N* in_block(const N* here, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(const_cast<N*>(here), rank);
#else
  return here;
#endif
}

}  // namespace cuda
}  // namespace ddpm_fast
