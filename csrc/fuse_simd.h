// Rows of contiguous float32 weights by vector permutation. Neighbouring elements of a kernel take from a branch of a few
// taps at irregular but periodic places: after as many vectors as a kernel has elements, the pattern starts again. So the
// pattern is tabulated once, and each vector of results is one load of the first branch, which covers all taps, and a
// load and a permutation of each other one. The same operations in the same order as fold_element(): results are
// bit-equal (compile without contraction).
#pragma once

#include <algorithm>

#include "fuse_math.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ACNET_SIMD 1
#include <immintrin.h>

namespace acnet {

constexpr int kPatternTaps = 49;    // of the largest kernel that has a table
constexpr int kPatternBranches = 3;  // besides the first

// Where the vectors of one period take from one branch: lanes of 32 bits, all ones or zeros in masks. A branch's kernel
// and the elements it covers have the same order, so what a vector takes lies side by side in memory.
template <int Width>
struct Pattern {
  struct Source {
    alignas(64) int32_t lane[Width];  // of the loaded vector, by result lane
    alignas(64) int32_t used[Width];  // whether the branch touches the element at all
    alignas(64) int32_t load[Width];  // which lanes may be read
    int32_t offset;                   // of the load, within the period
  };
  Source steps[kPatternTaps];
  uint8_t key[7] = {};

  void prepare(const Block& block, const Branch& branch) {
    uint8_t const wanted[] = {block.rows,  block.columns,  branch.row, branch.column,
                              branch.rows, branch.columns, branch.step};
    if (std::equal(key, key + 7, wanted)) return;
    std::copy(wanted, wanted + 7, key);
    int const taps = block.taps();
    int next = 0;  // of the branch's values
    for (int step = 0; step < taps; ++step) {
      Source& source = steps[step];
      source.offset = next;
      for (int i = 0; i < Width; ++i) {
        int const tap = (step * Width + i) % taps;
        bool const used = tap_of(tap / block.columns, branch.row, branch.rows, branch.step) >= 0 &&
                          tap_of(tap % block.columns, branch.column, branch.columns, branch.step) >= 0;
        source.lane[i] = used ? next++ - source.offset : 0;
        source.used[i] = used ? -1 : 0;
      }
      for (int i = 0; i < Width; ++i) source.load[i] = i < next - source.offset ? -1 : 0;
    }
  }
};

// Of one block: what prepare() found. `others` are the branches with a weight behind the first.
template <int Width>
struct Patterns {
  Pattern<Width> of[kPatternBranches];
  int others = 0;

  // False where the block has no patterns.
  bool prepare(const Block& block, const Branch* branches) {
    if (block.dtype != kFloat || block.channels_last || !block.dense || !covers_all(block, branches[0])) return false;
    if (block.taps() == 1 || block.taps() > kPatternTaps) return false;
    others = 0;
    for (int b = 1; b < block.branches && branches[b].kernel; ++b, ++others) {
      if (others == kPatternBranches) return false;
      of[others].prepare(block, branches[b]);
    }
    return others > 0;
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

// Whole vectors of row o, without the identities; returns how many elements they are. Others branches follow the first.
// The block must have passed patterns.prepare().
#define ACNET_FOLD_ROW_SIMD(ISA, TARGET)                                                                              \
  template <int Others>                                                                                               \
  __attribute__((target(TARGET))) int64_t fold_row_simd(const Block& block, const Branch* branches, int64_t o,        \
                                                        const float* scales, const Patterns<ISA::width>& patterns) {  \
    int64_t const row = block.row();                                                                                  \
    int const taps = block.taps();                                                                                    \
    const float* first = static_cast<const float*>(branches[0].kernel) + o * row;                                     \
    float* weight = static_cast<float*>(block.weight) + o * row;                                                      \
    auto const scale = ISA::set(scales[0]);                                                                           \
    ISA::Vector own[Others];                                                                                          \
    const float* from[Others];                                                                                        \
    int period[Others];                                                                                               \
    for (int b = 0; b < Others; ++b) {                                                                                \
      const Branch& branch = branches[b + 1];                                                                         \
      own[b] = ISA::set(scales[b + 1]);                                                                               \
      from[b] = static_cast<const float*>(branch.kernel) + o * block.inputs * branch.rows * branch.columns;           \
      period[b] = ISA::width * branch.rows * branch.columns;                                                          \
    }                                                                                                                 \
    int64_t done = 0;                                                                                                 \
    while (done + ISA::width <= row) {                                                                                \
      for (int i = 0; i < taps && done + ISA::width <= row; ++i, done += ISA::width) {                                \
        auto sum = scale * ISA::load(first + done);                                                                   \
        for (int b = 0; b < Others; ++b) {                                                                            \
          auto const& source = patterns.of[b].steps[i];                                                               \
          sum = sum + own[b] * ISA::take(from[b] + source.offset, source);                                            \
        }                                                                                                             \
        ISA::store(weight + done, sum);                                                                               \
      }                                                                                                               \
      for (int b = 0; b < Others; ++b) from[b] += period[b];                                                          \
    }                                                                                                                 \
    return done;                                                                                                      \
  }                                                                                                                   \
                                                                                                                      \
  inline int64_t fold_row_simd(const Block& block, const Branch* branches, int64_t o, const float* scales,            \
                               const Patterns<ISA::width>& patterns) {                                                \
    switch (patterns.others) {                                                                                        \
      case 1: return fold_row_simd<1>(block, branches, o, scales, patterns);                                          \
      case 2: return fold_row_simd<2>(block, branches, o, scales, patterns);                                          \
      default: return fold_row_simd<3>(block, branches, o, scales, patterns);                                         \
    }                                                                                                                 \
  }

ACNET_FOLD_ROW_SIMD(Avx2, "avx2")
ACNET_FOLD_ROW_SIMD(Avx512, "avx512f")
#undef ACNET_FOLD_ROW_SIMD

}  // namespace acnet
#endif
