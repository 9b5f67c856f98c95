#include "arguments.h"

#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

namespace ddpm_fast {

Source::Source(const Tensor& tensor, const char* name)
    : data(tensor.const_data_ptr()), type(tensor.scalar_type()), image(image_of(tensor, name)) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16 ||
                      type == ScalarType::Byte,
                  name, " has a dtype that the kernels do not read");
}

Source Source::from_channel(int64_t channel) const {
  const int64_t element = type == ScalarType::Float ? 4 : type == ScalarType::Byte ? 1 : 2;
  Source rest = *this;
  rest.data = static_cast<const char*>(data) + channel * image.channel_stride * element;
  return rest;
}

PerSample per_sample(const Tensor& tensor, int64_t samples, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name,
                  " must be a contiguous int64 tensor");
  const int64_t n = tensor.numel();
  STD_TORCH_CHECK(n == 1 || n == samples, name, " has ", n, " elements; 1 or ", samples, " are allowed");
  return {static_cast<const int64_t*>(tensor.const_data_ptr()), n == 1 ? 0 : 1};
}

PerSample rows(const Tensor& tensor, int64_t samples, int64_t count, const char* name) {
  const PerSample values = per_sample(tensor, samples, name);
  for (int64_t n = 0; n < (values.stride ? samples : 1); ++n)
    STD_TORCH_CHECK(0 <= values[n] && values[n] < count, name, " must lie in [0, ", count, "), not ", values[n]);
  return values;
}

float* per_sample_result(const Tensor& tensor, int64_t samples, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 1 && tensor.numel() == samples &&
                      tensor.is_contiguous(),
                  name, " must be a contiguous float32 tensor of ", samples, " elements");
  return static_cast<float*>(tensor.mutable_data_ptr());
}

const float* table(const Tensor& tensor, int64_t columns, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 2 && tensor.size(1) == columns &&
                      tensor.is_contiguous(),
                  name, " must be a contiguous float32 tensor of ", columns, " columns");
  return static_cast<const float*>(tensor.const_data_ptr());
}

void check_shape(const Image& image, const Image& expected, const char* name) {
  STD_TORCH_CHECK(image.samples == expected.samples && image.channels == expected.channels &&
                      image.pixels == expected.pixels,
                  name, " has ", image.samples, " samples of ", image.channels, " channels of ", image.pixels,
                  " pixels; expected are ", expected.samples, ", ", expected.channels, " and ", expected.pixels);
}

Draw::Draw(const Tensor& seed, const std::optional<Tensor>& sample_ids, const Tensor& step, int64_t stream_,
           int64_t samples)
    : stream(static_cast<uint32_t>(stream_)), steps(per_sample(step, samples, "step")) {
  const uint64_t key = static_cast<uint64_t>(per_sample(seed, 1, "seed")[0]);
  key_low = static_cast<uint32_t>(key);
  key_high = static_cast<uint32_t>(key >> 32);
  if (sample_ids) {
    STD_TORCH_CHECK(sample_ids->numel() == samples, "sample_ids has ", sample_ids->numel(), " elements for ", samples,
                    " samples");
    ids = per_sample(*sample_ids, samples, "sample_ids");
  }
}

}  // namespace ddpm_fast
