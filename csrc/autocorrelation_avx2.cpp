// The cross-correlation's passes for AVX2 with FMA, chosen at run time by autocorrelation.cpp.
#include "autocorrelation.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

// After the headers: nothing of theirs may be compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file, where GCC instantiates templates
#pragma GCC target("avx2,fma,f16c")
#endif

#define ACNET_ISA avx2
#define ACNET_TILE 4
#define ACNET_F16C
#include "autocorrelation_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
