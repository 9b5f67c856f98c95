#include "quantile.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include <array>

#include "ddpm_fast/quantile.h"
#include "ops.h"
#include "tensors.h"

namespace ddpm_fast {
namespace cuda {

void abs_quantile(Tensor x, double q, Tensor out) {
  const Image image = dense_image_of(x, "x");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && out.scalar_type() == ScalarType::Float,
                  "x and out must be float32");
  STD_TORCH_CHECK(out.numel() == image.samples && out.is_contiguous(), "out must be contiguous and have ",
                  image.samples, " elements");
  STD_TORCH_CHECK(image.size() > 0 && q >= 0 && q <= 1, "q must lie in [0, 1], and a sample have an element");
  STD_TORCH_CHECK(image.size() <= UINT32_MAX, "a sample has ", image.size(), " elements; at most 2^32 - 1 are counted");
  if (image.samples == 0) return;
  const Rank rank = rank_of(q, image.size());
  const QuantileLayout layout{image.samples, image.size(), image.sample_stride, static_cast<uint32_t>(rank.below),
                              rank.weight};
  const OnDevice on(x);
  const std::array<int64_t, 1> bytes{quantile_workspace(image.samples)};
  const Tensor workspace = torch::stable::new_empty(x, bytes, ScalarType::Byte);
  check_launch(launch_quantile(static_cast<const float*>(x.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()),
                               workspace.mutable_data_ptr(), layout, on.stream()));
}

}  // namespace cuda
}  // namespace ddpm_fast
