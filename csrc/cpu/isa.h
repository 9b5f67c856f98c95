// The instruction set that the CPU kernels run with: the best that this processor has, or the one that the
// environment variable DDPM_FAST_CPU_ISA names (avx512, avx2, generic), read once.
#pragma once

#if defined(__x86_64__) && !defined(DDPM_FAST_GENERIC)
#define DDPM_FAST_X86 1
#else
#define DDPM_FAST_X86 0
#endif

namespace ddpm_fast {

enum class Isa { kGeneric, kAvx2, kAvx512 };

Isa isa();
const char* isa_name();

}  // namespace ddpm_fast
