// A tensor of images as the kernels see it: N samples of C channels of P pixels, with a stride for each.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace ddpm_fast {

enum class Order { kChannelsFirst, kChannelsLast };

struct Image {
  int64_t samples, channels, pixels;
  int64_t sample_stride, channel_stride, pixel_stride;

  // Elements of one sample.
  int64_t size() const { return channels * pixels; }
  // One sample is one run of memory, element (c, p) at c * P + p.
  bool channels_first() const {
    return (pixel_stride == 1 || pixels == 1) && (channel_stride == pixels || channels == 1);
  }
  // One sample is one run of memory, element (c, p) at p * C + c.
  bool channels_last() const {
    return (channel_stride == 1 || channels == 1) && (pixel_stride == channels || pixels == 1);
  }
  bool dense() const { return channels_first() || channels_last(); }
  Order order() const { return channels_first() ? Order::kChannelsFirst : Order::kChannelsLast; }
};

// Throws where the spatial dimensions do not collapse into one stride.
Image image_of(const torch::stable::Tensor& tensor, const char* name);

// The same, and throws unless every sample is one run of memory.
Image dense_image_of(const torch::stable::Tensor& tensor, const char* name);

// The order in which all of the images are read. Throws where there is none.
Order common_order(std::initializer_list<const Image*> images);

}  // namespace ddpm_fast
