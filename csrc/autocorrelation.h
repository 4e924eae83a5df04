// The passes of the cross-correlation Σ_p ỹ[p]·x̃[p+d]ᵀ, one set an instruction set. The meaning of the operator is
// documented in acnet_kernels/ops/autocorrelation.py; threads, blocks and merging are in autocorrelation.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu.h"

namespace acnet::autocorrelation {

// Some rows of some images, one group of channels. Maps are N×H×W×channels; T is their type, A what sums are in.
// Packed, every pixel row is followed by `reach_columns` zero pixels, and every image's band by `reach_rows` zero
// rows of y, so that a shift is an offset of the pixel index and nothing tests for borders.
template <class T, class A>
struct Block {
  const T* x;  // channel 0 of the group, pixel (0, 0) of the first image
  const T* y;
  const A* x_pivot;
  const A* y_pivot;
  int64_t images, height, width;
  int64_t first_row, rows;         // of y; x has the rows around them too
  int64_t x_pixel, y_pixel;        // elements from one pixel to the next: all channels
  int64_t x_channels, y_channels;  // of the group
  int64_t x_first, x_last;         // the x channels to take, padded; the others are another task's
  int64_t reach_rows, reach_columns;
  const int64_t* shift_rows;
  const int64_t* shift_columns;
  int64_t shifts;
  A* x_packed;  // x_scratch(…) elements: one tile of channels, pixel after pixel
  A* y_packed;  // y_scratch(…) elements: tile after tile
  A* block_sums;
  double* sums;  // this and block_sums: shifts × (x_last − x_first) × padded y channels; this one is added to
};

constexpr int64_t kRowTile = 4;   // x channels are padded to a multiple of this
constexpr int64_t kMostRows = 16;  // and taken this many at a time at the most
constexpr int64_t kMostRun = 192;  // pixels whose x and y tiles share the first-level cache
template <class A>
constexpr int64_t kLanes = 64 / sizeof(A);  // y channels are padded to a multiple of this

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class T, class A>
int64_t pixels_of(const Block<T, A>& b) {
  return b.images * (b.rows + b.reach_rows) * (b.width + b.reach_columns);
}
template <class T, class A>
int64_t x_scratch(const Block<T, A>& b) {
  const int64_t edge = 2 * b.reach_rows * (b.width + b.reach_columns) + 2 * b.reach_columns;
  return (pixels_of(b) + edge) * kMostRows;
}
template <class T, class A>
int64_t y_scratch(const Block<T, A>& b) {
  return pixels_of(b) * round_up(b.y_channels, kLanes<A>);
}

template <class T, class A>
struct Passes {
  // Adds a block's products to its sums.
  void (*correlate)(const Block<T, A>&);
  // to[i] = Σ_n (from[n·stride + i] − pivot[i mod channels]) for i < row, `channels` dividing row.
  void (*sum_images)(const T* from, int64_t images, int64_t stride, const A* pivot, int64_t channels, int64_t row,
                     A* to);
  // to[i] = from[i] + more[i], rounded.
  void (*sum)(const A* from, const A* more, int64_t n, T* to);
  // to[i] = from[i]·factor + more[i], added up in A: rounded to T, kept in A, or of numbers in A. No `more`: nothing.
  void (*shift)(const T* from, A factor, const A* more, int64_t n, T* to);
  void (*shift_wide)(const T* from, A factor, const A* more, int64_t n, A* to);
  void (*shift_narrow)(const A* from, A factor, const A* more, int64_t n, T* to);
};

namespace generic {
template <class T, class A>
Passes<T, A> passes();
}
namespace avx2 {
template <class T, class A>
Passes<T, A> passes();
}
namespace avx512 {
template <class T, class A>
Passes<T, A> passes();
}

// The passes for this processor.
template <class T, class A>
const Passes<T, A>& passes() {
  static const Passes<T, A> chosen = [] {
    switch (best_isa()) {
#if defined(__x86_64__)
      case Isa::avx512: return avx512::passes<T, A>();
      case Isa::avx2: return avx2::passes<T, A>();
#endif
      default: return generic::passes<T, A>();
    }
  }();
  return chosen;
}

// N×H×W×channels maps: x of `x_channels`, y of `y_channels`, in groups.
struct Maps {
  int64_t images, height, width, x_channels, y_channels, groups;
};

// Σ_p ỹ[p]·x̃[p+d]ᵀ for each shift d, shifts×groups×(K/groups)×(C/groups): the operator's products.
template <class T, class A>
void correlate(const T* x, const A* x_pivot, const T* y, const A* y_pivot, const Maps& maps,
               std::vector<int64_t> rows, std::vector<int64_t> columns, A* products);

// Σ_n (y[n] − pivot), H×W×K.
template <class T, class A>
void sum_images(const T* y, const A* pivot, const Maps& maps, A* total);

}  // namespace acnet::autocorrelation
