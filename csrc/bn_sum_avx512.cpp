// bn_sum's passes for AVX-512 (F, BW, DQ, VL), chosen at run time by bn_sum.cpp.
#include "bn_sum.h"

#if defined(__x86_64__)
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

namespace acnet::bn_sum::avx512 {
namespace {
inline __m512 load_half(const c10::Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store_half(c10::Half* p, __m512 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
}  // namespace
}  // namespace acnet::bn_sum::avx512

#include "bn_sum_kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
