#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace ddpm_fast {
namespace cuda {

void normal(Tensor out, Tensor seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream) {
  const Image image = dense_image_of(out, "out");
  NormalArguments a{};
  a.layout.target = target_of(image);
  a.layout.step_stride = static_cast<int>(per_sample(step, image.samples, "step").stride);
  a.layout.stream = static_cast<uint32_t>(stream);
  a.type = result_type(out, "out");
  a.draw = draw_of(seed, sample_ids, step, image.samples);
  a.out = out.mutable_data_ptr();
  if (out.numel() == 0) return;
  const OnDevice on(out);
  check_launch(launch_normal(a, on.stream()));
}

}  // namespace cuda
}  // namespace ddpm_fast
