#include "image.h"

#include <torch/headeronly/util/Exception.h>

namespace ddpm_fast {

Image image_of(const torch::stable::Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(dim >= 1, name, " has no sample dimension");
  Image image{sizes[0], dim > 1 ? sizes[1] : 1, 1, strides[0], dim > 1 ? strides[1] : 1, 1};
  // From the innermost dimension outwards; a dimension of size 1 has no stride worth the name.
  bool first = true;
  for (int64_t d = dim - 1; d >= 2; --d) {
    if (sizes[d] != 1) {
      if (first) image.pixel_stride = strides[d];
      STD_TORCH_CHECK(first || image.pixels == 0 || strides[d] == image.pixel_stride * image.pixels, name,
                      " has spatial dimensions that are not laid out one within the other; call .contiguous()");
      first = false;
    }
    image.pixels *= sizes[d];
  }
  return image;
}

Image dense_image_of(const torch::stable::Tensor& tensor, const char* name) {
  const Image image = image_of(tensor, name);
  STD_TORCH_CHECK(image.dense() || image.samples * image.size() == 0, name,
                  " must be contiguous or channels_last; call .contiguous()");
  return image;
}

Order common_order(std::initializer_list<const Image*> images) {
  bool first = true, last = true;
  for (const Image* const image : images) {
    first = first && image->channels_first();
    last = last && image->channels_last();
  }
  STD_TORCH_CHECK(first || last, "the tensors must all be contiguous, or all channels_last");
  return first && !(last && (*images.begin())->pixels == 1) ? Order::kChannelsFirst : Order::kChannelsLast;
}

}  // namespace ddpm_fast
