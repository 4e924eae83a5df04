// What packed_rows.h and bn_sum_kernels.h need, for AVX2 with FMA.
// From here to the end of the file that includes this, everything is compiled for it: it comes after all other
// headers, and rows_end.h at the end.
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
#define ACNET_ROW 12

namespace acnet::rows::avx2 {
namespace {
inline __m256 load_half(const c10::Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_half(c10::Half* p, __m256 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline __m256 spread(float value) { return _mm256_set1_ps(value); }
inline __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d multiply_add(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
}  // namespace
}  // namespace acnet::rows::avx2
