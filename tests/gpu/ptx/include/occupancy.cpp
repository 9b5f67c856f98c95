// occupancy MAJOR MINOR REGISTERS STATIC_SHARED DYNAMIC_SHARED THREADS THREADS_PROCESSOR SHARED_PROCESSOR SHARED_BLOCK
// prints how many blocks a multiprocessor holds, by NVIDIA's own calculator.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  if (count != 10) return 2;
  int value[10];
  for (int i = 1; i < 10; ++i) value[i] = atoi(arguments[i]);
  cudaOccDeviceProp device{};
  device.computeMajor = value[1];
  device.computeMinor = value[2];
  device.maxThreadsPerBlock = 1024;
  device.warpSize = 32;
  device.regsPerMultiprocessor = device.regsPerBlock = 65536;
  device.numSms = 1;
  device.maxThreadsPerMultiprocessor = value[7];
  device.sharedMemPerMultiprocessor = value[8];
  device.sharedMemPerBlockOptin = value[9];
  device.sharedMemPerBlock = 48 * 1024;
  device.reservedSharedMemPerBlock = device.computeMajor >= 8 ? 1024 : 0;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = value[3];
  kernel.sharedSizeBytes = value[4];
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
  kernel.numBlockBarriers = 1;
  const cudaOccDeviceState state{};
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, value[6], value[5]) !=
      CUDA_OCC_SUCCESS)
    return 1;
  printf("%d\n", result.activeBlocksPerMultiprocessor);
}
