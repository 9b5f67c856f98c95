// CUDA C++ for g++: included before a translated .cu file (translate.py), it gives the names of the language and of the
// device's library their meaning on the host. run.cpp has the threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

// Of the calling thread of a kernel.
extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

namespace host {

void sync_block();
void sync_warp();
void cluster_arrive();
void cluster_wait();
// A warp's exchange of up to 8 bytes a lane: what another lane gave.
uint64_t exchange(uint64_t given, int lane);

// A block's shared memory. Each variable is an allocation of its own, for AddressSanitizer to see its ends.
void* dynamic_shared();
void* fixed_shared(int variable);
// The place of another block of the cluster that corresponds to one of this block.
void* in_block(void* here, int rank);
int reserve_shared(size_t bytes);
template <class T, int kNumber> struct Shared {
  static inline const int variable = reserve_shared(sizeof(T));
};
template <class T, int kNumber> T& shared() { return *static_cast<T*>(fixed_shared(Shared<T, kNumber>::variable)); }

// A kernel's address, which the runtime knows from here on.
const void* known(const void* kernel);
template <class... Taken> const void* known(void (*kernel)(Taken...)) {
  return known(reinterpret_cast<const void*>(kernel));
}

// Goes to fake_cuda/runtime.cpp, whose callback runs `call` in the threads of the launch.
cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, std::function<void()> call);
template <class... Taken, class... Given>
cudaError_t launch(const cudaLaunchConfig_t* config, void (*kernel)(Taken...), Given... given) {
  return launch(config, known(kernel), [=] { kernel(static_cast<Taken>(given)...); });
}

// chevrons(grid, block, shared, stream)(kernel, ...) is kernel<<<grid, block, shared, stream>>>(...).
inline auto chevrons(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  return [=](auto kernel, auto... given) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
    launch(&config, kernel, given...);
  };
}

template <class T> T exchanged(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, lane);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(threadIdx.x % 32); }

// The instructions that kernels write themselves.
inline float ex2(float x) { return std::exp2(x); }
inline float rcp(float x) { return 1.0f / x; }

}  // namespace host

// ---- the language
#undef __launch_bounds__
#undef __forceinline__
#define __launch_bounds__(...)
#define __forceinline__ inline
// For the sources: the headers above are NVIDIA's for a host's compiler.
#define __CUDACC__
#define __CUDA_ARCH__ 900

// ---- the device's library
#define __syncthreads() host::sync_block()
#define __syncwarp() host::sync_warp()
#define __shfl_xor_sync(mask, value, by) host::exchanged(value, host::lane() ^ (by))
// A lane without a source keeps its own value.
#define __shfl_up_sync(mask, value, by) host::exchanged(value, host::lane() < (by) ? host::lane() : host::lane() - (by))

using std::max;
using std::min;

template <class T> T __ldca(const T* from) { return *from; }
template <class T> void __stwb(T* to, T value) { *to = value; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}
inline int __ffs(int x) { return __builtin_ffs(x); }
[[noreturn]] inline void __trap() { __builtin_trap(); }
// -ffp-contract=off rounds each on its own.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }
inline float __uint_as_float(uint32_t x) {
  float result;
  memcpy(&result, &x, sizeof(result));
  return result;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t result;
  memcpy(&result, &x, sizeof(result));
  return result;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return __atomic_fetch_add(to, value, __ATOMIC_RELAXED); }
inline uint32_t atomicOr(uint32_t* to, uint32_t value) { return __atomic_fetch_or(to, value, __ATOMIC_RELAXED); }
inline uint32_t atomicMax(uint32_t* to, uint32_t value) {
  uint32_t old = __atomic_load_n(to, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(to, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// ---- the runtime's templates; its functions are those of fake_cuda/runtime.cpp
#define cudaLaunchKernelEx host::launch
#define cudaFuncSetAttribute(kernel, ...) cudaFuncSetAttribute(host::known(kernel), __VA_ARGS__)
#define cudaFuncGetAttributes(attributes, ...) cudaFuncGetAttributes(attributes, host::known(__VA_ARGS__))
