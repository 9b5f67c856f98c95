#include "rms_norm_act.h"

#include "norm_arguments.h"
#include "ops.h"

namespace ddpm_fast {
namespace cuda {
namespace {

RmsNormActShape shape_of(const Tensor& x, const Image& image, Order order) {
  check_image(x, image);
  STD_TORCH_CHECK(image.channels <= kMostRmsChannels, "the CUDA backend normalises at most ", kMostRmsChannels,
                  " channels, not ", image.channels);
  return {image.samples, image.channels, image.pixels, order == Order::kChannelsLast, size_of(result_type(x, "x"))};
}

float* factors(const Optional& tensor, const RmsNormActShape& shape, const Tensor& x) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() && beside(*tensor, x) &&
                      tensor->numel() == shape.samples * shape.pixels,
                  "rrms must be a contiguous float32 tensor (N, P)");
  return static_cast<float*>(tensor->mutable_data_ptr());
}

}  // namespace

void rms_norm_act(Tensor x, Optional weight, Optional scale, Optional shift, double eps, int64_t activation, Tensor out,
                  Optional rrms) {
  const Image x_image = dense_image_of(x, "x"), out_image = image_like(out, x, "out");
  RmsNormActArguments a{};
  a.shape = shape_of(x, x_image, common_order({&x_image, &out_image}));
  a.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  a.x_stride = x_image.sample_stride;
  a.out_stride = out_image.sample_stride;
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.weight = parameter(weight, false, x, "weight");
  a.scale = parameter(scale, true, x, "scale");
  a.shift = parameter(shift, true, x, "shift");
  a.eps = eps;
  a.activation = activation != 0;
  a.rrms = factors(rrms, a.shape, x);
  const OnDevice on(x);
  check_launch(launch_rms_norm_act(a, on.stream()));
}

void rms_norm_act_backward(Tensor grad_out, Tensor x, Tensor rrms, Optional weight, Optional scale, Optional shift,
                           double eps, int64_t activation, Optional grad_x, Optional grad_weight, Optional grad_scale,
                           Optional grad_shift) {
  const Image x_image = dense_image_of(x, "x"), grad_out_image = image_like(grad_out, x, "grad_out");
  const Image grad_x_image = grad_x ? image_like(*grad_x, x, "grad_x") : x_image;
  RmsNormActBackwardArguments a{};
  a.shape = shape_of(x, x_image, common_order({&x_image, &grad_out_image, &grad_x_image}));
  a.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  a.grad_out_stride = grad_out_image.sample_stride;
  a.x_stride = x_image.sample_stride;
  a.grad_x_stride = grad_x_image.sample_stride;
  a.grad_out = grad_out.const_data_ptr();
  a.x = x.const_data_ptr();
  a.rrms = factors(rrms, a.shape, x);
  a.weight = parameter(weight, false, x, "weight");
  a.scale = parameter(scale, true, x, "scale");
  a.shift = parameter(shift, true, x, "shift");
  a.eps = eps;
  a.activation = activation != 0;
  if (grad_x) a.grad_x = grad_x->mutable_data_ptr();
  const int64_t channels = a.shape.channels, rows = a.shape.samples * channels;
  a.grad_weight = gradient(grad_weight, channels, x, "grad_weight");
  a.grad_scale = gradient(grad_scale, rows, x, "grad_scale");
  a.grad_shift = gradient(grad_shift, rows, x, "grad_shift");
  const OnDevice on(x);
  a.plan = plan_rms_norm_act(a.shape, norm_act_device().shared_bytes, 2);
  const Tensor memory = workspace(x, rms_norm_act_backward_workspace(a.shape, a.plan));
  a.workspace = memory.mutable_data_ptr();
  check_launch(launch_rms_norm_act_backward(a, on.stream()));
}

}  // namespace cuda
}  // namespace ddpm_fast
