// The CUDA kernels, as csrc/ops_cuda.cpp registers them. Each writes into tensors it is given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace ddpm_fast {
namespace cuda {

using torch::stable::Tensor;

void normal(Tensor out, Tensor seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream);

void noising(Tensor x0, Tensor t, Tensor coefficients, Tensor noise, Tensor out);
void noising_random(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids,
                    Tensor step, int64_t stream, Tensor out, Tensor noise);

void denoise(Tensor x_t, Tensor model_output, std::optional<Tensor> unconditional, Tensor coefficients, Tensor index,
             int64_t prediction, int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high,
             std::optional<Tensor> threshold, std::optional<Tensor> noise, std::optional<Tensor> seed,
             std::optional<Tensor> sample_ids, int64_t stream, Tensor out, std::optional<Tensor> x0_out);

}  // namespace cuda
}  // namespace ddpm_fast
