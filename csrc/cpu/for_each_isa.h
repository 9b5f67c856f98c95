// Compiles the file named DDPM_FAST_KERNELS once an instruction set, each in its own namespace, and offers
// DDPM_FAST_DISPATCH(f)(...) to call the copy of f that suits this processor. No -march anywhere: the compiler's
// default target stays the lowest, and the file's functions alone are raised, by pragma.
// Every header the kernels use is included here, before any pragma, so that no inline function of a library is
// compiled for a processor that may not be there.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"

namespace ddpm_fast {
using BFloat16 = c10::BFloat16;
using Half = c10::Half;
}  // namespace ddpm_fast

#if DDPM_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define DDPM_FAST_ISA avx512
#define DDPM_FAST_ISA_AVX512
#include "simd.h"
#include DDPM_FAST_KERNELS
#undef DDPM_FAST_ISA
#undef DDPM_FAST_ISA_AVX512
#undef DDPM_FAST_INLINE
#undef DDPM_FAST_UNROLL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define DDPM_FAST_ISA avx2
#define DDPM_FAST_ISA_AVX2
#include "simd.h"
#include DDPM_FAST_KERNELS
#undef DDPM_FAST_ISA
#undef DDPM_FAST_ISA_AVX2
#undef DDPM_FAST_INLINE
#undef DDPM_FAST_UNROLL
#pragma GCC pop_options
#endif

#define DDPM_FAST_ISA generic
#include "simd.h"
#include DDPM_FAST_KERNELS
#undef DDPM_FAST_ISA
#undef DDPM_FAST_INLINE
#undef DDPM_FAST_UNROLL
#undef DDPM_FAST_EACH

#if DDPM_FAST_X86
#define DDPM_FAST_DISPATCH(...)                                                        \
  (::ddpm_fast::isa() == ::ddpm_fast::Isa::kAvx512 ? ::ddpm_fast::avx512::__VA_ARGS__  \
   : ::ddpm_fast::isa() == ::ddpm_fast::Isa::kAvx2 ? ::ddpm_fast::avx2::__VA_ARGS__    \
                                                   : ::ddpm_fast::generic::__VA_ARGS__)
#else
#define DDPM_FAST_DISPATCH(...) (::ddpm_fast::generic::__VA_ARGS__)
#endif
