// What the norms' operators share in reading their arguments.
#pragma once

#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <optional>
#include <vector>

#include "arguments.h"
#include "norm_act.h"

namespace ddpm_fast {

using Optional = std::optional<Tensor>;

// Elements for which waking a thread pays.
constexpr int64_t kGrain = 16384;

// A (C,) or (N, C) parameter as float32 rows, read where it lies if it can be.
class Parameter {
 public:
  Parameter(const Optional& tensor, bool per_sample, const Tensor& x, const char* name) {
    if (!tensor) return;
    const int64_t channels = x.size(1), samples = per_sample ? x.size(0) : 1;
    const int64_t dim = tensor->dim(), column = dim == 0 ? 0 : tensor->stride(dim - 1);
    STD_TORCH_CHECK(dim == (per_sample ? 2 : 1) && tensor->size(dim - 1) == channels &&
                        (!per_sample || tensor->size(0) == samples) && tensor->is_cpu(),
                    name, " must be a CPU tensor of ", per_sample ? "shape (N, C)" : "shape (C,)");
    const int64_t stride = per_sample ? tensor->stride(0) : 0;
    const void* const data = tensor->const_data_ptr();
    switch (tensor->scalar_type()) {
      case ScalarType::Float:
        if (column == 1 || channels == 1)
          rows_ = {static_cast<const float*>(data), stride};
        else
          copy(static_cast<const float*>(data), samples, channels, stride, column);
        break;
      case ScalarType::Half: copy(static_cast<const c10::Half*>(data), samples, channels, stride, column); break;
      case ScalarType::BFloat16:
        copy(static_cast<const c10::BFloat16*>(data), samples, channels, stride, column);
        break;
      default: STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
    }
  }
  ChannelRows rows() const { return rows_; }

 private:
  template <class T> void copy(const T* data, int64_t samples, int64_t channels, int64_t stride, int64_t column) {
    copy_.resize(samples * channels);
    for (int64_t n = 0; n < samples; ++n)
      for (int64_t c = 0; c < channels; ++c)
        copy_[n * channels + c] = static_cast<float>(data[n * stride + c * column]);
    rows_ = {copy_.data(), stride == 0 ? 0 : channels};
  }
  std::vector<float> copy_;
  ChannelRows rows_;
};

inline Image image_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && tensor.is_cpu() && tensor.dim() == x.dim(), name,
                  " must be a CPU tensor of x's dtype and shape");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), name, " must have x's shape");
  return dense_image_of(tensor, name);
}

// The float32 gradient of a parameter, null where none is asked for.
inline float* gradient(const Optional& tensor, int64_t size, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && tensor->is_cpu() &&
                      tensor->numel() == size,
                  name, " must be a contiguous float32 tensor of ", size, " elements");
  return static_cast<float*>(tensor->mutable_data_ptr());
}

}  // namespace ddpm_fast
