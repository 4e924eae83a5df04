// Which of the instruction sets that kernels are compiled for this processor runs.
#pragma once

#include <cstdlib>
#include <string>

namespace acnet {

enum class Isa { generic, avx2, avx512 };

// The best it has, limited by ATEN_CPU_CAPABILITY (default, avx2, avx512) as ATen's own kernels are.
inline Isa best_isa() {
  static Isa const best = [] {
#if defined(__x86_64__)
    const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
    const std::string limit = variable == nullptr ? "avx512" : variable;
    __builtin_cpu_init();
    if (limit == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (limit != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
      return Isa::avx2;
#endif
    return Isa::generic;
  }();
  return best;
}

}  // namespace acnet
