// The launch functions of RMSNorm, scale and shift, and SiLU; as those of norm_act.h.
#pragma once

#include "norm_act.h"
#include "rms_norm_act_plan.h"

namespace ddpm_fast {
namespace cuda {

struct RmsNormActArguments {
  RmsNormActShape shape;
  bool bfloat16;
  int64_t x_stride, out_stride;
  const void* x;
  void* out;
  Parameter weight, scale, shift;
  double eps;
  bool activation;
  float* rrms;  // (N, P), or null
};

struct RmsNormActBackwardArguments {
  RmsNormActShape shape;
  RmsNormActPlan plan;
  bool bfloat16;
  int64_t grad_out_stride, x_stride, grad_x_stride;
  const void *grad_out, *x;
  const float* rrms;
  Parameter weight, scale, shift;
  double eps;
  bool activation;
  void* grad_x;                                  // or null, as the following may be
  float *grad_weight, *grad_scale, *grad_shift;  // (C,), and (N, C) each
  void* workspace;  // rms_norm_act_backward_workspace(shape, plan) bytes, at a multiple of 16
};

const char* launch_rms_norm_act(const RmsNormActArguments& arguments, void* stream);
const char* launch_rms_norm_act_backward(const RmsNormActBackwardArguments& arguments, void* stream);

}  // namespace cuda
}  // namespace ddpm_fast
