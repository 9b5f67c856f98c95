// Between the two launches that a unit of many parts takes: mean and rstd from the parts' moments.
#pragma once

#include "norm_act_device.cuh"

namespace ddpm_fast {
namespace cuda {

// Values of a group in part i of its unit.
__device__ __forceinline__ double part_size(const NormActOp& op, bool channels_last, int i) {
  if (!channels_last)
    return static_cast<double>(min(static_cast<int64_t>(op.step), op.group_size - i * int64_t{op.step}));
  const int chunk = i / op.cuts, cut = i - chunk * op.cuts;
  const int channels = min(op.piece, op.width - cut * op.piece);
  return static_cast<double>(channels) * min(op.step, op.pixels - chunk * op.step);
}

// A warp a group.
static __global__ void __launch_bounds__(kMostThreads)
    norm_act_combine(const double2* moments, double* mean, double* rstd, int64_t units, bool channels_last,
                     const NormActOp op) {
  const int64_t unit = blockIdx.x * int64_t{blockDim.x / kWarp} + warp();
  if (unit >= units) return;
  const double2 all = combine<false>(
      op.parts, static_cast<double>(op.group_size), op.eps, [&](int i) { return moments[unit * op.parts + i]; },
      [&](int i) { return part_size(op, channels_last, i); });
  if (lane() == 0) {
    mean[unit] = all.x;
    rstd[unit] = all.y;
  }
}

}  // namespace cuda
}  // namespace ddpm_fast
