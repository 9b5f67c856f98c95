#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace ddpm_fast {
namespace {

Isa best() {
#if DDPM_FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

// A request for more than the processor has is answered with what it has: the bits are the same anyway.
Isa chosen() {
  const char* wish = std::getenv("DDPM_FAST_CPU_ISA");
  const Isa limit = best();
  if (wish != nullptr && std::strcmp(wish, "generic") == 0) return Isa::kGeneric;
  if (wish != nullptr && std::strcmp(wish, "avx2") == 0 && limit == Isa::kAvx512) return Isa::kAvx2;
  return limit;
}

}  // namespace

Isa isa() {
  static const Isa value = chosen();
  return value;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "generic";
  }
}

}  // namespace ddpm_fast
