#include "norm_act.h"

#include "norm_arguments.h"
#include "ops.h"

namespace ddpm_fast {
namespace cuda {
namespace {

double* statistics(const Optional& tensor, const NormActShape& shape, const Tensor& x, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Double && tensor->is_contiguous() && beside(*tensor, x) &&
                      tensor->numel() == shape.samples * shape.groups,
                  name, " must be a contiguous float64 tensor (N, G)");
  return static_cast<double*>(tensor->mutable_data_ptr());
}

NormActShape shape_of(const Tensor& x, const Image& image, Order order, int64_t num_groups) {
  check_image(x, image);
  STD_TORCH_CHECK(num_groups >= 1 && image.channels % num_groups == 0, "num_groups must divide x's ", image.channels,
                  " channels, not be ", num_groups);
  const int element_size = size_of(result_type(x, "x"));
  return {image.samples, image.channels, image.pixels, num_groups, order == Order::kChannelsLast, element_size};
}

}  // namespace

void norm_act(Tensor x, int64_t num_groups, Optional weight, Optional bias, Optional scale, Optional shift,
              Optional embedding, double eps, int64_t activation, Tensor out, Optional mean, Optional rstd) {
  const Image x_image = dense_image_of(x, "x"), out_image = image_like(out, x, "out");
  NormActArguments a{};
  a.shape = shape_of(x, x_image, common_order({&x_image, &out_image}), num_groups);
  a.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  a.x_stride = x_image.sample_stride;
  a.out_stride = out_image.sample_stride;
  a.x = x.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.weight = parameter(weight, false, x, "weight");
  a.bias = parameter(bias, false, x, "bias");
  a.scale = parameter(scale, true, x, "scale");
  a.shift = parameter(shift, true, x, "shift");
  a.embedding = parameter(embedding, true, x, "embedding");
  a.eps = eps;
  a.activation = activation != 0;
  a.mean = statistics(mean, a.shape, x, "mean");
  a.rstd = statistics(rstd, a.shape, x, "rstd");
  if (a.shape.samples == 0) return;
  const OnDevice on(x);
  a.plan = plan_norm_act(a.shape, norm_act_device());
  std::optional<Tensor> memory;
  if (const int64_t bytes = norm_act_workspace(a.shape, a.plan); bytes > 0) {
    memory = workspace(x, bytes);
    a.workspace = memory->mutable_data_ptr();
  }
  check_launch(launch_norm_act(a, on.stream()));
}

void norm_act_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, Optional weight,
                       Optional bias, Optional scale, Optional shift, Optional embedding, int64_t activation,
                       Optional grad_x, Optional grad_weight, Optional grad_bias, Optional grad_scale,
                       Optional grad_shift, Optional grad_embedding) {
  const Image x_image = dense_image_of(x, "x"), grad_out_image = image_like(grad_out, x, "grad_out");
  const Image grad_x_image = grad_x ? image_like(*grad_x, x, "grad_x") : x_image;
  NormActBackwardArguments a{};
  a.shape = shape_of(x, x_image, common_order({&x_image, &grad_out_image, &grad_x_image}), num_groups);
  a.bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  a.grad_out_stride = grad_out_image.sample_stride;
  a.x_stride = x_image.sample_stride;
  a.grad_x_stride = grad_x_image.sample_stride;
  a.grad_out = grad_out.const_data_ptr();
  a.x = x.const_data_ptr();
  a.mean = statistics(mean, a.shape, x, "mean");
  a.rstd = statistics(rstd, a.shape, x, "rstd");
  a.weight = parameter(weight, false, x, "weight");
  a.bias = parameter(bias, false, x, "bias");
  a.scale = parameter(scale, true, x, "scale");
  a.shift = parameter(shift, true, x, "shift");
  a.embedding = parameter(embedding, true, x, "embedding");
  a.activation = activation != 0;
  if (grad_x) a.grad_x = grad_x->mutable_data_ptr();
  const int64_t channels = a.shape.channels, rows = a.shape.samples * channels;
  a.grad_weight = gradient(grad_weight, channels, x, "grad_weight");
  a.grad_bias = gradient(grad_bias, channels, x, "grad_bias");
  a.grad_scale = gradient(grad_scale, rows, x, "grad_scale");
  a.grad_shift = gradient(grad_shift, rows, x, "grad_shift");
  a.grad_embedding = gradient(grad_embedding, rows, x, "grad_embedding");
  const OnDevice on(x);
  a.plan = plan_norm_act_backward(a.shape, norm_act_device());
  const Tensor memory = workspace(x, norm_act_backward_workspace(a.shape, a.plan));
  a.workspace = memory.mutable_data_ptr();
  check_launch(launch_norm_act_backward(a, on.stream()));
}

}  // namespace cuda
}  // namespace ddpm_fast
