// Batch-norm sums on the CPU: out = Σ_b BN_b(y_b) and its gradient, over up to eight N×K×H×W maps.
//
// Four passes over the maps, each written once (bn_sum_kernels.h) and compiled for several instruction sets
// (bn_sum_{generic,avx2,avx512}.cpp). bn_sum.cpp holds the operators: it cuts the maps into chunks, runs the passes
// over them in parallel and merges what they return in chunk order. Chunks depend on the shape alone, so results are
// the same bits for every number of threads.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "activation.h"

namespace acnet::bn_sum {

constexpr int kMaxMaps = 8;

// How the maps lie in memory and how they are cut.
struct MapLayout {
  int maps;
  // channels_last: pixels are K adjacent channels. `pixels_per_row` pixels are read as one row of pixels_per_row·K
  // columns, so that narrow maps fill vectors. A chunk is `chunk` rows; the last pixels that make no whole row are part
  // of the last chunk.
  // Otherwise NCHW: planes of `pixels` per image and channel, and a chunk is `chunk` images.
  bool channels_last;
  int64_t images, channels, pixels;
  int64_t pixels_per_row, chunk, chunks;

  int64_t width() const { return pixels_per_row * channels; }
  // Work units: chunks, or chunks × channels (channel fastest) in NCHW.
  int64_t tasks() const { return channels_last ? chunks : chunks * channels; }
  // Elements per channel of chunk i.
  int64_t count(int64_t i) const {
    if (!channels_last) return (end(i, images) - i * chunk) * pixels;
    const int64_t total = images * pixels, rows = total / pixels_per_row;
    return (end(i, rows) - i * chunk) * pixels_per_row + (i == chunks - 1 ? total % pixels_per_row : 0);
  }
  int64_t end(int64_t i, int64_t limit) const { return i == chunks - 1 ? limit : (i + 1) * chunk; }
};

// What the gradient of the sum takes from the activation after it, g·act'(z). A clamp's slope is told by its output; of
// the others z is computed again, Σ_b scale_b (y_b − center_b) + shift, and the residual added.
template <class A>
struct Slope {
  Activation activation = Activation::none;
  const void* kept = nullptr;  // a clamp's output; of others the residual, or null
  const A *scale = nullptr, *shift = nullptr;
  void* grad = nullptr;  // where reduce() leaves g·act'(z), if anywhere: the residual's gradient
};

// The passes over tasks [begin, end). T is the type of y and dy; O, of out and grad, is T or a half type for float maps;
// A, of everything else, is double for double and float otherwise. Coefficients are [maps][width()], partial results
// [chunks][…][channels].
template <class A>
struct Passes {
  // mean and M2 = Σ(y − mean)² of each chunk of y − pivot, [chunks][maps][channels]. The pivot is any element of the
  // channel: what is left is of the size of the deviation, however large the mean, and A has digits enough for it.
  void (*statistics)(const MapLayout&, const void* const* y, const A* pivot, double* mean, double* m2, int64_t begin,
                     int64_t end);
  // out = act(Σ_b scale_b (y_b − center_b) + shift + residual): exactly y_b where center_b is 0, scale_b 1, and neither
  // of the others there. The residual is of type O, or null.
  void (*apply)(const MapLayout&, const void* const* y, const A* center, const A* scale, const A* shift,
                const void* residual, Activation activation, void* out, int64_t begin, int64_t end);
  // Σ g (y_b − center_b) for each map, then Σ g: [chunks][maps + 1][channels]. g is grad times the slope.
  void (*reduce)(const MapLayout&, const void* grad, const void* const* y, const A* center, const Slope<A>& slope, A* sums,
                 int64_t begin, int64_t end);
  // dy_b = scale_b g + y_factor_b (y_b − center_b) + offset_b, for the maps whose dy is not null; dy may be y.
  void (*gradient)(const MapLayout&, const void* grad, const void* const* y, const A* center, const Slope<A>& slope,
                   const A* scale, const A* y_factor, const A* offset, void* const* dy, int64_t begin, int64_t end);
};

// The passes with one instruction set.
#define ACNET_BN_SUM_DECLARE(isa) \
  namespace isa {                 \
  template <class T, class O, class A> \
  Passes<A> passes();             \
  }
ACNET_BN_SUM_DECLARE(generic)
#if defined(__x86_64__)
ACNET_BN_SUM_DECLARE(avx2)
ACNET_BN_SUM_DECLARE(avx512)
#endif
#undef ACNET_BN_SUM_DECLARE

}  // namespace acnet::bn_sum
