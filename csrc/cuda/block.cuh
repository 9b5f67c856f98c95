// Sums over the threads of a warp and of a block, in an order that is always the same.
#pragma once

namespace ddpm_fast {
namespace cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ __forceinline__ int lane() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp() { return threadIdx.x / kWarp; }
__device__ __forceinline__ int warps() { return blockDim.x / kWarp; }

// Over teams of `lanes` neighbours, a power of two; every thread of a team gets the same bits.
template <class N> __device__ __forceinline__ N team_sum(N value, int lanes) {
  for (int apart = lanes >> 1; apart > 0; apart >>= 1) value += __shfl_xor_sync(kWholeWarp, value, apart);
  return value;
}
template <class N> __device__ __forceinline__ N warp_sum(N value) {
#pragma unroll
  for (int apart = kWarp / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(kWholeWarp, value, apart);
  return value;
}

// Over the block, for every thread. `of_warps` is shared memory for 32 values that nothing else uses until the next
// barrier but one.
template <class N> __device__ __forceinline__ N block_sum(N value, N* of_warps) {
  value = warp_sum(value);
  if (lane() == 0) of_warps[warp()] = value;
  __syncthreads();
  return warp_sum(lane() < warps() ? of_warps[lane()] : N(0));
}

}  // namespace cuda
}  // namespace ddpm_fast
