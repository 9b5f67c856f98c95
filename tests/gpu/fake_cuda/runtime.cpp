// A CUDA runtime for a machine without a GPU: what the host code that nvcc makes calls, so that shipped launch code runs
// as it is. Device memory is host memory. A launch is checked as the driver checks it and handed to a callback, which
// executes the kernel. Only what the package uses is here: anything else is missing when the library is loaded.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

struct Device {
  int major, minor, processors, shared_optin, shared_processor, threads_processor;
};

struct Launch {
  const char* kernel;
  unsigned grid[3], block[3], cluster[3];
  uint64_t shared;
  void** arguments;
};

struct Kernel {
  std::string name;
  int dynamic_shared = 48 * 1024;  // the most that a launch may ask for
  bool large_clusters = false;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

constexpr unsigned kPortableCluster = 8, kMostThreads = 1024, kMostBlocksYZ = 65535, kMostThreadsZ = 64;

Device device;
int (*on_launch)(const Launch*) = nullptr;
thread_local cudaError_t last_error = cudaSuccess;
thread_local std::vector<Configuration> configurations;

std::map<const void*, Kernel>& kernels() {  // filled by static constructors of other files
  static std::map<const void*, Kernel> all;
  return all;
}

cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool is_shape(dim3 grid, dim3 block, dim3 cluster) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x && grid.y && grid.z && grid.x <= INT32_MAX && grid.y <= kMostBlocksYZ && grid.z <= kMostBlocksYZ &&
         threads && threads <= kMostThreads && block.z <= kMostThreadsZ && grid.x % cluster.x == 0 &&
         grid.y % cluster.y == 0 && grid.z % cluster.z == 0;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, void** arguments, size_t shared) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return result(cudaErrorInvalidDeviceFunction);
  const Kernel& kernel = found->second;
  if (!is_shape(grid, block, cluster)) return result(cudaErrorInvalidConfiguration);
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  if (blocks > 1 && device.major < 9) return result(cudaErrorNotSupported);
  if (blocks > 2 * kPortableCluster || (blocks > kPortableCluster && !kernel.large_clusters))
    return result(cudaErrorInvalidClusterSize);
  if (shared > static_cast<size_t>(kernel.dynamic_shared)) return result(cudaErrorInvalidValue);
  const Launch launched{kernel.name.c_str(),
                        {grid.x, grid.y, grid.z},
                        {block.x, block.y, block.z},
                        {cluster.x, cluster.y, cluster.z},
                        shared,
                        arguments};
  return result(on_launch(&launched) ? cudaErrorLaunchFailure : cudaSuccess);
}

}  // namespace

EXPORT void fake_cuda_configure(const Device* properties, int (*callback)(const Launch*)) {
  device = *properties;
  on_launch = callback;
}

// ---- what nvcc's host code calls by itself
EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*,
                                   dim3*, int*) {
  kernels()[function].name = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration top = configurations.back();
  configurations.pop_back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *static_cast<cudaStream_t*>(stream) = top.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                      cudaStream_t) {
  return launch(kernel, grid, block, dim3{1, 1, 1}, arguments, shared);
}

// ---- what is called by name
EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                                    cudaStream_t) {
  return launch(function, grid, block, dim3{1, 1, 1}, arguments, shared);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  dim3 cluster{1, 1, 1};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != cudaLaunchAttributeClusterDimension) return result(cudaErrorNotSupported);
    const auto& shape = attribute.val.clusterDim;
    cluster = dim3{shape.x, shape.y, shape.z};
  }
  return launch(function, config->gridDim, config->blockDim, cluster, arguments, config->dynamicSmemBytes);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return result(cudaErrorInvalidDeviceFunction);
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value > device.shared_optin) return result(cudaErrorInvalidValue);
      found->second.dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed: found->second.large_clusters = value; return cudaSuccess;
    default: return result(cudaErrorNotSupported);
  }
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (!kernels().count(function)) return result(cudaErrorInvalidDeviceFunction);
  *attributes = cudaFuncAttributes{};
  attributes->ptxVersion = attributes->binaryVersion = 10 * device.major + device.minor;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int number) { return result(number ? cudaErrorInvalidDevice : cudaSuccess); }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = device.processors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_optin; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = device.shared_processor; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = device.threads_processor; return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = device.major >= 9; return cudaSuccess;
    default: return result(cudaErrorNotSupported);
  }
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorInvalidClusterSize: return "cluster misconfiguration";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorNotSupported: return "operation not supported";
    default: return "unknown error";
  }
}
EXPORT cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

// ---- what the host code asks of a torch that is built with CUDA: the device's guard, and its current stream
EXPORT int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = new char;
  return 0;
}
EXPORT int32_t aoti_torch_delete_device_guard(void* guard) {
  delete static_cast<char*>(guard);
  return 0;
}
EXPORT int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
