#include "tensors.h"

#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

// torch/csrc/inductor/aoti_torch/c/shim.h declares it to those alone who build with a CUDA torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace ddpm_fast {
namespace cuda {

OnDevice::OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_));
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, "CUDA: ", error); }

Type type_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::Half: return kFloat16;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Byte: return kUint8;
    default: STD_TORCH_CHECK(false, name, " has a dtype that the kernels do not read");
  }
}

Type result_type(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Byte, name, " must be float32, float16 or bfloat16");
  return type_of(tensor.scalar_type(), name);
}

Target target_of(const Image& image) {
  STD_TORCH_CHECK(image.size() <= (int64_t{1} << 34), "a sample has ", image.size(),
                  " elements; the noise counter addresses at most 2^34");
  return {image.samples, image.channels, image.pixels, image.sample_stride, image.order() == Order::kChannelsLast};
}

View view_of(const Source& source, const Image& target) {
  const Image& own = source.image;
  const Type type = type_of(source.type, "an image");
  View view{own.sample_stride, type, source.aligned_with(target)};
  const bool channels_first = target.order() == Order::kChannelsFirst;
  view.inner = channels_first ? target.pixels : target.channels;
  view.inner_stride = channels_first ? own.pixel_stride : own.channel_stride;
  view.outer_stride = channels_first ? own.channel_stride : own.pixel_stride;
  return view;
}

void* twin_data(const Tensor& tensor, const Image& image, ScalarType type, const char* name) {
  const Image own = image_of(tensor, name);
  check_shape(own, image, name);
  const bool same = tensor.scalar_type() == type && own.sample_stride == image.sample_stride &&
                    (image.order() == Order::kChannelsFirst ? own.channels_first() : own.channels_last());
  STD_TORCH_CHECK(same, name, " must have the dtype and layout of the other results");
  return tensor.mutable_data_ptr();
}

DrawPointers draw_of(const Tensor& seed, const std::optional<Tensor>& sample_ids, const Tensor& step, int64_t samples) {
  DrawPointers draw;
  draw.seed = per_sample(seed, 1, "seed").data;
  draw.step = per_sample(step, samples, "step").data;
  if (sample_ids) {
    STD_TORCH_CHECK(sample_ids->numel() == samples, "sample_ids has ", sample_ids->numel(), " elements for ", samples,
                    " samples");
    draw.sample_ids = per_sample(*sample_ids, samples, "sample_ids").data;
  }
  return draw;
}

}  // namespace cuda
}  // namespace ddpm_fast
