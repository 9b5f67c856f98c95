#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#include "ops.h"
#include "tensors.h"

namespace ddpm_fast {
namespace cuda {

void denoise(Tensor x_t, Tensor model_output, std::optional<Tensor> unconditional, Tensor coefficients, Tensor index,
             int64_t prediction, int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high,
             std::optional<Tensor> threshold, std::optional<Tensor> noise, std::optional<Tensor> seed,
             std::optional<Tensor> sample_ids, int64_t stream, Tensor out, std::optional<Tensor> x0_out) {
  const Image image = dense_image_of(x_t, "x_t");
  const int64_t samples = image.samples;
  STD_TORCH_CHECK(x_t.scalar_type() == ScalarType::Float, "x_t must be float32");
  const bool learned = variance != 0;
  Image outputs = image;
  outputs.channels *= learned ? 2 : 1;
  const auto source_of = [&](const Tensor& tensor, const Image& shape, const char* name) {
    const Source source(tensor, name);
    STD_TORCH_CHECK(source.type != ScalarType::Byte, name, " must be float32, float16 or bfloat16");
    check_shape(source.image, shape, name);
    return source;
  };

  DenoiseArguments a{};
  DenoiseLayout& layout = a.layout;
  layout.target = target_of(image);
  layout.x_t = view_of(Source(x_t, "x_t"), image);
  a.x_t = static_cast<const float*>(x_t.const_data_ptr());
  const Source output = source_of(model_output, outputs, "model_output");
  layout.output = view_of(output, image);
  a.output = output.data;
  a.variance = learned ? output.from_channel(image.channels).data : output.data;
  if (unconditional) {
    const Source source = source_of(*unconditional, outputs, "unconditional");
    layout.unconditional = view_of(source, image);
    a.unconditional = source.data;
  }
  if (noise) {
    const Source source = source_of(*noise, image, "noise");
    layout.noise = view_of(source, image);
    a.noise = source.data;
  }

  const PerSample rows = per_sample(index, samples, "index");
  a.coefficients = table(coefficients, 8, "coefficients");
  a.index = rows.data;
  layout.rows = coefficients.size(0);
  layout.index_stride = static_cast<int>(rows.stride);
  layout.prediction = static_cast<int>(prediction);
  layout.variance = static_cast<int>(variance);
  layout.clip = clip_low.has_value();
  layout.clip_low = static_cast<float>(clip_low.value_or(0));
  layout.clip_high = static_cast<float>(clip_high.value_or(0));
  if (threshold) {
    STD_TORCH_CHECK(threshold->scalar_type() == ScalarType::Float && threshold->numel() == samples &&
                        threshold->is_contiguous(),
                    "threshold must be a contiguous float32 tensor of ", samples, " elements");
    a.threshold = static_cast<const float*>(threshold->const_data_ptr());
  }
  STD_TORCH_CHECK(!noise || !seed, "noise is given or drawn from a seed, not both");
  if (seed) a.draw = draw_of(*seed, sample_ids, index, samples);
  layout.stream = static_cast<uint32_t>(stream);
  a.out = static_cast<float*>(twin_data(out, image, ScalarType::Float, "out"));
  if (x0_out) a.x0_out = static_cast<float*>(twin_data(*x0_out, image, ScalarType::Float, "x0_out"));
  if (x_t.numel() == 0) return;
  const OnDevice on(x_t);
  check_launch(launch_denoise(a, on.stream()));
}

}  // namespace cuda
}  // namespace ddpm_fast
