// The distance of a network's output from its target, whose noise is given or drawn again, and the gradient.
#include <torch/csrc/stable/tensor_inl.h>

#include <vector>

#include "arguments.h"
#include "image.h"
#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace {

enum Distance { kSquare, kAbsolute, kHuber };

struct TargetLoss {
  Image image;  // the order in which all tiles are read, and the gradient written
  Source output, x0, noise;
  const float* coefficients;
  PerSample t;
  const Draw* draw;  // null where the noise is given
  int distance;
};

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "target_loss_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

using Optional = std::optional<Tensor>;

TargetLoss describe(const Image& image, const Tensor& output, const Tensor& x0, const Tensor& t,
                    const Tensor& coefficients, const Optional& noise, const Draw* draw, int64_t distance) {
  TargetLoss op{image,
                Source(output, "output"),
                Source(x0, "x0"),
                {},
                table(coefficients, 2, "coefficients"),
                rows(t, image.samples, coefficients.size(0), "t"),
                draw,
                static_cast<int>(distance)};
  STD_TORCH_CHECK(noise.has_value() != (draw != nullptr), "either noise or seed must be given");
  if (noise) {
    op.noise = Source(*noise, "noise");
    check_shape(op.noise.image, image, "noise");
  }
  check_shape(op.output.image, image, "output");
  check_shape(op.x0.image, image, "x0");
  return op;
}

std::optional<Draw> draw_of(const Optional& seed, const Optional& sample_ids, const Tensor& step, int64_t stream,
                            int64_t samples) {
  std::optional<Draw> draw;
  if (seed) draw.emplace(*seed, sample_ids, step, stream, samples);
  return draw;
}

}  // namespace

void target_loss(Tensor output, Tensor x0, Tensor t, Tensor coefficients, Optional noise, Optional seed,
                 Optional sample_ids, Tensor step, int64_t stream, int64_t distance, Tensor out) {
  const Image own = image_of(output, "output");
  const Image image = own.dense() ? own : dense_image_of(x0, "x0");
  const std::optional<Draw> draw = draw_of(seed, sample_ids, step, stream, image.samples);
  const TargetLoss op = describe(image, output, x0, t, coefficients, noise, draw ? &*draw : nullptr, distance);
  float* const losses = per_sample_result(out, image.samples, "out");
  const Tiles tiles(image);
  std::vector<double> sums(tiles.total());
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(distance_tiles)(op, tiles, begin, end, sums.data());
  });
  const double elements = static_cast<double>(image.size());
  for (int64_t n = 0; n < image.samples; ++n) losses[n] = static_cast<float>(tiles.sum(sums.data(), n) / elements);
}

namespace {

template <class T>
void backward(const TargetLoss& op, const float* grad_losses, const Tensor& grad_output) {
  const Tiles tiles(op.image);
  T* const to = static_cast<T*>(grad_output.mutable_data_ptr());
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(slope_tiles<T>)(to, op, grad_losses, tiles, begin, end);
  });
}

}  // namespace

void target_loss_backward(Tensor grad_losses, Tensor output, Tensor x0, Tensor t, Tensor coefficients, Optional noise,
                          Optional seed, Optional sample_ids, Tensor step, int64_t stream, int64_t distance,
                          Tensor grad_output) {
  const Image image = dense_image_of(grad_output, "grad_output");
  const std::optional<Draw> draw = draw_of(seed, sample_ids, step, stream, image.samples);
  const TargetLoss op = describe(image, output, x0, t, coefficients, noise, draw ? &*draw : nullptr, distance);
  const float* const grads = per_sample_result(grad_losses, image.samples, "grad_losses");
  switch (grad_output.scalar_type()) {
    case ScalarType::Float: return backward<float>(op, grads, grad_output);
    case ScalarType::Half: return backward<Half>(op, grads, grad_output);
    case ScalarType::BFloat16: return backward<BFloat16>(op, grads, grad_output);
    default: STD_TORCH_CHECK(false, "grad_output must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpm_fast
