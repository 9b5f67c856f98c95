// Kernels that pass the gates, and one for each gate that must not.
#include <cuda_fp16.h>

extern "C" __global__ void copy_vectors(const float4* x, float4* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = x[i];
}

extern "C" __global__ void copy_strided(const float* x, float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[8 * i] = x[8 * i];
}

// Each thread reads what another wrote to shared memory, `stride` words apart.
extern "C" __global__ void through_shared(const float* x, float* out, int stride) {
  __shared__ float tile[32 * 33];
  const int i = threadIdx.x;
  tile[i * stride] = x[i];
  __syncthreads();
  out[i] = tile[(31 - i) * stride];
}

extern "C" __global__ void spills(const float* x, float* out, int n) {
  float local[64];
  for (int k = 0; k < 64; ++k) local[k] = x[k * n + threadIdx.x];
  for (int k = 0; k < n; ++k) local[k & 63] += local[(k * 7) & 63];  // indexed: cannot be in registers
  for (int k = 0; k < 64; ++k) out[k * n + threadIdx.x] = local[k];
}

extern "C" __global__ void rounded(const float* x, float* out) {
  const int i = threadIdx.x;
  out[i] = __fsqrt_rn(__fadd_rn(__fmul_rn(x[i], x[i]), 1.0f));
}

extern "C" __global__ void fused(const float* x, float* out) {
  const int i = threadIdx.x;
  out[i] = x[i] * x[i] + 1.0f;
}

extern "C" __global__ void approximate(const float* x, float* out) { out[threadIdx.x] = __expf(x[threadIdx.x]); }
