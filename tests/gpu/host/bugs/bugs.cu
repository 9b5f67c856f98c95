// Kernels with one bug each, for the sanitizers to find.
#include <cuda_runtime.h>

#include <cstdint>

__global__ void no_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void two_writers(float* out) {
  if (threadIdx.x == 0) out[0] = static_cast<float>(blockIdx.x);
}

__global__ void beyond_the_end(float* out) { out[threadIdx.x + 1] = 1.0f; }

__global__ void beyond_shared(float* out) {
  __shared__ float values[32];
  float* const own = values + threadIdx.x;
  *own = 1.0f;
  out[threadIdx.x] = *own;
}

__global__ void misaligned(float* out) {
  if (threadIdx.x == 0) *reinterpret_cast<float4*>(out + 1) = make_float4(0, 0, 0, 0);
}

__global__ void no_bug(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (blockIdx.x == 0) out[threadIdx.x] = values[63 - threadIdx.x];
}

extern "C" void launch(int bug, float* out) {
  constexpr int kBlocks = 2, kThreads = 64;
  switch (bug) {
    case 0: no_barrier<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
    case 1: two_writers<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
    case 2: beyond_the_end<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
    case 3: beyond_shared<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
    case 4: misaligned<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
    default: no_bug<<<kBlocks, kThreads, 0, nullptr>>>(out); break;
  }
}
