// GroupNorm, scale and shift, and SiLU, forward and backward: reads the arguments and shares out the work.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

#include <type_traits>
#include <vector>

#include "arguments.h"
#include "kernels.h"
#include "norm_act.h"
#include "norm_arguments.h"

#define DDPM_FAST_KERNELS "norm_act_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

struct Parameters {
  Parameters(const Tensor& x, const Optional& weight_, const Optional& bias_, const Optional& scale_,
             const Optional& shift_, const Optional& embedding_)
      : weight(weight_, false, x, "weight"),
        bias(bias_, false, x, "bias"),
        scale(scale_, true, x, "scale"),
        shift(shift_, true, x, "shift"),
        embedding(embedding_, true, x, "embedding") {}
  Parameter weight, bias, scale, shift, embedding;
};

NormAct describe(const Tensor& x, const Image& image, Order order, int64_t num_groups, int64_t activation,
                 const Parameters& parameters) {
  STD_TORCH_CHECK(x.dim() >= 2 && image.channels > 0 && image.pixels > 0,
                  "x must be (N, C, *) with at least one channel and one pixel");
  STD_TORCH_CHECK(num_groups >= 1 && image.channels % num_groups == 0, "num_groups must divide x's ", image.channels,
                  " channels, not be ", num_groups);
  return {image.samples, image.channels, image.pixels, num_groups, order, activation != 0, parameters.weight.rows(),
          parameters.bias.rows(), parameters.scale.rows(), parameters.shift.rows(), parameters.embedding.rows()};
}

double* statistics(const Tensor& tensor, const NormAct& op, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Double && tensor.is_contiguous() && tensor.is_cpu() &&
                      tensor.numel() == op.samples * op.groups,
                  name, " must be a contiguous float64 tensor (N, G)");
  return static_cast<double*>(tensor.mutable_data_ptr());
}

// Where a unit begins in a tensor whose samples are `stride` apart.
int64_t unit_offset(const NormAct& op, int64_t unit, int64_t stride) {
  if (op.order == Order::kChannelsLast) return unit * stride;
  return unit / op.groups * stride + unit % op.groups * op.group_size();
}

// Works through units of two passes, `first` over all parts of a unit before `second` over any, with `between`
// in between. Units go to the threads whole, so that the second pass finds them in the cache, unless they are too
// few for that. first(unit, begin, end) and second(unit, begin, end) take ranges of the unit's parts.
template <class First, class Between, class Second>
void two_passes(int64_t units, int64_t unit_size, int64_t first_parts, int64_t second_parts, const First& first,
                const Between& between, const Second& second) {
  const int64_t threads = torch::stable::get_num_threads();
  if (threads == 1 || units % threads == 0 || units >= 4 * threads || units * unit_size < 2 * kGrain) {
    torch::stable::parallel_for(0, units, std::max<int64_t>(kGrain / unit_size, 1), [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        first(unit, 0, first_parts);
        between(unit);
        second(unit, 0, second_parts);
      }
    });
    return;
  }
  const auto spread = [&](int64_t parts, const auto& pass) {
    const int64_t grain = std::max<int64_t>(kGrain * parts / unit_size, 1);
    torch::stable::parallel_for(0, units * parts, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t unit = begin / parts, from = begin % parts, to = std::min(parts, from + end - begin);
        pass(unit, from, to);
        begin += to - from;
      }
    });
  };
  spread(first_parts, first);
  for (int64_t unit = 0; unit < units; ++unit) between(unit);
  spread(second_parts, second);
}

template <class T>
void forward(const NormAct& op, double eps, const Image& x_image, const Image& out_image, const Tensor& x_,
             const Tensor& out_, double* mean, double* rstd) {
  const T* const x = static_cast<const T*>(x_.const_data_ptr());
  T* const out = static_cast<T*>(out_.mutable_data_ptr());
  const bool channels_first = op.order == Order::kChannelsFirst;
  const Pieces pieces = op.embedding.data ? Pieces(op.width(), op.pixels) : Pieces(1, op.group_size());
  const Chunks chunks(op);
  const int64_t units = op.units(), groups = channels_first ? 1 : op.groups;
  const int64_t parts = channels_first ? pieces.count() : chunks.count();
  const int64_t apply = channels_first ? Pieces(op.width(), op.pixels).count() : parts;
  const auto part_size = [&](int64_t part) {
    return static_cast<double>(channels_first ? pieces.channels(part) * pieces.pixels(part)
                                              : op.width() * chunks.pixels(part));
  };
  std::vector<Moments> moments(units * parts * groups);
  two_passes(
      units, op.samples * op.channels * op.pixels / units, parts, apply,
      [&](int64_t unit, int64_t begin, int64_t end) {
        DDPM_FAST_DISPATCH(part_moments<T>)
        (op, x + unit_offset(op, unit, x_image.sample_stride), unit, begin, end, &moments[unit * parts * groups]);
      },
      [&](int64_t unit) {
        for (int64_t g = 0; g < groups; ++g) {
          const Moments* const part = &moments[unit * parts * groups + g];
          Moments all = part[0];
          double count = part_size(0);
          for (int64_t i = 1; i < parts; ++i) {
            merge(all, count, part[i * groups], part_size(i));
            count += part_size(i);
          }
          mean[unit * groups + g] = all.mean;
          rstd[unit * groups + g] = 1.0 / std::sqrt(all.deviation / count + eps);
        }
      },
      [&](int64_t unit, int64_t begin, int64_t end) {
        DDPM_FAST_DISPATCH(apply_parts<T>)
        (op, x + unit_offset(op, unit, x_image.sample_stride), out + unit_offset(op, unit, out_image.sample_stride),
         unit, begin, end, mean + unit * groups, rstd + unit * groups);
      });
}

// The gradients of the parameters, float32, from the channels' sums; each is written where its pointer is not null.
struct ParameterGradients {
  float *weight, *bias, *scale, *shift, *embedding;
};

void parameter_gradients(const NormAct& op, const ChannelSums* sums, const double* mean, const double* rstd,
                         const Along* along, const ParameterGradients& out) {
  std::vector<double> weight_sums(op.channels), bias_sums(op.channels);
  const double pixels = static_cast<double>(op.pixels);
  for (int64_t group = 0; group < op.samples * op.groups; ++group) {
    const int64_t n = group / op.groups, first = group % op.groups * op.width();
    for (int64_t c = first; c < first + op.width(); ++c) {
      const int64_t at = n * op.channels + c;
      const ChannelSums& sum = sums[at];
      const double product = xhat_product(sum, mean[group], rstd[group]);
      const double weight = op.weight.data ? op.weight.data[c] : 1.0, bias = op.bias.data ? op.bias.data[c] : 0.0;
      const double one_plus_scale = op.scale.data ? 1.0 + op.scale.row(n)[c] : 1.0;
      weight_sums[c] += one_plus_scale * product;
      bias_sums[c] += one_plus_scale * sum.gradient;
      if (out.scale) out.scale[at] = static_cast<float>(weight * product + bias * sum.gradient);
      if (out.shift) out.shift[at] = static_cast<float>(sum.gradient);
      if (out.embedding)
        out.embedding[at] = static_cast<float>(
            rstd[group] * (weight * one_plus_scale * sum.gradient - pixels * along[group].mean -
                           along[group].xhat * xhat_sum(sum, pixels, mean[group], rstd[group])));
    }
  }
  for (int64_t c = 0; c < op.channels; ++c) {
    if (out.weight) out.weight[c] = static_cast<float>(weight_sums[c]);
    if (out.bias) out.bias[c] = static_cast<float>(bias_sums[c]);
  }
}

template <class T>
void backward(const NormAct& op, const Image& grad_out_image, const Image& x_image,
              const std::optional<Image>& grad_x_image, const Tensor& grad_out_, const Tensor& x_,
              const Optional& grad_x_, const double* mean, const double* rstd, const ParameterGradients& gradients) {
  const T* const grad_out = static_cast<const T*>(grad_out_.const_data_ptr());
  const T* const x = static_cast<const T*>(x_.const_data_ptr());
  T* const grad_x = grad_x_ ? static_cast<T*>(grad_x_->mutable_data_ptr()) : nullptr;
  const int64_t grad_x_stride = grad_x_image ? grad_x_image->sample_stride : 0;
  const bool channels_first = op.order == Order::kChannelsFirst;
  const int64_t units = op.units(), groups = channels_first ? 1 : op.groups;
  const int64_t channels = op.channels * op.samples / units;  // of a unit
  const int64_t parts = channels_first ? op.width() : Chunks(op).count();
  // With channels last the sums of every chunk come apart, and are added up in order.
  std::vector<ChannelSums> sums(op.samples * op.channels);
  std::vector<ChannelSums> chunk_sums(channels_first ? 0 : units * parts * channels);
  std::vector<Along> along(op.samples * op.groups);
  const auto grad_x_of = [&](int64_t unit) {
    return grad_x ? grad_x + unit_offset(op, unit, grad_x_stride) : nullptr;
  };
  two_passes(
      units, channels * op.pixels, parts, parts,
      [&](int64_t unit, int64_t begin, int64_t end) {
        DDPM_FAST_DISPATCH(part_sums<T>)
        (op, grad_out + unit_offset(op, unit, grad_out_image.sample_stride),
         x + unit_offset(op, unit, x_image.sample_stride), grad_x_of(unit), unit, begin, end, mean + unit * groups,
         rstd + unit * groups, channels_first ? &sums[unit * channels] : &chunk_sums[unit * parts * channels]);
      },
      [&](int64_t unit) {
        ChannelSums* const sum = &sums[unit * channels];
        if (!channels_first)
          for (int64_t part = unit * parts; part < (unit + 1) * parts; ++part)
            for (int64_t c = 0; c < channels; ++c) sum[c] += chunk_sums[part * channels + c];
        const double size = static_cast<double>(op.group_size());
        const int64_t sample = unit * channels / op.channels;
        const float *const weight = op.weight.data, *const scale = op.scale.row(sample);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t group = unit * groups + g, channel = group % op.groups * op.width();
          ChannelSums of_xhat;
          for (int64_t c = 0; c < op.width(); ++c) {
            const double factor = (weight ? weight[channel + c] : 1.0) * (scale ? 1.0 + scale[channel + c] : 1.0);
            of_xhat.gradient += factor * sum[g * op.width() + c].gradient;
            of_xhat.product += factor * sum[g * op.width() + c].product;
          }
          along[group] = {of_xhat.gradient / size, xhat_product(of_xhat, mean[group], rstd[group]) / size};
        }
      },
      [&](int64_t unit, int64_t begin, int64_t end) {
        if (grad_x == nullptr) return;
        DDPM_FAST_DISPATCH(gradient_parts<T>)
        (op, grad_out + unit_offset(op, unit, grad_out_image.sample_stride),
         x + unit_offset(op, unit, x_image.sample_stride), grad_x_of(unit), unit, begin, end, mean + unit * groups,
         rstd + unit * groups, &along[unit * groups]);
      });
  parameter_gradients(op, sums.data(), mean, rstd, along.data(), gradients);
}

}  // namespace

void norm_act(Tensor x, int64_t num_groups, Optional weight, Optional bias, Optional scale, Optional shift,
              Optional embedding, double eps, int64_t activation, Tensor out, Optional mean, Optional rstd) {
  const Image x_image = dense_image_of(x, "x"), out_image = image_like(out, x, "out");
  const Parameters parameters(x, weight, bias, scale, shift, embedding);
  const NormAct op =
      describe(x, x_image, common_order({&x_image, &out_image}), num_groups, activation, parameters);
  if (op.samples == 0) return;
  std::vector<double> own(mean && rstd ? 0 : 2 * op.samples * op.groups);
  double* const means = mean ? statistics(*mean, op, "mean") : own.data();
  double* const rstds = rstd ? statistics(*rstd, op, "rstd") : own.data() + op.samples * op.groups;
  switch (x.scalar_type()) {
    case ScalarType::Float: return forward<float>(op, eps, x_image, out_image, x, out, means, rstds);
    case ScalarType::Half: return forward<Half>(op, eps, x_image, out_image, x, out, means, rstds);
    case ScalarType::BFloat16: return forward<BFloat16>(op, eps, x_image, out_image, x, out, means, rstds);
    default: STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
  }
}

void norm_act_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups, Optional weight,
                       Optional bias, Optional scale, Optional shift, Optional embedding, int64_t activation,
                       Optional grad_x, Optional grad_weight, Optional grad_bias, Optional grad_scale,
                       Optional grad_shift, Optional grad_embedding) {
  const Image x_image = dense_image_of(x, "x"), grad_out_image = image_like(grad_out, x, "grad_out");
  std::optional<Image> grad_x_image;
  if (grad_x) grad_x_image = image_like(*grad_x, x, "grad_x");
  const Order order = common_order({&x_image, &grad_out_image, grad_x_image ? &*grad_x_image : &x_image});
  const Parameters parameters(x, weight, bias, scale, shift, embedding);
  const NormAct op = describe(x, x_image, order, num_groups, activation, parameters);
  const int64_t rows = op.samples * op.channels;
  const ParameterGradients gradients{gradient(grad_weight, op.channels, "grad_weight"),
                                     gradient(grad_bias, op.channels, "grad_bias"),
                                     gradient(grad_scale, rows, "grad_scale"),
                                     gradient(grad_shift, rows, "grad_shift"),
                                     gradient(grad_embedding, rows, "grad_embedding")};
  const double *const means = statistics(mean, op, "mean"), *const rstds = statistics(rstd, op, "rstd");
  const auto run = [&](auto kind) {
    backward<decltype(kind)>(op, grad_out_image, x_image, grad_x_image, grad_out, x, grad_x, means, rstds, gradients);
  };
  if (op.samples == 0) return parameter_gradients(op, nullptr, nullptr, nullptr, nullptr, gradients);
  switch (x.scalar_type()) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(Half{});
    case ScalarType::BFloat16: return run(BFloat16{});
    default: STD_TORCH_CHECK(false, "x must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpm_fast
