// GroupNorm, scale and shift, and SiLU: one launch where a group is kept in shared memory, three where it is too large.
#include "norm_act_combine.cuh"
#include "norm_act_first.cuh"
#include "norm_act_last.cuh"
#include "norm_act_launch.cuh"

namespace ddpm_fast {
namespace cuda {

NormActDevice norm_act_device() {
  // A device that has clusters may still run code that was compiled for one that has none. Code is asked about once a
  // compute capability.
  static thread_local int known = -1;
  static thread_local bool clusters = false;
  NormActDevice result{};
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&result.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (known != 10 * major + minor) {
    cudaFuncAttributes code{};
    cudaFuncGetAttributes(&code, norm_act_first<float>);
    clusters = code.ptxVersion >= 90;
    known = 10 * major + minor;
  }
  result.clusters = clusters;
  return result;
}

template <class T> static const char* launch(const NormActArguments& a, cudaStream_t stream) {
  const NormActPlan& plan = a.plan;
  NormActOp op = op_of(a);
  op.out_stride = a.out_stride;
  op.eps = a.eps;
  const int64_t units = a.shape.samples * a.shape.groups;
  const bool last = a.shape.channels_last;
  double2* const moments = static_cast<double2*>(a.workspace);
  double *mean = a.mean, *rstd = a.rstd;
  if (plan.statistics == kGiven) {
    double* const own = static_cast<double*>(a.workspace) + 2 * units * plan.parts;
    if (mean == nullptr) mean = own;
    if (rstd == nullptr) rstd = own + units;
  }
  const T* const x = static_cast<const T*>(a.x);
  T* const out = static_cast<T*>(a.out);
  const char* error =
      start(last ? norm_act_last<T> : norm_act_first<T>, plan.blocks, plan.threads, plan.shared_bytes,
            cluster_of(plan), stream, x, out, a.weight.data, a.bias.data, a.scale.data, a.shift.data,
            a.embedding.data, mean, rstd, moments, op);
  if (plan.statistics != kGiven || error != nullptr) return error;
  constexpr int kCombineThreads = 128;
  error = start(norm_act_combine, divide_up(units * 32, kCombineThreads), kCombineThreads, 0, 1, stream, moments, mean,
                rstd, units, last, op);
  if (error != nullptr) return error;
  return start(last ? norm_act_apply_last<T> : norm_act_apply_first<T>, plan.blocks, plan.threads,
               plan.apply_shared_bytes, 1, stream, x, out, a.weight.data, a.bias.data, a.scale.data, a.shift.data,
               a.embedding.data, mean, rstd, op);
}

const char* launch_norm_act(const NormActArguments& arguments, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (arguments.shape.samples == 0) return nullptr;
  if (arguments.shape.element_size == 4) return launch<float>(arguments, on);
  return arguments.bfloat16 ? launch<__nv_bfloat16>(arguments, on) : launch<__half>(arguments, on);
}

}  // namespace cuda
}  // namespace ddpm_fast
