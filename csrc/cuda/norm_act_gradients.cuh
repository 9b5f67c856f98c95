// From the channels' sums to the gradients of the parameters.
#pragma once

#include "norm_act_backward.cuh"

namespace ddpm_fast {
namespace cuda {

// Where a unit is the work of several launches: the sums of each channel of its tiles, and Along. A block a group, a
// warp a channel.
static __global__ void __launch_bounds__(kMostThreads)
    norm_act_backward_combine(const Sums* of_tiles, Sums* of_channels, double2* along, const double* mean,
                              const double* rstd, const void* weight, const void* scale, bool channels_last,
                              const NormActOp op) {
  __shared__ double2 of_warps[kWarp];
  const Parameters given{weight, nullptr, scale, nullptr, nullptr};
  const int unit = blockIdx.x, sample = unit / op.groups, first = (unit - sample * op.groups) * op.width;
  const double2 statistics = make_double2(mean[unit], rstd[unit]);
  double2 part = make_double2(0, 0);
#pragma unroll 1
  for (int c = first + warp(); c < first + op.width; c += warps()) {
    const Pieces pieces = pieces_of(op, channels_last, sample, c);
    ChannelSums sums;
#pragma unroll 1
    for (int i = lane(); i < pieces.count; i += kWarp) sums += widened(of_tiles[pieces.at(i)]);
    sums = {warp_sum(sums.gradient), warp_sum(sums.product), warp_sum(sums.difference)};
    if (lane() != 0) continue;
    of_channels[int64_t{sample} * op.channels + c] =
        make_float4(static_cast<float>(sums.gradient), static_cast<float>(sums.product),
                    static_cast<float>(sums.difference), 0.0f);
    const double2 more = along_of<void>(given, op, sample, c, sums, statistics);
    part.x += more.x;
    part.y += more.y;
  }
  if (lane() == 0) of_warps[warp()] = part;
  __syncthreads();
  if (warp() != 0) return;
  part = lane() < warps() ? of_warps[lane()] : make_double2(0, 0);
  part = make_double2(warp_sum(part.x), warp_sum(part.y));
  const double size = static_cast<double>(op.group_size);
  if (lane() == 0) along[unit] = make_double2(part.x / size, part.y / size);
}

constexpr int kRows = 16;  // samples that a block of norm_act_gradients works on at a time

// Threads of a warp take channels side by side, its warps samples. whole: the sums are one a channel of a sample.
static __global__ void __launch_bounds__(kWarp * kRows)
    norm_act_gradients(const Sums* sums, const double2* along, const double* mean, const double* rstd,
                       const void* weight, const void* bias, const void* scale, float* grad_weight, float* grad_bias,
                       float* grad_scale, float* grad_shift, float* grad_embedding, int64_t samples, bool whole,
                       bool channels_last, const NormActOp op) {
  __shared__ double2 of_rows[kRows][kWarp];
  const Parameters given{weight, bias, scale, nullptr, nullptr};
  const int channel = blockIdx.x * kWarp + lane();
  double2 total = make_double2(0, 0);
  if (channel < op.channels) {
    const double w = weight_of<void>(given, op, channel);
    const double b = given.bias ? static_cast<double>(parameter(given.bias, op.bias, 0, channel)) : 0.0;
#pragma unroll 1
    for (int64_t n = warp(); n < samples; n += kRows) {
      const int64_t at = n * op.channels + channel, group = n * op.groups + channel / op.width;
      const Pieces pieces = whole ? Pieces{at, 0, 0, 1} : pieces_of(op, channels_last, n, channel);
      ChannelSums sum = widened(sums[pieces.first]);
#pragma unroll 1
      for (int i = 1; i < pieces.count; ++i) sum += widened(sums[pieces.at(i)]);
      const double product = xhat_product(sum, mean[group], rstd[group]);
      const double by_scale = one_plus_scale<void>(given, op, n, channel), pixels = op.pixels;
      total.x += by_scale * product;
      total.y += by_scale * sum.gradient;
      if (grad_scale) grad_scale[at] = static_cast<float>(w * product + b * sum.gradient);
      if (grad_shift) grad_shift[at] = static_cast<float>(sum.gradient);
      if (grad_embedding)
        grad_embedding[at] = static_cast<float>(
            rstd[group] * (w * by_scale * sum.gradient - pixels * along[group].x -
                           along[group].y * xhat_sum(sum, pixels, mean[group], rstd[group])));
    }
  }
  of_rows[warp()][lane()] = total;
  __syncthreads();
  if (warp() != 0 || channel >= op.channels) return;
  for (int row = 1; row < kRows; ++row) {
    total.x += of_rows[row][lane()].x;
    total.y += of_rows[row][lane()].y;
  }
  if (grad_weight) grad_weight[channel] = static_cast<float>(total.x);
  if (grad_bias) grad_bias[channel] = static_cast<float>(total.y);
}

}  // namespace cuda
}  // namespace ddpm_fast
