// What packed_rows.h and bn_sum_kernels.h need, for AVX-512 (F, BW, DQ, VL).
// From here to the end of the file that includes this, everything is compiled for it: it comes after all other
// headers, and rows_end.h at the end.
#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// After the headers: nothing of theirs may be compiled for this instruction set.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else  // to the end of the file, where GCC instantiates templates
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 about its own _mm512_undefined_ps
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define ACNET_ISA avx512
#define ACNET_BYTES 64
#define ACNET_ROW 12

namespace acnet::rows::avx512 {
namespace {
inline __m512 load_half(const c10::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_half(c10::Half* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline __m512 spread(float value) { return _mm512_set1_ps(value); }
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d multiply_add(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
}  // namespace
}  // namespace acnet::rows::avx512
