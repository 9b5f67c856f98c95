#include "arguments.h"

#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/util/Exception.h>

namespace ddpm_fast {

PerSample per_sample(const Tensor& tensor, int64_t samples, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous(), name,
                  " must be a contiguous int64 tensor");
  const int64_t n = tensor.numel();
  STD_TORCH_CHECK(n == 1 || n == samples, name, " has ", n, " elements; 1 or ", samples, " are allowed");
  return {static_cast<const int64_t*>(tensor.const_data_ptr()), n == 1 ? 0 : 1};
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
