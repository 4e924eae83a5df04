// Rows of contiguous float32 weights by vector permutation. Neighbouring elements of a k×k kernel take from hor and ver
// at irregular but periodic places: after as many vectors as a kernel has elements, the pattern starts again. So the
// pattern is tabulated once, and each vector of results is one load of square, and a load and a permutation of hor and
// of ver. The same operations in the same order as fold_element(): results are bit-equal (compile without contraction).
#pragma once

#include "fuse_math.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ACNET_SIMD 1
#include <immintrin.h>

namespace acnet {

constexpr int kPatternMaxK = 7;  // beyond, a vector's sources from one branch may not fit into one vector

// Where the vectors of one period take from a branch: lanes of 32 bits, all ones or zeros in masks.
template <int Width>
struct Pattern {
  struct Source {
    alignas(64) int32_t lane[Width];  // of the loaded vector, by result lane
    alignas(64) int32_t used[Width];  // whether the branch touches the element at all
    alignas(64) int32_t load[Width];  // which lanes may be read
    int32_t offset;                   // of the load, within the period
  };
  struct Step {
    Source hor, ver;
  };
  Step steps[kPatternMaxK * kPatternMaxK];
  int k = 0, hor_row = -1, ver_column = -1;

  static void tabulate(Source& source, int first, int k, bool is_hor, int at) {
    int const taps = k * k;
    source.offset = first / taps * k;
    for (int i = 0; i < Width; ++i) source.load[i] = 0;
    for (int i = 0; i < Width; ++i) {
      int const c = (first + i) / taps, r = (first + i) % taps / k, s = (first + i) % k;
      bool const used = is_hor ? r == at : s == at;
      int const lane = used ? c * k + (is_hor ? s : r) - source.offset : 0;
      source.lane[i] = lane;
      source.used[i] = used ? -1 : 0;
      if (used) source.load[lane] = -1;
    }
  }

  // False where the geometry has no pattern.
  bool prepare(const Block& block) {
    // The elements of one vector lie in at most `kernels` kernels, which take kernels·k values of a branch.
    int const taps = block.k * block.k, kernels = (Width - 2) / taps + 2;
    if (block.k == 1 || block.k > kPatternMaxK || kernels * block.k > Width) return false;
    if (k == block.k && hor_row == block.hor_row && ver_column == block.ver_column) return true;
    k = block.k, hor_row = block.hor_row, ver_column = block.ver_column;
    for (int i = 0; i < taps; ++i) {
      tabulate(steps[i].hor, i * Width, k, true, hor_row);
      tabulate(steps[i].ver, i * Width, k, false, ver_column);
    }
    return true;
  }
};

struct Avx2 {
  static constexpr int width = 8;
  using Vector = __m256;
  using Mask = __m256i;
  __attribute__((target("avx2"), always_inline)) static Mask mask(const int32_t* m) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(m)); }
  __attribute__((target("avx2"), always_inline)) static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  __attribute__((target("avx2"), always_inline)) static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  __attribute__((target("avx2"), always_inline)) static Vector set(float x) { return _mm256_set1_ps(x); }
  __attribute__((target("avx2"), always_inline)) static Vector take(const float* p, const Pattern<8>::Source& s) {
    Vector const v = _mm256_maskload_ps(p, mask(s.load));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(v, mask(s.lane)), _mm256_castsi256_ps(mask(s.used)));
  }
};

struct Avx512 {
  static constexpr int width = 16;
  using Vector = __m512;
  __attribute__((target("avx512f"), always_inline)) static __mmask16 mask(const int32_t* m) {
    __m512i const v = _mm512_load_si512(m);
    return _mm512_test_epi32_mask(v, v);
  }
  __attribute__((target("avx512f"), always_inline)) static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  __attribute__((target("avx512f"), always_inline)) static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  __attribute__((target("avx512f"), always_inline)) static Vector set(float x) { return _mm512_set1_ps(x); }
  __attribute__((target("avx512f"), always_inline)) static Vector take(const float* p, const Pattern<16>::Source& s) {
    Vector const v = _mm512_maskz_loadu_ps(mask(s.load), p);
    return _mm512_maskz_permutexvar_ps(mask(s.used), _mm512_load_si512(s.lane), v);
  }
};

// Whole vectors of row o; returns how many elements they are. block must have passed pattern.prepare().
#define ACNET_FOLD_ROW_SIMD(ISA, TARGET)                                                                             \
  __attribute__((target(TARGET))) inline int64_t fold_row_simd(const Block& block, int64_t o, const float* scale,     \
                                                               const Pattern<ISA::width>& pattern) {                  \
    int64_t const row = block.row(), branch = int64_t(block.inputs) * block.k;                                        \
    int const taps = block.k * block.k;                                                                               \
    const float* square = static_cast<const float*>(block.kernels[kSquare]) + o * row;                                \
    const float* hor = static_cast<const float*>(block.kernels[kHor]) + o * branch;                                   \
    const float* ver = static_cast<const float*>(block.kernels[kVer]) + o * branch;                                   \
    float* weight = static_cast<float*>(block.weight) + o * row;                                                      \
    auto const a = ISA::set(scale[kSquare]), b = ISA::set(scale[kHor]), d = ISA::set(scale[kVer]);                    \
    int64_t done = 0;                                                                                                 \
    for (int64_t period = 0; done + ISA::width <= row; ++period) {                                                    \
      int64_t const base = period * ISA::width * block.k;                                                             \
      for (int i = 0; i < taps && done + ISA::width <= row; ++i, done += ISA::width) {                                \
        auto const& step = pattern.steps[i];                                                                          \
        auto const h = ISA::take(hor + base + step.hor.offset, step.hor);                                             \
        auto const v = ISA::take(ver + base + step.ver.offset, step.ver);                                             \
        ISA::store(weight + done, a * ISA::load(square + done) + (b * h + d * v));                                    \
      }                                                                                                               \
    }                                                                                                                 \
    return done;                                                                                                      \
  }

ACNET_FOLD_ROW_SIMD(Avx2, "avx2")
ACNET_FOLD_ROW_SIMD(Avx512, "avx512f")
#undef ACNET_FOLD_ROW_SIMD

}  // namespace acnet
#endif
