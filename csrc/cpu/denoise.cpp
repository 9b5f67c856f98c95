#include <torch/csrc/stable/tensor_inl.h>

#include "arguments.h"
#include "image.h"
#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace {

constexpr int kStepColumns = 8;

struct Denoise {
  Image image;  // of x_t, and of everything written
  Source x_t, output, unconditional, variance_output, noise;
  const float* coefficients;
  PerSample index;
  int prediction, variance;
  bool clip;
  float clip_low, clip_high;
  const float* threshold;  // null, or one for each sample
  const Draw* draw;        // null where the noise is given, or absent
  float* out;
  float* x0_out;  // null where it is not wanted
};

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "denoise_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

// A float32 tensor that the kernel writes in the order of `image`.
float* result(const Tensor& tensor, const Image& image, const char* name) {
  const Image own = image_of(tensor, name);
  check_shape(own, image, name);
  const bool same = tensor.scalar_type() == ScalarType::Float && own.sample_stride == image.sample_stride &&
                    (image.order() == Order::kChannelsFirst ? own.channels_first() : own.channels_last());
  STD_TORCH_CHECK(same, name, " must be float32 and laid out as x_t is");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace

void denoise(Tensor x_t, Tensor model_output, std::optional<Tensor> unconditional, Tensor coefficients, Tensor index,
             int64_t prediction, int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high,
             std::optional<Tensor> threshold, std::optional<Tensor> noise, std::optional<Tensor> seed,
             std::optional<Tensor> sample_ids, int64_t stream, Tensor out, std::optional<Tensor> x0_out) {
  Denoise op{};
  op.image = dense_image_of(x_t, "x_t");
  const int64_t samples = op.image.samples;
  const bool learned = variance != generic::kFixed;

  op.x_t = Source(x_t, "x_t");
  Image outputs = op.image;
  outputs.channels *= learned ? 2 : 1;
  const auto read_output = [&](const Tensor& tensor, const char* name) {
    Source source(tensor, name);
    check_shape(source.image, outputs, name);
    return source;
  };
  op.output = read_output(model_output, "model_output");
  if (learned) op.variance_output = op.output.from_channel(op.image.channels);
  if (unconditional) op.unconditional = read_output(*unconditional, "unconditional");
  if (noise) {
    op.noise = Source(*noise, "noise");
    check_shape(op.noise.image, op.image, "noise");
  }

  op.coefficients = table(coefficients, kStepColumns, "coefficients");
  op.index = rows(index, samples, coefficients.size(0), "index");
  op.prediction = static_cast<int>(prediction);
  op.variance = static_cast<int>(variance);
  op.clip = clip_low.has_value();
  op.clip_low = static_cast<float>(clip_low.value_or(0));
  op.clip_high = static_cast<float>(clip_high.value_or(0));
  if (threshold) {
    STD_TORCH_CHECK(threshold->scalar_type() == ScalarType::Float && threshold->numel() == samples &&
                        threshold->is_contiguous(),
                    "threshold must be a contiguous float32 tensor of ", samples, " elements");
    op.threshold = static_cast<const float*>(threshold->const_data_ptr());
  }
  std::optional<Draw> draw;
  if (seed) draw.emplace(*seed, sample_ids, index, stream, samples);
  op.draw = draw ? &*draw : nullptr;
  op.out = result(out, op.image, "out");
  op.x0_out = x0_out ? result(*x0_out, op.image, "x0_out") : nullptr;

  const Tiles tiles(op.image);
  tiles.parallel([&](int64_t begin, int64_t end) { DDPM_FAST_DISPATCH(denoise_tiles)(op, tiles, begin, end); });
}

}  // namespace ddpm_fast
