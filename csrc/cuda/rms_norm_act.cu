// RMSNorm, scale and shift, and SiLU, forward and backward.
#include "norm_act_launch.cuh"
#include "rms_norm_act.cuh"
#include "rms_norm_act.h"

namespace ddpm_fast {
namespace cuda {

template <class Arguments> static RmsNormActOp told(const Arguments& a, const RmsNormActPlan& plan) {
  RmsNormActOp op = plan.op;
  op.x_stride = a.x_stride;
  op.eps = static_cast<float>(a.eps);
  op.activation = a.activation;
  op.weight = a.weight.layout;
  op.scale = a.scale.layout;
  op.shift = a.shift.layout;
  return op;
}

template <class T> static const char* launch(const RmsNormActArguments& a, cudaStream_t stream) {
  const RmsNormActPlan plan = plan_rms_norm_act(a.shape, norm_act_device().shared_bytes, 1);
  RmsNormActOp op = told(a, plan);
  op.out_stride = a.out_stride;
  return start(a.shape.channels_last ? rms_norm_act<T, true> : rms_norm_act<T, false>, plan.blocks, plan.threads,
               plan.shared_bytes, 1, stream, static_cast<const T*>(a.x), static_cast<T*>(a.out), a.weight.data,
               a.scale.data, a.shift.data, a.rrms, op);
}

template <class T> static const char* launch(const RmsNormActBackwardArguments& a, cudaStream_t stream) {
  const RmsNormActPlan& plan = a.plan;
  RmsNormActOp op = told(a, plan);
  op.grad_stride = a.grad_out_stride;
  op.out_stride = a.grad_x_stride;
  const int64_t samples = a.shape.samples, channels = a.shape.channels;
  float2* const of_tiles = static_cast<float2*>(a.workspace);
  float* const of_samples = reinterpret_cast<float*>(of_tiles + plan.blocks * channels);
  constexpr int kSumThreads = kWarp * kRmsRows;
  const unsigned across = static_cast<unsigned>((channels + kWarp - 1) / kWarp);
  if (samples > 0) {
    const char* const error =
        start(a.shape.channels_last ? rms_norm_act_backward<T, true> : rms_norm_act_backward<T, false>, plan.blocks,
              plan.threads, plan.shared_bytes, 1, stream, static_cast<const T*>(a.grad_out),
              static_cast<const T*>(a.x), static_cast<T*>(a.grad_x), a.weight.data, a.scale.data, a.shift.data, a.rrms,
              of_tiles, op);
    if (error != nullptr) return error;
    if (a.grad_weight == nullptr && a.grad_scale == nullptr && a.grad_shift == nullptr) return nullptr;
    rms_norm_act_sums<<<static_cast<unsigned>(samples * across), kSumThreads, 0, stream>>>(
        of_tiles, of_samples, a.weight.data, a.scale.data, a.grad_scale, a.grad_shift, op);
  }
  if (a.grad_weight != nullptr)
    rms_norm_act_weight<<<across, kSumThreads, 0, stream>>>(of_samples, a.grad_weight, samples, op.channels);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Arguments> static const char* dispatch(const Arguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.shape.element_size == 4) return launch<float>(arguments, on);
  return arguments.bfloat16 ? launch<__nv_bfloat16>(arguments, on) : launch<__half>(arguments, on);
}

const char* launch_rms_norm_act(const RmsNormActArguments& arguments, void* stream) {
  return arguments.shape.samples == 0 ? nullptr : dispatch(arguments, stream);
}

const char* launch_rms_norm_act_backward(const RmsNormActBackwardArguments& arguments, void* stream) {
  return dispatch(arguments, stream);
}

}  // namespace cuda
}  // namespace ddpm_fast
