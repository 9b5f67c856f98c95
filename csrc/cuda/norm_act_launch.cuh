// How the launch functions of GroupNorm start a kernel.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "norm_act.h"

namespace ddpm_fast {
namespace cuda {

template <class... Taken, class... Given>
const char* start(void (*kernel)(Taken...), int64_t blocks, int threads, int shared_bytes, int cluster,
                  cudaStream_t stream, Given... given) {
  if (blocks > INT_MAX) return "too many groups for one launch";
  constexpr int kWithoutAsking = 49152;
  if (shared_bytes > kWithoutAsking)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Taken>(given)...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// What both passes tell their kernels.
template <class Arguments> NormActOp op_of(const Arguments& a) {
  NormActOp op = op_of(a.shape, a.plan);
  op.x_stride = a.x_stride;
  op.activation = a.activation;
  op.weight = a.weight.layout;
  op.bias = a.bias.layout;
  op.scale = a.scale.layout;
  op.shift = a.shift.layout;
  op.embedding = a.embedding.layout;
  return op;
}

inline int cluster_of(const NormActPlan& plan) { return plan.statistics == kCluster ? plan.parts : 1; }

}  // namespace cuda
}  // namespace ddpm_fast
