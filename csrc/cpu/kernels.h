// The CPU kernels, as csrc/ops.cpp registers them. Each writes into tensors it is given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace ddpm_fast {

using torch::stable::Tensor;

void normal(Tensor out, Tensor seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream);

void noising(Tensor x0, Tensor t, Tensor coefficients, Tensor noise, Tensor out);
void noising_random(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids,
                    Tensor step, int64_t stream, Tensor out, Tensor noise);
void noising_drawn(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids, Tensor step,
                   int64_t stream, Tensor out);

void target_loss(Tensor output, Tensor x0, Tensor t, Tensor coefficients, std::optional<Tensor> noise,
                 std::optional<Tensor> seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream,
                 int64_t distance, Tensor out);
void target_loss_backward(Tensor grad_losses, Tensor output, Tensor x0, Tensor t, Tensor coefficients,
                          std::optional<Tensor> noise, std::optional<Tensor> seed, std::optional<Tensor> sample_ids,
                          Tensor step, int64_t stream, int64_t distance, Tensor grad_output);

void bound_terms(Tensor x0, Tensor x_t, Tensor model_output, Tensor coefficients, Tensor t, int64_t prediction,
                 int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high, Tensor bound,
                 Tensor x0_mse);
void bound_terms_backward(Tensor grad_bound, Tensor x0, Tensor x_t, Tensor model_output, Tensor coefficients, Tensor t,
                          int64_t prediction, int64_t variance, std::optional<double> clip_low,
                          std::optional<double> clip_high, bool mean_gradient, Tensor grad_output);

void denoise(Tensor x_t, Tensor model_output, std::optional<Tensor> unconditional, Tensor coefficients, Tensor index,
             int64_t prediction, int64_t variance, std::optional<double> clip_low, std::optional<double> clip_high,
             std::optional<Tensor> threshold, std::optional<Tensor> noise, std::optional<Tensor> seed,
             std::optional<Tensor> sample_ids, int64_t stream, Tensor out, std::optional<Tensor> x0_out);

void abs_quantile(Tensor x, double q, Tensor out);

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
             std::optional<Tensor> prepared, bool upsample, int64_t tile_height, int64_t tile_width, int64_t block,
             Tensor out);

void linear_attention(Tensor qkv, std::optional<Tensor> memory, int64_t heads, double scale, Tensor out);
void projected_linear_attention(Tensor x, Tensor qkv_weight, Tensor out_weight, std::optional<Tensor> out_bias,
                                std::optional<Tensor> memory, int64_t heads, double scale, Tensor out);

void norm_act(Tensor x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
              std::optional<Tensor> scale, std::optional<Tensor> shift, std::optional<Tensor> embedding, double eps,
              int64_t activation, Tensor out, std::optional<Tensor> mean, std::optional<Tensor> rstd);
void norm_act_backward(Tensor grad_out, Tensor x, Tensor mean, Tensor rstd, int64_t num_groups,
                       std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, std::optional<Tensor> embedding, int64_t activation,
                       std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight,
                       std::optional<Tensor> grad_bias, std::optional<Tensor> grad_scale,
                       std::optional<Tensor> grad_shift, std::optional<Tensor> grad_embedding);

void rms_norm_act(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                  double eps, int64_t activation, Tensor out, std::optional<Tensor> rrms);
void rms_norm_act_backward(Tensor grad_out, Tensor x, Tensor rrms, std::optional<Tensor> weight,
                           std::optional<Tensor> scale, std::optional<Tensor> shift, double eps, int64_t activation,
                           std::optional<Tensor> grad_x, std::optional<Tensor> grad_weight,
                           std::optional<Tensor> grad_scale, std::optional<Tensor> grad_shift);

}  // namespace ddpm_fast
