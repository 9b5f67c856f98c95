// The launch functions of GroupNorm, scale and shift, and SiLU. Each runs its kernels on a stream (a cudaStream_t) of
// the current device and returns null, or CUDA's message where a launch failed. No torch header, no CUDA header.
#pragma once

#include "norm_act_plan.h"

namespace ddpm_fast {
namespace cuda {

// A value a channel, float32 or of x's type; data is null where there is none.
struct Parameter {
  const void* data = nullptr;
  ParameterLayout layout;
};

struct NormActArguments {
  NormActShape shape;
  NormActPlan plan;
  bool bfloat16;  // which of the two types of two bytes
  int64_t x_stride, out_stride;  // elements from one sample to the next
  const void* x;
  void* out;
  Parameter weight, bias, scale, shift, embedding;
  double eps;
  bool activation;
  double *mean, *rstd;  // (N, G), or null
  void* workspace;      // norm_act_workspace(shape, plan) bytes, at a multiple of 16
};

struct NormActBackwardArguments {
  NormActShape shape;
  NormActPlan plan;
  bool bfloat16;
  int64_t grad_out_stride, x_stride, grad_x_stride;
  const void *grad_out, *x;
  const double *mean, *rstd;  // (N, G)
  Parameter weight, bias, scale, shift, embedding;
  bool activation;
  void* grad_x;                                                               // or null, as the following may be
  float *grad_weight, *grad_bias, *grad_scale, *grad_shift, *grad_embedding;  // (C,) and (C,), then (N, C) each
  void* workspace;  // norm_act_backward_workspace(shape, plan) bytes, at a multiple of 16
};

// The current device.
NormActDevice norm_act_device();

const char* launch_norm_act(const NormActArguments& arguments, void* stream);
const char* launch_norm_act_backward(const NormActBackwardArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace ddpm_fast
