// The cross-correlation's passes for AVX-512F, chosen at run time by autocorrelation.cpp.
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
#pragma clang attribute push(__attribute__((target("avx512f,avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file, where GCC instantiates templates
#pragma GCC target("avx512f,avx2,fma,f16c")
#endif

namespace acnet::autocorrelation::avx512 {
namespace {
inline __m512 multiply_add(float a, __m512 b, __m512 c) { return _mm512_fmadd_ps(_mm512_set1_ps(a), b, c); }
inline __m512d multiply_add(double a, __m512d b, __m512d c) { return _mm512_fmadd_pd(_mm512_set1_pd(a), b, c); }
}  // namespace
}  // namespace acnet::autocorrelation::avx512

#define ACNET_ISA avx512
#define ACNET_REGISTER 64
#define ACNET_TILE 16
#define ACNET_F16C
#include "autocorrelation_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
