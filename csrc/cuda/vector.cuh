// Sixteen bytes of memory at a time, whatever the type and alignment, and the conversions between types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace ddpm_fast {
namespace cuda {

// Elements of sixteen bytes.
template <class T> constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

// The vectors that hold so many elements, and those of them that are full.
template <class T> __device__ __forceinline__ int vectors_of(int elements) {
  return static_cast<int>((static_cast<unsigned>(elements) + kWidth<T> - 1) / kWidth<T>);
}
template <class T> __device__ __forceinline__ int full_vectors_of(int elements) {
  return static_cast<int>(static_cast<unsigned>(elements) / kWidth<T>);
}

__device__ __forceinline__ bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T> __device__ __forceinline__ uint4 load(const T* p) { return *reinterpret_cast<const uint4*>(p); }

// The first `count` of the elements at p, which need not be aligned, zeros for the rest: each in its place of the
// vector, so that no result depends on the alignment.
template <class T> __device__ __forceinline__ uint4 load(const T* p, int count) {
  uint32_t word[4] = {0, 0, 0, 0};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) word[k] = reinterpret_cast<const uint32_t*>(p)[k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k < count) word[k / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(p)[k]) << k % 2 * 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

template <class T> __device__ __forceinline__ void store(T* p, const uint4& v, bool aligned, int count) {
  if (aligned && count >= kWidth<T>) {
    *reinterpret_cast<uint4*>(p) = v;
    return;
  }
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) reinterpret_cast<uint32_t*>(p)[k] = word[k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (k < count) reinterpret_cast<uint16_t*>(p)[k] = static_cast<uint16_t>(word[k / 2] >> k % 2 * 16);
  }
}

template <class T> __device__ __forceinline__ void unpack(const uint4& v, float (&x)[kWidth<T>]) {
  const uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      x[k] = __uint_as_float(word[k]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&word[k]));
      x[2 * k] = pair.x;
      x[2 * k + 1] = pair.y;
    } else {
      x[2 * k] = __uint_as_float(word[k] << 16);
      x[2 * k + 1] = __uint_as_float(word[k] & 0xffff0000u);
    }
  }
}

template <class T> __device__ __forceinline__ uint4 pack(const float (&x)[kWidth<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (std::is_same_v<T, float>) {
      word[k] = __float_as_uint(x[k]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const __half2 pair = __floats2half2_rn(x[2 * k], x[2 * k + 1]);
      word[k] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * k], x[2 * k + 1]);
      word[k] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// Calls use(i, vector, whole) for i = begin, begin + stride and so on below end. Those below `whole` come from load(i),
// kBatch of them before the first is used, the others from load_part(i).
template <int kBatch = 4, class Load, class LoadPart, class Use>
__device__ __forceinline__ void for_vectors(int begin, int whole, int end, int stride, const Load& load,
                                            const LoadPart& load_part, const Use& use) {
  int i = begin;
#pragma unroll 1
  for (; i < whole; i += kBatch * stride) {
    decltype(load(0)) v[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (k == 0 || i + k * stride < whole) v[k] = load(i + k * stride);
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (k == 0 || i + k * stride < whole) use(i + k * stride, v[k], true);
  }
  // The first index of this thread that is not below `whole`.
  i = begin + (max(whole - begin, 0) + stride - 1) / stride * stride;
#pragma unroll 1
  for (; i < end; i += stride) use(i, load_part(i), false);
}

}  // namespace cuda
}  // namespace ddpm_fast
