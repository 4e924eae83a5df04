// Convolutions of several branches at once on the CPU, and their gradients, for layers of few channels: their input is
// read and packed once, and their kernels' products fill the registers where a library's convolution of 1×3 does not.
//
// direct_kernels.h holds the passes, compiled for several instruction sets (direct_{generic,avx2,avx512}.cpp). A map's
// rows are packed by blocks of channels, a vector's lanes: [block][row][pixel][lane]. So are kernels: [block out]
// [block in][row][column][lane in][lane out], zeros where a block is not full. direct.cpp holds
// checks, tasks, threads and merging. What is summed together depends on the shapes alone: results are the same bits
// for every number of threads.
#pragma once

#include <cstdint>
#include <utility>

#include "rows.h"

namespace acnet::direct {

constexpr int kMostRows = 15;  // of a kernel's taps

// N×C×H×W, anyhow laid out.
template <class T>
struct Maps {
  T* data;
  const T* limit;                       // one past the last element
  int64_t image, channel, row, column;  // strides
  int64_t channels, height, width;
};

// The taps of a kernel: the first one's pixel, from that of the result, and the pixels from one to the next.
struct Taps {
  int64_t rows, columns, row, column, row_step, column_step;

  int64_t last_row() const { return row + (rows - 1) * row_step; }
  int64_t last_column() const { return column + (columns - 1) * column_step; }
  int64_t count() const { return rows * columns; }
};

// Rows first … first + rows − 1 of an image, all blocks, packed; pixels from column `left` on, `pitch` of them.
struct Packed {
  float* data;
  int64_t first, rows, left, pitch, channels;
};

// A kernel between two maps.
struct Link {
  int source, target;
  Taps taps;
  const float* weights;  // packed
};

// In float32 throughout; T is the type of the maps.
template <class T>
struct Passes {
  int lanes;
  // The rows, columns and channels of `to` from this image, zeros beyond its sides.
  void (*pack)(const Maps<const T>& from, int64_t image, const Packed& to);
  // The target's rows [begin, end) of an image, the sum over all links to it. Scratch is
  // of two blocks of these rows, and a vector's pixels more.
  void (*convolve)(const Packed* sources, const Link* links, int count, int target, const Maps<T>& out, int64_t image,
                   int64_t begin, int64_t end, float* scratch);
  // Adds to the kernel of a link, packed, what rows [begin, end) of the gradient of its result make of it; the source's
  // last block may be read to its full lanes. `grad` begins at column 0.
  void (*correlate)(const Packed& source, const Packed& grad, const Taps& taps, int64_t begin, int64_t end,
                    int64_t columns, float* weights);
};

#define ACNET_DIRECT_DECLARE(isa) \
  namespace isa {                 \
  template <class T>              \
  Passes<T> passes();             \
  }
ACNET_DIRECT_DECLARE(generic)
#if defined(__x86_64__)
ACNET_DIRECT_DECLARE(avx2)
ACNET_DIRECT_DECLARE(avx512)
#endif
#undef ACNET_DIRECT_DECLARE

}  // namespace acnet::direct
