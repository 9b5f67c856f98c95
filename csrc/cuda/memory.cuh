// Reading and writing groups of V neighbouring elements: one access of up to 16 bytes where the group is aligned, one
// an element elsewhere.
#pragma once

#include "arguments.h"
#include "scalar.cuh"

namespace ddpm_fast {
namespace cuda {

// A group as it lies in memory; it is widened when it is used, so that the reads of several tensors overlap.
template <int V> struct Raw {
  uint32_t word[V];
};

template <int kBytes> DDPM_FAST_INLINE void load_words(uint32_t* word, const char* from) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    word[0] = v.x, word[1] = v.y;
  } else {
    static_assert(kBytes == 4);
    word[0] = *reinterpret_cast<const uint32_t*>(from);
  }
}

// Where the elements of one sample lie.
struct Reader {
  const char* data;
  View view;

  DDPM_FAST_INLINE Reader(const void* tensor, const View& view_, int64_t sample)
      : data(static_cast<const char*>(tensor)), view(view_) {
    if (data != nullptr) data += sample * view.sample_stride * size_of(view.type);
  }
  DDPM_FAST_INLINE explicit operator bool() const { return data != nullptr; }

  // Elements e .. e + count - 1 of the target's order.
  template <int V> DDPM_FAST_INLINE Raw<V> read(int64_t e, int count) const {
    Raw<V> raw;
    if (view.vector && count == V) {
      switch (view.type) {
        case kFloat32: load_words<4 * V>(raw.word, data + 4 * e); break;
        case kUint8: load_words<V>(raw.word, data + e); break;
        default: load_words<2 * V>(raw.word, data + 2 * e);
      }
      return raw;
    }
    int64_t outer, inner;
    if (((e | view.inner) >> 32) == 0) {
      outer = static_cast<uint32_t>(e) / static_cast<uint32_t>(view.inner);
    } else {
      outer = e / view.inner;
    }
    inner = e - outer * view.inner;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      raw.word[j] = 0;
      if (j >= count) continue;
      const int64_t at = outer * view.outer_stride + inner * view.inner_stride;
      switch (view.type) {
        case kFloat32: raw.word[j] = reinterpret_cast<const uint32_t*>(data)[at]; break;
        case kUint8: raw.word[j / 4] |= static_cast<uint32_t>(reinterpret_cast<const uint8_t*>(data)[at]) << j % 4 * 8; break;
        default: raw.word[j / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(data)[at]) << j % 2 * 16;
      }
      if (++inner == view.inner) inner = 0, ++outer;
    }
    return raw;
  }
};

template <int V> DDPM_FAST_INLINE void widen(F (&out)[V], const Raw<V>& raw, Type type) {
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const uint32_t half = raw.word[j / 2] >> j % 2 * 16;
    switch (type) {
      case kFloat32: out[j] = {__uint_as_float(raw.word[j])}; break;
      case kFloat16: out[j] = {__half2float(__ushort_as_half(static_cast<uint16_t>(half)))}; break;
      case kBFloat16: out[j] = {__uint_as_float(half << 16)}; break;
      default: out[j] = {__uint2float_rn(raw.word[j / 4] >> j % 4 * 8 & 0xffu)};
    }
  }
}

// A row of a table with so many. There is nothing to write for one that does not exist, and reading past the end would
// go unnoticed: the launch fails, as torch's own indexing does.
DDPM_FAST_INLINE int64_t row_of(int64_t index, int64_t rows) {
  if (index < 0 || index >= rows) __trap();
  return index;
}

// Writes the first `count` of V values, rounded to T.
template <class T, int V> DDPM_FAST_INLINE void write(T* to, const F (&values)[V], int count, bool vector) {
  constexpr int kBytes = V * sizeof(T);
  if (vector && count == V) {
    union {
      T element[V];
      uint32_t word[kBytes / 4];
    } group;
#pragma unroll
    for (int j = 0; j < V; ++j) group.element[j] = narrow<T>(values[j].v);
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(to) = make_uint4(group.word[0], group.word[1], group.word[2], group.word[3]);
    } else {
      static_assert(kBytes == 8);
      *reinterpret_cast<uint2*>(to) = make_uint2(group.word[0], group.word[1]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j < count) to[j] = narrow<T>(values[j].v);
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
