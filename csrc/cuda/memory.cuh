// Reading and writing groups of V neighbouring elements: one access of up to 16 bytes where the group is aligned, one
// an element elsewhere.
#pragma once

#include <type_traits>

#include "arguments.h"
#include "scalar.cuh"

namespace ddpm_fast {
namespace cuda {

// A group as it lies in memory; it is widened when it is used, so that the reads of several tensors overlap.
template <int V> struct Raw {
  uint32_t word[V];
};

// The intrinsics are plain loads and stores that the compiler leaves whole: it would merge an access of 16 bytes with the
// single ones of the other branch, and take those.
template <int kBytes> DDPM_FAST_INLINE void load_words(uint32_t* word, const char* from) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = __ldca(reinterpret_cast<const uint4*>(from) + i);
      word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 v = __ldca(reinterpret_cast<const uint2*>(from));
    word[0] = v.x, word[1] = v.y;
  } else {
    static_assert(kBytes == 4);
    word[0] = __ldca(reinterpret_cast<const uint32_t*>(from));
  }
}

template <int kBytes> DDPM_FAST_INLINE void store_words(void* to, const uint32_t* word) {
  if constexpr (kBytes == 16) {
    __stwb(static_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  } else {
    static_assert(kBytes == 8);
    __stwb(static_cast<uint2*>(to), make_uint2(word[0], word[1]));
  }
}

template <int kSize, int V> DDPM_FAST_INLINE void load_single(Raw<V>& raw, int j, const char* data, int64_t at) {
  if constexpr (kSize == 4) {
    raw.word[j] = reinterpret_cast<const uint32_t*>(data)[at];
  } else if constexpr (kSize == 2) {
    raw.word[j / 2] |= uint32_t{reinterpret_cast<const uint16_t*>(data)[at]} << j % 2 * 16;
  } else {
    raw.word[j / 4] |= uint32_t{reinterpret_cast<const uint8_t*>(data)[at]} << j % 4 * 8;
  }
}

template <Type kType, int V> DDPM_FAST_INLINE F widened(const Raw<V>& raw, int j) {
  const uint32_t half = raw.word[j / 2] >> j % 2 * 16;
  switch (kType) {
    case kFloat32: return {__uint_as_float(raw.word[j])};
    case kFloat16: return {__half2float(__ushort_as_half(static_cast<uint16_t>(half)))};
    case kBFloat16: return {__uint_as_float(half << 16)};
    default: return {__uint2float_rn(raw.word[j / 4] >> j % 4 * 8 & 0xffu)};
  }
}

// The elements of one sample of a tensor that lies in the target's order, its dtype known to the compiler. A tensor that
// is not there has samples at a stride of 0.
template <Type kType> struct PlainReader {
  static constexpr int kSize = size_of(kType);
  const char* data;
  bool vector;

  DDPM_FAST_INLINE PlainReader(const void* tensor, const View& view, int64_t sample)
      : data(static_cast<const char*>(tensor) + sample * view.sample_stride * kSize), vector(view.vector) {}
  DDPM_FAST_INLINE bool is_bytes() const { return kType == kUint8; }

  // Elements e .. e + count - 1; count is at least 1, here and below.
  template <int V> DDPM_FAST_INLINE Raw<V> read(int64_t e, int count) const {
    Raw<V> raw{};
    if (vector && count == V) {
      load_words<kSize * V>(raw.word, data + kSize * e);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j)
        if (j == 0 || j < count) load_single<kSize>(raw, j, data, e + j);
    }
    return raw;
  }
  template <int V> DDPM_FAST_INLINE void widen(F (&out)[V], const Raw<V>& raw) const {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widened<kType>(raw, j);
  }
};

// The same for any order and floating-point dtype; kBytes: for bytes too.
template <bool kBytes> struct GeneralReader {
  const char* data;
  const View& view;

  DDPM_FAST_INLINE GeneralReader(const void* tensor, const View& view_, int64_t sample)
      : view(view_) {
    const int size = view.type == kFloat32 ? 4 : is_bytes() ? 1 : 2;
    data = static_cast<const char*>(tensor) + sample * view.sample_stride * size;
  }
  DDPM_FAST_INLINE bool is_bytes() const { return kBytes && view.type == kUint8; }

  template <int V> DDPM_FAST_INLINE Raw<V> read(int64_t e, int count) const {
    Raw<V> raw{};
    if (view.vector && count == V) {
      if (view.type == kFloat32) load_words<4 * V>(raw.word, data + 4 * e);
      else if (is_bytes()) load_words<V>(raw.word, data + e);
      else load_words<2 * V>(raw.word, data + 2 * e);
      return raw;
    }
    const int64_t outer = e / view.inner;  // nvcc divides in 32 bits where these hold both
    int64_t inner = e - outer * view.inner, at = outer * view.outer_stride + inner * view.inner_stride;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (j > 0 && j >= count) break;
      if (view.type == kFloat32) load_single<4>(raw, j, data, at);
      else if (is_bytes()) load_single<1>(raw, j, data, at);
      else load_single<2>(raw, j, data, at);
      at += view.inner_stride;
      if (++inner == view.inner) {
        inner = 0;
        at += view.outer_stride - view.inner * view.inner_stride;
      }
    }
    return raw;
  }
  template <int V> DDPM_FAST_INLINE void widen(F (&out)[V], const Raw<V>& raw) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (view.type == kFloat32) out[j] = widened<kFloat32>(raw, j);
      else if (is_bytes()) out[j] = widened<kUint8>(raw, j);
      else if (view.type == kFloat16) out[j] = widened<kFloat16>(raw, j);
      else out[j] = widened<kBFloat16>(raw, j);
    }
  }
};

template <class T> constexpr Type kTypeOf = kFloat32;
template <> constexpr Type kTypeOf<__half> = kFloat16;
template <> constexpr Type kTypeOf<__nv_bfloat16> = kBFloat16;

template <bool kGeneral, Type kType, bool kBytes = false>
using Reader = std::conditional_t<kGeneral, GeneralReader<kBytes>, PlainReader<kType>>;

// A row of a table with so many. There is nothing to write for one that does not exist, and reading past the end would
// go unnoticed: the launch fails, as torch's own indexing does.
DDPM_FAST_INLINE int64_t row_of(int64_t index, int64_t rows) {
  if (index < 0 || index >= rows) __trap();
  return index;
}

// Writes the first `count` of V values, rounded to T.
template <class T, int V> DDPM_FAST_INLINE void write(T* to, const F (&values)[V], int count, bool vector) {
  if (vector && count == V) {
    uint32_t word[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if constexpr (sizeof(T) == 4) {
        word[j] = bits_of(narrow<T>(values[j].v));
      } else if (j % 2 == 0) {
        word[j / 2] = bits_of(narrow<T>(values[j].v)) | bits_of(narrow<T>(values[j + 1].v)) << 16;
      }
    }
    store_words<V * sizeof(T)>(to, word);
    return;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (j == 0 || j < count) to[j] = narrow<T>(values[j].v);
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
