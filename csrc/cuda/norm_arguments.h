// What the norms' operators share in reading their arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include "norm_act.h"
#include "tensors.h"

namespace ddpm_fast {
namespace cuda {

using Optional = std::optional<Tensor>;

inline bool beside(const Tensor& tensor, const Tensor& x) {
  return tensor.is_cpu() == x.is_cpu() && tensor.get_device_index() == x.get_device_index();
}

inline Image image_like(const Tensor& tensor, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() && beside(tensor, x) && tensor.dim() == x.dim(), name,
                  " must be of x's dtype, device and shape");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(tensor.size(d) == x.size(d), name, " must have x's shape");
  return dense_image_of(tensor, name);
}

inline Parameter parameter(const Optional& tensor, bool per_sample, const Tensor& x, const char* name) {
  if (!tensor) return {};
  const int64_t dim = tensor->dim();
  STD_TORCH_CHECK(dim == (per_sample ? 2 : 1) && tensor->size(dim - 1) == x.size(1) &&
                      (!per_sample || tensor->size(0) == x.size(0)) && beside(*tensor, x),
                  name, " must be on x's device and of ", per_sample ? "shape (N, C)" : "shape (C,)");
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float || tensor->scalar_type() == x.scalar_type(), name,
                  " must be float32 or of x's dtype");
  return {tensor->const_data_ptr(), {per_sample ? tensor->stride(0) : 0, tensor->stride(dim - 1),
                                     result_type(*tensor, name)}};
}

inline float* gradient(const Optional& tensor, int64_t size, const Tensor& x, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && beside(*tensor, x) &&
                      tensor->numel() == size,
                  name, " must be a contiguous float32 tensor of ", size, " elements");
  return static_cast<float*>(tensor->mutable_data_ptr());
}

// Places in a sample are counted in int; a batch may have any number of elements.
constexpr int64_t kMostOfDimension = int64_t{1} << 30;

// Kept until the kernels are on their stream; PyTorch gives the memory to nobody on another stream after that.
inline Tensor workspace(const Tensor& x, int64_t bytes) {
  const int64_t size[] = {(bytes + 7) / 8};
  return torch::stable::new_empty(x, size, ScalarType::Double);
}

// Throws for what neither norm's kernels take.
inline void check_image(const Tensor& x, const Image& image) {
  STD_TORCH_CHECK(x.dim() >= 2 && image.channels > 0 && image.pixels > 0,
                  "x must be (N, C, *) with at least one channel and one pixel");
  STD_TORCH_CHECK(image.channels <= kMostOfDimension && image.pixels <= kMostOfDimension,
                  "x must have at most 2^30 channels, and pixels in each");
}

}  // namespace cuda
}  // namespace ddpm_fast
