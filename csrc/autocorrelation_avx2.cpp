// The cross-correlation's passes for AVX2 with FMA, chosen at run time by autocorrelation.cpp.
#include "autocorrelation.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

// After the headers: nothing of theirs may be compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file, where GCC instantiates templates
#pragma GCC target("avx2,fma,f16c")
#endif

namespace acnet::autocorrelation::avx2 {
namespace {
inline __m256 multiply_add(float a, __m256 b, __m256 c) { return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c); }
inline __m256d multiply_add(double a, __m256d b, __m256d c) { return _mm256_fmadd_pd(_mm256_set1_pd(a), b, c); }
}  // namespace
}  // namespace acnet::autocorrelation::avx2

#define ACNET_ISA avx2
#define ACNET_REGISTER 32
#define ACNET_TILE 4
#define ACNET_F16C
#include "autocorrelation_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
