// From torch's tensors to the plain data that launch functions take.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../arguments.h"
#include "arguments.h"

namespace ddpm_fast {
namespace cuda {

// Makes a tensor's device the current one, and knows its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor);
  void* stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// Throws what a launch function returned, unless it is null.
void check_launch(const char* error);

Type type_of(ScalarType type, const char* name);

// The dtype of what a kernel writes: a floating-point one.
Type result_type(const Tensor& tensor, const char* name);

// The image that a kernel writes, each sample one run of memory.
Target target_of(const Image& image);

// An image that a kernel reads.
View view_of(const Source& source, const Image& target);

// The memory of an image that a kernel writes, in the order of `image` and of a dtype.
void* twin_data(const Tensor& tensor, const Image& image, ScalarType type, const char* name);

DrawPointers draw_of(const Tensor& seed, const std::optional<Tensor>& sample_ids, const Tensor& step, int64_t samples);

}  // namespace cuda
}  // namespace ddpm_fast
