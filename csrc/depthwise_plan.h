// Where a kernel's taps meet an image's pixels: what the passes and the small algebra of depthwise blocks go by.
// Pixels of the same surroundings are of one kind. Plain data: the passes, compiled for other instruction sets, read it.
#pragma once

#include <cstdint>

namespace acnet::depthwise {

constexpr int kMostTaps = 7;        // of a kernel's side
constexpr int kMostMultiplier = 8;  // output channels an input channel
constexpr int kMostPadding = 1024;
constexpr int kMostSegments = 8;    // of a row, whose terms are kept for the next one

// Positions first, first + step, … of one kind.
struct Segment {
  int64_t first, step, count;
  int kind;
};

struct Segments {
  const Segment* data;
  int count;
};

struct Axis {
  int64_t size, out, stride, padding, dilation;
  int taps;
  int64_t reach;  // from the first tap to the last
  int64_t after;  // how far windows of outputs go beyond the last position
  // Input positions, by which taps read them for some output (coarse), and by which shifts of −(taps − 1) to taps − 1
  // dilations lead inside, too (fine).
  int coarse_kinds, fine_kinds;
  const int *coarse_of, *fine_of;  // kind of every position
  Segments coarse, fine;
  const uint8_t *reads, *fine_reads;  // kinds × taps
  const uint8_t* inside;              // fine kinds × (2·taps − 1)
  // Output positions, by which taps see a position inside.
  int out_kinds;
  const int* out_of;
  Segments outputs;
  const uint8_t* seen;   // kinds × taps
  const double* pairs;   // taps × taps: how many outputs see inside by both
};

// Of two taps or two pixels, how many taps the second is below and right of the first.
struct Shift {
  int row, column;
};

// Taps or shifts of one row, in columns first, first + step, …
struct Run {
  int row, first, step, count;
};

struct Runs {
  const Run* data;
  int count;
};

// What adds to dx in one kind of pixels: taps of g, then shifts of x.
struct Terms {
  Runs taps, shifts;
  int64_t first;  // vector of the correction that the shifts begin with
};

struct Plan {
  int64_t images;
  Axis rows, columns;
  int taps, multiplier;  // output channels an input channel
  bool by_kind;          // stride 1: products by coarse kind and shift, [row kind][column kind][shift]; else one for each
                         // pair of taps t ≤ t′, in raster order
  const Shift* shifts;   // the half plane from (0, 0) on, in raster order
  int shift_count;
  const Terms* terms;    // coarse row kinds × coarse column kinds
  int64_t correction, products, sums, scratch;  // vectors: of a correction, of what `moments` adds up, of scratch
  int64_t algebra;                              // and of the small algebra's scratch
};

}  // namespace acnet::depthwise
