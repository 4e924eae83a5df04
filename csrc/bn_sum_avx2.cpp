// bn_sum's passes for AVX2 and FMA, chosen at run time by bn_sum.cpp.
#include "bn_sum.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// After the headers: nothing of theirs may be compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file, where GCC instantiates templates
#pragma GCC target("avx2,fma,f16c")
#endif

#define ACNET_ISA avx2
#define ACNET_BYTES 32

namespace acnet::bn_sum::avx2 {
namespace {
inline __m256 load_half(const c10::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_half(c10::Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
}  // namespace
}  // namespace acnet::bn_sum::avx2

#include "bn_sum_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
