// A dense block's training step from its input's second moments, on the CPU. docs/moments.md has the identities,
// acnet_kernels/ops/moments.py the operators' meaning. Maps are read in channels_last; "patch order" is tap, channel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "branch_list.h"
#include "buffer.h"
#include "check.h"

namespace acnet::moments {

constexpr int64_t kSides = 4;  // top, bottom, left, right
constexpr int64_t kWork = 16 << 10;  // operations that are worth a thread

// body(T{}, A{}) for the maps' type T, a float, and the type A of sums.
template <class Body>
auto dispatch(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float: return body(float{}, float{});
    case ScalarType::Double: return body(double{}, double{});
    case ScalarType::BFloat16: return body(c10::BFloat16{}, float{});
    default: return body(c10::Half{}, float{});
  }
}

// body(begin, end) over n things of so much work each.
template <class Body>
void parallel(int64_t n, int64_t work, const Body& body) {
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, kWork / std::max<int64_t>(work, 1)), body);
}

// What an operator is given, checked.
struct Problem {
  Check check;
  View x;
  std::vector<View> weights, gammas;
  BranchList list;
  int64_t n, c, h, w, outputs, groups, kernel;
  int64_t radius, taps, cg, kg;  // of the kernel; its taps; channels in and out, a group
  int64_t size, pixels, norms;   // of a patch, a group; of all maps, at least 1; batch norms
  ScalarType compute;            // what the library's convolutions compute in: x's type, or float for half precision

  Problem(const char* name, const Tensor& x, const Tensors& weights, const Tensors& gammas, int64_t norms,
          const std::vector<int64_t>& taps, const std::vector<int64_t>& geometry, ScalarType compute);

  bool is_half() const { return x.type() == ScalarType::BFloat16 || x.type() == ScalarType::Half; }
  bool computes_in_own() const { return compute == x.type(); }
  bool summed() const { return list.summed(); }
  int64_t numbers() const { return list.numbers * cg; }
  double gamma(int64_t norm, int64_t output) const;
  // The kernel's numbers in patch order, K×(taps·C/groups).
  Buffer<double> numbers_of(const Kernel& kernel) const;
  // Pairs of taps, relative to the centre.
  int64_t row(int64_t tap) const { return tap / kernel - radius; }
  int64_t column(int64_t tap) const { return tap % kernel - radius; }
};

double element(const View& v, int64_t offset);

// Runs of pixels of an axis, all but `before` and `behind` the edges, each up to a reach.
struct Run {
  int64_t before, behind;
  int64_t index(int64_t reach) const { return before * (reach + 1) + behind; }
  int64_t count(int64_t size) const { return std::max<int64_t>(0, size - before - behind); }
};
// The pixels that a tap sees from an output pixel inside which sees another inside by tap `other`.
inline Run seen_by_both(int64_t tap, int64_t other) {
  return {std::max<int64_t>({0, tap, tap - other}), std::max<int64_t>({0, -tap, other - tap})};
}
// The output pixels that see a pixel inside by this tap.
inline Run seeing(int64_t tap) { return {std::max<int64_t>(0, -tap), std::max<int64_t>(0, tap)}; }

// Sums of an image's pixels over all runs of rows and of columns, of a reach.
class RunSums {
 public:
  template <class A>
  RunSums(const A* image, int64_t height, int64_t width, int64_t channels, int64_t reach);
  const double* of(const Run& rows, const Run& columns) const {
    return sums_.data() + (rows.index(reach_) * side_ * side_ + columns.index(reach_)) * channels_;
  }

 private:
  int64_t reach_, side_, channels_;
  Buffer<double> sums_;
};

// S, g×size, and G − SSᵀ/M, g×size×size, of the patches of x.
struct PatchMoments {
  Buffer<double> sums, gram;
};

// Of a channels_last x less its pivot; `finite` says whether sums of squares were, in the type they are kept in.
template <class T, class A>
PatchMoments moments_of(const Problem& problem, const T* x, const A* pivot, bool& finite);

// The outermost lines of each side of x less its pivot, zero where there are none: N×length×4×g×r×Cg.
template <class T, class A>
Buffer<A> edge_strips(const Problem& problem, const T* x, const A* pivot);
inline int64_t strip_length(const Problem& p) { return std::max(p.h, p.w) + p.radius; }
inline int64_t strip_line(const Problem& p) { return kSides * p.groups * p.radius * p.cg; }

// What a pair of taps sees from output pixels beyond an edge, along one axis: by line `i` with the one and line `j`
// with the other, counted from the edge.
struct Beyond {
  int64_t far, i, j;
};
std::vector<Beyond> beyond(int64_t radius, int64_t tap, int64_t other);

// kernel * the image that is the pivot at every pixel, for pixels of all surroundings: H×W×K.
// `kernel`: numbers in patch order, of these places.
Buffer<double> level_image(const Problem& problem, const std::vector<int>& places, const double* kernel, const double* pivot);

// For every pixel of an axis, the one in a small image that is as far from the borders, where further than `near` all
// are alike; the small image's size.
inline int64_t alike(int64_t pixel, int64_t size, int64_t near) {
  return pixel < size - near ? std::min(pixel, near) : pixel - std::max<int64_t>(size - (2 * near + 1), 0);
}
inline int64_t small_size(int64_t size, int64_t near) { return std::min(size, 2 * near + 1); }

// What the gradient of x is made of: all in float64, one number a batch norm and output.
struct InputGradient {
  const std::vector<Buffer<double>>& kernels;
  std::vector<double> scale, y_factor, mean, offset;  // offset: one an output
  bool accumulates;  // the library's convolutions can add to what is there
};

// Writes the gradient of x, from maps in channels_last, into dx of x's layout or any other.
template <class T, class A>
void write_input_gradient(const Problem& problem, const T* grad, const T* x, const A* pivot, const InputGradient& given,
                          Tensor& dx);

}  // namespace acnet::moments
