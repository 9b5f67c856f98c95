// The CPU kernels, as csrc/ops.cpp registers them. Each writes into tensors it is given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace ddpm_fast {

using torch::stable::Tensor;

void normal(Tensor out, Tensor seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream);

}  // namespace ddpm_fast
