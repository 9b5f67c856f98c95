// The terms of the variational bound, and their gradient.
#include <torch/csrc/stable/tensor_inl.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "arguments.h"
#include "image.h"
#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace {

constexpr int kBoundColumns = 7;
constexpr double kLn2 = 0.6931471805599453;

struct Bound {
  Image image;  // the order in which all tiles are read
  Source x0, x_t, output, values;
  const float* coefficients;
  PerSample t;
  int prediction, variance;
  bool clip;
  float clip_low, clip_high;
};

// -log of a bin's probability under a normal distribution, in nats, and its derivatives with respect to the
// distribution's mean and log variance. ddpm_fast/backends/reference/bound.py has the formulas.
struct Decoder {
  double nll, by_mean, by_log_variance;
};

Decoder decode(double x0, double mean, double log_variance) {
  constexpr double s = 1.5957691216057308, c = 0.044715, half_bin = 1.0 / 255, edge = 0.999;
  constexpr double largest = 27.631021115928547;  // -log(1e-12)
  const double inverse = std::exp(-0.5 * log_variance);
  const double plus = inverse * (x0 - mean + half_bin), minus = inverse * (x0 - mean - half_bin);
  const double upper = s * (plus + c * plus * plus * plus), lower = s * (minus + c * minus * minus * minus);
  const bool first = x0 < -edge, last = x0 > edge;
  // softplus(x) = max(x, 0) + log(1 + exp(-|x|)), and its slope, from one exponential; the logarithms are taken together.
  const double upper_odds = std::exp(-std::abs(upper)), lower_odds = std::exp(-std::abs(lower));
  double nll = 0, factor = 1, by_upper = 0, by_lower = 0;
  if (!last) {
    nll += std::max(-upper, 0.0);
    factor *= 1 + upper_odds;
    by_upper -= (upper > 0 ? upper_odds : 1) / (1 + upper_odds);
  }
  if (!first) {
    nll += std::max(lower, 0.0);
    factor *= 1 + lower_odds;
    by_lower += (lower > 0 ? 1 : lower_odds) / (1 + lower_odds);
  }
  if (!first && !last) {
    const double width = s * 2 * half_bin * inverse * (1 + c * (plus * plus + plus * minus + minus * minus));
    const double inside = -std::expm1(-width);
    factor /= inside;
    by_upper -= (1 - inside) / inside;
    by_lower += (1 - inside) / inside;
  }
  nll += std::log(factor);
  if (nll >= largest) return {largest, 0, 0};
  const double by_plus = by_upper * s * (1 + 3 * c * plus * plus), by_minus = by_lower * s * (1 + 3 * c * minus * minus);
  return {nll, -inverse * (by_plus + by_minus), -0.5 * (plus * by_plus + minus * by_minus)};
}

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "bound_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

Bound describe(const Image& image, const Tensor& x0, const Tensor& x_t, const Tensor& model_output,
               const Tensor& coefficients, const Tensor& t, int64_t prediction, int64_t variance,
               std::optional<double> clip_low, std::optional<double> clip_high) {
  Bound op{};
  op.image = image;
  op.x0 = Source(x0, "x0");
  op.x_t = Source(x_t, "x_t");
  op.output = Source(model_output, "model_output");
  check_shape(op.x0.image, image, "x0");
  check_shape(op.x_t.image, image, "x_t");
  Image outputs = image;
  if (variance != generic::kFixed) {
    outputs.channels *= 2;
    op.values = op.output.from_channel(image.channels);
  }
  check_shape(op.output.image, outputs, "model_output");
  op.coefficients = table(coefficients, kBoundColumns, "coefficients");
  op.t = rows(t, image.samples, coefficients.size(0), "t");
  op.prediction = static_cast<int>(prediction);
  op.variance = static_cast<int>(variance);
  op.clip = clip_low.has_value();
  op.clip_low = static_cast<float>(clip_low.value_or(0));
  op.clip_high = static_cast<float>(clip_high.value_or(0));
  return op;
}

}  // namespace

void bound_terms(Tensor x0, Tensor x_t, Tensor model_output, Tensor coefficients, Tensor t, int64_t prediction,
                 int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high, Tensor bound,
                 Tensor x0_mse) {
  const Image image = dense_image_of(x_t, "x_t");
  const Bound op =
      describe(image, x0, x_t, model_output, coefficients, t, prediction, variance, clip_low, clip_high);
  float* const bounds = per_sample_result(bound, image.samples, "bound");
  float* const errors = per_sample_result(x0_mse, image.samples, "x0_mse");
  const Tiles tiles(image);
  std::vector<double> sums(2 * tiles.total());
  double *const bound_sums = sums.data(), *const error_sums = sums.data() + tiles.total();
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(bound_tiles)(op, tiles, begin, end, bound_sums, error_sums);
  });
  const double elements = static_cast<double>(image.size());
  for (int64_t n = 0; n < image.samples; ++n) {
    bounds[n] = static_cast<float>(tiles.sum(bound_sums, n) / (elements * kLn2));
    errors[n] = static_cast<float>(tiles.sum(error_sums, n) / elements);
  }
}

namespace {

template <class T>
void backward(const Bound& op, const float* grad_bound, bool mean_gradient, const Image& grad_image,
              const Tensor& grad_output) {
  const Tiles tiles(op.image);
  T* const to = static_cast<T*>(grad_output.mutable_data_ptr());
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(bound_slope_tiles<T>)
    (to, grad_image.sample_stride, op, grad_bound, mean_gradient, tiles, begin, end);
  });
}

}  // namespace

void bound_terms_backward(Tensor grad_bound, Tensor x0, Tensor x_t, Tensor model_output, Tensor coefficients, Tensor t,
                          int64_t prediction, int64_t variance, std::optional<double> clip_low,
                          std::optional<double> clip_high, bool mean_gradient, Tensor grad_output) {
  const Image grad_image = dense_image_of(grad_output, "grad_output");
  // The gradient's first half of the channels, in its order; with twice the channels that must be channels first.
  Image image = grad_image;
  if (variance != generic::kFixed) {
    STD_TORCH_CHECK(grad_image.channels_first(), "grad_output must be contiguous where it holds a variance");
    image.channels /= 2;
  }
  const Bound op =
      describe(image, x0, x_t, model_output, coefficients, t, prediction, variance, clip_low, clip_high);
  const float* const grads = per_sample_result(grad_bound, image.samples, "grad_bound");
  switch (grad_output.scalar_type()) {
    case ScalarType::Float: return backward<float>(op, grads, mean_gradient, grad_image, grad_output);
    case ScalarType::Half: return backward<Half>(op, grads, mean_gradient, grad_image, grad_output);
    case ScalarType::BFloat16: return backward<BFloat16>(op, grads, mean_gradient, grad_image, grad_output);
    default: STD_TORCH_CHECK(false, "grad_output must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpm_fast
