// What the backward kernels of both layouts share. A tile leaves the sums of its channels in memory, one writer a slot,
// and norm_act_parameters makes the parameters' gradients of them; a unit that is kept in shared memory goes on to
// grad_x at once, a larger one in another launch.
#pragma once

#include "norm_act_device.cuh"

namespace ddpm_fast {
namespace cuda {

// Sums over pixels: x of the gradient of z, y of the same times the difference v - center, z of the difference.
using Sums = float4;

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, 0.0f);
}

// A vector of grad_out and the vector of x beside it.
struct Vectors {
  uint4 grad, x;
};

// grad_out, x -> grad_x, each a sample's or a tile's.
template <class T> struct Images {
  const T *grad_out, *x;
  T* grad_x;
};

__device__ __forceinline__ float gradient_of_z(float grad_out, float difference, const float4& k, bool activation) {
  return activation ? grad_out * silu_derivative(fmaf(difference, k.z, k.w)) : grad_out;
}

// line: GradientLine in float32.
__device__ __forceinline__ float gradient_of_x(float grad_out, float x, const float4& k, const float2& line,
                                               bool activation) {
  const float difference = (x + k.x) - k.y;
  return fmaf(gradient_of_z(grad_out, difference, k, activation), k.z, fmaf(difference, line.x, line.y));
}

template <class T>
__device__ __forceinline__ double weight_of(const Parameters& given, const NormActOp& op, int channel) {
  return given.weight ? static_cast<double>(parameter<T>(given.weight, op.weight, 0, channel)) : 1.0;
}

// What a channel's sums add to Along, before the division by the group's size.
template <class T>
__device__ __forceinline__ double2 along_of(const Parameters& given, const NormActOp& op, int64_t sample, int channel,
                                            const ChannelSums& sums, const double2& statistics) {
  const double factor = weight_of<T>(given, op, channel) * one_plus_scale<T>(given, op, sample, channel);
  return make_double2(factor * sums.gradient, factor * xhat_product(sums, statistics.x, statistics.y));
}

__device__ __forceinline__ ChannelSums widened(const Sums& sums) { return {sums.x, sums.y, sums.z}; }

__device__ __forceinline__ float2 line_of(const double2& statistics, const double2& along) {
  const GradientLine line = gradient_line(statistics.x, statistics.y, {along.x, along.y});
  return make_float2(static_cast<float>(line.slope), static_cast<float>(line.constant));
}

// Where the sums of a channel of a sample lie: one entry for each of the tiles that touch it.
struct Pieces {
  int64_t first, following, stride;
  int count;
  __device__ __forceinline__ int64_t at(int i) const { return i == 0 ? first : following + (i - 1) * stride; }
};

// A tile has op.slots entries.
__device__ __forceinline__ Pieces pieces_of(const NormActOp& op, bool channels_last, int64_t sample, int channel) {
  if (channels_last) {
    // Those of a group's cuts lie side by side, one a channel: op.slots is op.piece.
    const int slab = channel / (op.slab * op.width), c = channel - slab * op.slab * op.width;
    const int64_t stride = static_cast<int64_t>(op.cuts) * op.slots;
    const int64_t first = (sample * op.slabs + slab) * op.parts * op.slots + c;
    return {first, first + stride, stride, op.parts / op.cuts};
  }
  // The tiles that follow the first begin with the channel.
  const int group = channel / op.width, c = channel - group * op.width;
  const int64_t begin = static_cast<int64_t>(c) * op.pixels, part = op.by_step(begin);
  const int64_t tile = ((sample * op.groups + group) * op.parts + part) * op.slots;
  return {tile + c - op.long_by_pixels(part * op.step), tile + op.slots, op.slots,
          static_cast<int>(op.by_step(begin + op.pixels - 1) - part + 1)};
}

}  // namespace cuda
}  // namespace ddpm_fast
