#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace ddpm_fast {
namespace cuda {
namespace {

// What the two ops share.
NoisingArguments common(const Tensor& x0, const Tensor& t, const Tensor& coefficients, const Tensor& out,
                        const Image& image) {
  const Source source(x0, "x0");
  check_shape(source.image, image, "x0");
  STD_TORCH_CHECK(source.type != ScalarType::Byte || out.scalar_type() == ScalarType::Float,
                  "out must be float32 where x0 is uint8");
  const PerSample rows = per_sample(t, image.samples, "t");
  NoisingArguments a{};
  a.layout.target = target_of(image);
  a.layout.x0 = view_of(source, image);
  a.layout.rows = coefficients.size(0);
  a.layout.t_stride = static_cast<int>(rows.stride);
  a.type = result_type(out, "out");
  a.x0 = source.data;
  a.coefficients = table(coefficients, 2, "coefficients");
  a.t = rows.data;
  a.out = out.mutable_data_ptr();
  return a;
}

void run(const NoisingArguments& arguments, const Tensor& out) {
  if (out.numel() == 0) return;
  const OnDevice on(out);
  check_launch(launch_noising(arguments, on.stream()));
}

}  // namespace

void noising(Tensor x0, Tensor t, Tensor coefficients, Tensor noise, Tensor out) {
  const Image image = dense_image_of(out, "out");
  NoisingArguments a = common(x0, t, coefficients, out, image);
  const Source source(noise, "noise");
  STD_TORCH_CHECK(source.type != ScalarType::Byte, "noise must be float32, float16 or bfloat16");
  check_shape(source.image, image, "noise");
  a.noise = source.data;
  a.layout.noise = view_of(source, image);
  run(a, out);
}

void noising_random(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids,
                    Tensor step, int64_t stream, Tensor out, Tensor noise) {
  const Image image = dense_image_of(out, "out");
  NoisingArguments a = common(x0, t, coefficients, out, image);
  a.draw = draw_of(seed, sample_ids, step, image.samples);
  a.layout.step_stride = static_cast<int>(per_sample(step, image.samples, "step").stride);
  a.layout.stream = static_cast<uint32_t>(stream);
  a.noise_out = twin_data(noise, image, out.scalar_type(), "noise");
  run(a, out);
}

}  // namespace cuda
}  // namespace ddpm_fast
