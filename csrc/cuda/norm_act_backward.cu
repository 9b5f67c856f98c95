// The derivative of GroupNorm, scale and shift, and SiLU: one launch for grad_x where a group is kept in shared memory,
// three where it is too large; one more for the gradients of the parameters.
#include "norm_act_backward_first.cuh"
#include "norm_act_backward_last.cuh"
#include "norm_act_gradients.cuh"
#include "norm_act_launch.cuh"

namespace ddpm_fast {
namespace cuda {

template <class T> static const char* launch(const NormActBackwardArguments& a, cudaStream_t stream) {
  const NormActPlan& plan = a.plan;
  NormActOp op = op_of(a);
  op.grad_stride = a.grad_out_stride;
  op.out_stride = a.grad_x_stride;
  const bool last = a.shape.channels_last, split = plan.statistics == kGiven;
  const int64_t units = a.shape.samples * a.shape.groups;
  Sums* const of_tiles = static_cast<Sums*>(a.workspace);
  Sums* const of_channels = of_tiles + plan.blocks * plan.slots;
  double2* const along = reinterpret_cast<double2*>(of_channels + (split ? a.shape.samples * a.shape.channels : 0));
  const T *const grad_out = static_cast<const T*>(a.grad_out), *const x = static_cast<const T*>(a.x);
  T* const grad_x = static_cast<T*>(a.grad_x);
  if (units > 0) {
    const char* error = start(last ? norm_act_backward_last<T> : norm_act_backward_first<T>, plan.blocks, plan.threads,
                              plan.shared_bytes, cluster_of(plan), stream, grad_out, x, grad_x, a.weight.data,
                              a.bias.data, a.scale.data, a.shift.data, a.embedding.data, a.mean, a.rstd, of_tiles,
                              along, op);
    if (error != nullptr) return error;
  }
  if (units > 0 && split) {
    constexpr int kCombineThreads = 256;
    const char* error = start(norm_act_backward_combine, units, kCombineThreads, 0, 1, stream, of_tiles, of_channels,
                              along, a.mean, a.rstd, a.weight.data, a.scale.data, last, op);
    if (error == nullptr && grad_x != nullptr)
      error = start(last ? norm_act_backward_apply_last<T> : norm_act_backward_apply_first<T>, plan.blocks,
                    plan.threads, plan.apply_shared_bytes, 1, stream, grad_out, x, grad_x, a.weight.data, a.bias.data,
                    a.scale.data, a.shift.data, a.embedding.data, a.mean, a.rstd, along, op);
    if (error != nullptr) return error;
  }
  if (!a.grad_weight && !a.grad_bias && !a.grad_scale && !a.grad_shift && !a.grad_embedding) return nullptr;
  return start(norm_act_gradients, divide_up(a.shape.channels, kWarp), kWarp * kRows, 0, 1, stream,
               split ? of_channels : of_tiles, along, a.mean, a.rstd, a.weight.data, a.bias.data, a.scale.data,
               a.grad_weight, a.grad_bias, a.grad_scale, a.grad_shift, a.grad_embedding, a.shape.samples, split, last,
               op);
}

const char* launch_norm_act_backward(const NormActBackwardArguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.shape.element_size == 4) return launch<float>(arguments, on);
  return arguments.bfloat16 ? launch<__nv_bfloat16>(arguments, on) : launch<__half>(arguments, on);
}

}  // namespace cuda
}  // namespace ddpm_fast
