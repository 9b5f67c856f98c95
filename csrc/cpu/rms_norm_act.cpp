// RMSNorm over the channels, scale and shift, and SiLU, forward and backward: reads the arguments and shares out the
// work.
#include <torch/csrc/stable/ops.h>

#include "kernels.h"
#include "norm_arguments.h"
#include "rms_norm_act.h"

#define DDPM_FAST_KERNELS "rms_norm_act_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

// weight * (1 + scale), and shift, as whole rows: one for all samples where there is no scale and no shift.
class Rows {
 public:
  Rows(const RmsNormAct& op)
      : stride_(op.scale.data || op.shift.data ? op.channels : 0),
        factor_((stride_ ? op.samples : 1) * op.channels),
        shift_(factor_.size()) {
    for (int64_t n = 0; n < (stride_ ? op.samples : 1); ++n) {
      const float *const scale = op.scale.row(n), *const shift = op.shift.row(n);
      for (int64_t c = 0; c < op.channels; ++c) {
        const double weight = op.weight.data ? op.weight.data[c] : 1.0;
        factor_[n * op.channels + c] = static_cast<float>(scale ? weight * (1.0 + scale[c]) : weight);
        shift_[n * op.channels + c] = shift ? shift[c] : 0.0f;
      }
    }
  }
  RmsChannels of(int64_t sample) const { return {&factor_[sample * stride_], &shift_[sample * stride_]}; }

 private:
  int64_t stride_;
  std::vector<float> factor_, shift_;
};

RmsNormAct describe(const Tensor& x, const Image& image, Order order, double eps, int64_t activation,
                    const Parameter& weight, const Parameter& scale, const Parameter& shift) {
  STD_TORCH_CHECK(x.dim() >= 2 && image.channels > 0 && image.pixels > 0,
                  "x must be (N, C, *) with at least one channel and one pixel");
  return {image.samples,  image.channels, image.pixels, order, activation != 0, eps,
          weight.rows(), scale.rows(), shift.rows()};
}

float* factors(const Tensor& tensor, const RmsNormAct& op) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.is_cpu() &&
                      tensor.numel() == op.samples * op.pixels,
                  "rrms must be a contiguous float32 tensor (N, P)");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// work(unit, sample, chunk) for every chunk of every sample.
template <class Work> void for_each_chunk(const RmsNormAct& op, const Work& work) {
  const int64_t chunks = op.chunks(), size = op.channels * op.pixels_of(0);
  const int64_t grain = std::max<int64_t>(kGrain / size, 1);
  torch::stable::parallel_for(0, op.samples * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) work(unit, unit / chunks, unit % chunks);
  });
}

template <class T>
void forward(const RmsNormAct& op, const Image& x_image, const Image& out_image, const Tensor& x_, const Tensor& out_,
             float* rrms) {
  const T* const x = static_cast<const T*>(x_.const_data_ptr());
  T* const out = static_cast<T*>(out_.mutable_data_ptr());
  const Rows rows(op);
  for_each_chunk(op, [&](int64_t, int64_t n, int64_t chunk) {
    float own[RmsNormAct::kChunk];
    const int64_t offset = op.offset(op.pixel(chunk));
    DDPM_FAST_DISPATCH(rms_apply<T>)
    (op, x + n * x_image.sample_stride + offset, out + n * out_image.sample_stride + offset, op.pixels_of(chunk),
     rows.of(n), rrms ? rrms + n * op.pixels + op.pixel(chunk) : own);
  });
}

template <class T>
void backward(const RmsNormAct& op, const Image& grad_out_image, const Image& x_image,
              const std::optional<Image>& grad_x_image, const Tensor& grad_out_, const Tensor& x_,
              const Optional& grad_x_, const float* rrms, float* grad_weight, float* grad_scale, float* grad_shift) {
  const T* const grad_out = static_cast<const T*>(grad_out_.const_data_ptr());
  const T* const x = static_cast<const T*>(x_.const_data_ptr());
  T* const grad_x = grad_x_ ? static_cast<T*>(grad_x_->mutable_data_ptr()) : nullptr;
  const int64_t grad_x_stride = grad_x_image ? grad_x_image->sample_stride : 0;
  const Rows rows(op);
  const int64_t chunks = op.chunks();
  std::vector<float> sums(op.samples * chunks * 2 * op.channels);
  for_each_chunk(op, [&](int64_t unit, int64_t n, int64_t chunk) {
    const int64_t offset = op.offset(op.pixel(chunk));
    std::vector<float> scratch(op.channels * (op.order == Order::kChannelsFirst ? 64 : 1));
    float* const own = &sums[unit * 2 * op.channels];
    DDPM_FAST_DISPATCH(rms_backward<T>)
    (op, grad_out + n * grad_out_image.sample_stride + offset, x + n * x_image.sample_stride + offset,
     grad_x ? grad_x + n * grad_x_stride + offset : nullptr, op.pixels_of(chunk),
     rrms + n * op.pixels + op.pixel(chunk), rows.of(n), RmsSums{own, own + op.channels}, scratch.data());
  });
  // The chunks' sums in order, in float64.
  for (int64_t c = 0; c < op.channels; ++c) {
    const double weight = op.weight.data ? op.weight.data[c] : 1.0;
    double weight_sum = 0;
    for (int64_t n = 0; n < op.samples; ++n) {
      double gradient = 0, product = 0;
      for (int64_t i = 0; i < chunks; ++i) {
        const float* const part = &sums[(n * chunks + i) * 2 * op.channels + c];
        gradient += part[0];
        product += part[op.channels];
      }
      const int64_t at = n * op.channels + c;
      if (grad_scale) grad_scale[at] = static_cast<float>(weight * product);
      if (grad_shift) grad_shift[at] = static_cast<float>(gradient);
      weight_sum += product * (op.scale.data ? 1.0 + op.scale.row(n)[c] : 1.0);
    }
    if (grad_weight) grad_weight[c] = static_cast<float>(weight_sum);
  }
}

template <class Run> void dispatch(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
  }
}

}  // namespace

void rms_norm_act(Tensor x, Optional weight_, Optional scale_, Optional shift_, double eps, int64_t activation,
                  Tensor out, Optional rrms) {
  const Image x_image = dense_image_of(x, "x"), out_image = image_like(out, x, "out");
  const Parameter weight(weight_, false, x, "weight"), scale(scale_, true, x, "scale"), shift(shift_, true, x, "shift");
  const RmsNormAct op =
      describe(x, x_image, common_order({&x_image, &out_image}), eps, activation, weight, scale, shift);
  float* const factor = rrms ? factors(*rrms, op) : nullptr;
  dispatch(x.scalar_type(),
           [&](auto kind) { forward<decltype(kind)>(op, x_image, out_image, x, out, factor); });
}

void rms_norm_act_backward(Tensor grad_out, Tensor x, Tensor rrms, Optional weight_, Optional scale_, Optional shift_,
                           double eps, int64_t activation, Optional grad_x, Optional grad_weight, Optional grad_scale,
                           Optional grad_shift) {
  const Image x_image = dense_image_of(x, "x"), grad_out_image = image_like(grad_out, x, "grad_out");
  std::optional<Image> grad_x_image;
  if (grad_x) grad_x_image = image_like(*grad_x, x, "grad_x");
  const Order order = common_order({&x_image, &grad_out_image, grad_x_image ? &*grad_x_image : &x_image});
  const Parameter weight(weight_, false, x, "weight"), scale(scale_, true, x, "scale"), shift(shift_, true, x, "shift");
  const RmsNormAct op = describe(x, x_image, order, eps, activation, weight, scale, shift);
  const float* const factor = factors(rrms, op);
  const int64_t rows = op.samples * op.channels;
  float *const weight_out = gradient(grad_weight, op.channels, "grad_weight"),
               *const scale_out = gradient(grad_scale, rows, "grad_scale"),
               *const shift_out = gradient(grad_shift, rows, "grad_shift");
  dispatch(x.scalar_type(), [&](auto kind) {
    backward<decltype(kind)>(op, grad_out_image, x_image, grad_x_image, grad_out, x, grad_x, factor, weight_out,
                             scale_out, shift_out);
  });
}

}  // namespace ddpm_fast
