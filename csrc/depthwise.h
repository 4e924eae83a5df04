// Blocks of depthwise branches on the CPU: one pass over the maps whatever the number of branches.
//
// depthwise_kernels.h holds the passes and depthwise_algebra.h the small algebra between them, written once and compiled
// for several instruction sets (depthwise_{generic,avx2,avx512}.cpp): a vector's lanes are channels, of which a pass takes
// `lanes` at a time. depthwise_plan.h says where taps meet pixels. depthwise.cpp holds the operators: checks, tasks,
// threads, merging. Which rows are summed together depends on the shapes alone: results are the same bits for every
// number of threads.
#pragma once

#include <cstdint>

#include "activation.h"
#include "depthwise_plan.h"
#include "rows.h"

namespace acnet::depthwise {

// What the gradient takes from the activation after the convolution: g·act'(z). A clamp's slope is told by its output; of the others z is
// computed again, from what `convolve` took, and the residual.
template <class T, class A>
struct Slope {
  Activation activation = Activation::none;
  const T* kept = nullptr;  // a clamp's output; of others the residual, or null: where grad is, with its strides
  const A *weights = nullptr, *init = nullptr;
};

// The passes take rows by number, through all images. Arrays have an entry a lane for each of their numbers.
template <class T, class A>
struct Passes {
  int lanes;
  // Adds the products of x − pivot (see Plan) over rows [begin, end), the input's where by_kind and else the output's,
  // and its sums by fine kind.
  void (*moments)(const Plan&, const Map<const T>& x, const A* pivot, int64_t begin, int64_t end, A* scratch,
                  double* products, double* sums);
  // out = init of the pixel's kind + Σ_t weights[t]·(x − pivot)[·, t], and what follows, output rows [begin, end).
  void (*convolve)(const Plan&, const Map<const T>& x, const A* pivot, const A* weights, const A* init,
                   const After<T>& after, const Map<T>& out, int64_t begin, int64_t end, A* scratch);
  // Adds Σ_p g[p]·(x − pivot)[p, t], and Σ g by kind of output pixels, over output rows [begin, end), g being grad times
  // the slope. Leaves g in `sloped` unless that is null.
  void (*correlate)(const Plan&, const Map<const T>& x, const A* pivot, const Map<const T>& grad, const Slope<T, A>& slope,
                    const Map<T>& sloped, int64_t begin, int64_t end, A* scratch, double* products, double* sums);
  // dx = init of the pixel's kind + Σ weights·g + correction·(x − pivot), input rows [begin, end). `grads`, `weights` and
  // a clamp's `kept` outputs, as Slope has them, are those of each output channel of an input channel.
  void (*gradient)(const Plan&, const Map<const T>& x, const A* pivot, const Map<const T>* grads, Activation clamp,
                   const T* const* kept, const A* weights, const A* correction, const A* init, const Map<T>& dx,
                   int64_t begin, int64_t end, A* scratch);
};

// In double; M is the number of pixels summed over.
template <class A>
struct Algebra {
  int lanes;
  // From `moments`' sums: G − SSᵀ/M of the patches (taps × taps) and S (taps). Scratch is of Plan::algebra vectors.
  void (*covariance)(const Plan&, const double* products, const double* sums, const double* pivot, double* scratch,
                     double* gram, double* patch_sums);
  // Of a kernel with these taps: its W·S/M, W·(G − SSᵀ/M) and W·(G − SSᵀ/M)·Wᵀ/M.
  void (*statistics)(const Plan&, const int* places, int count, const double* weight, const double* gram,
                     const double* patch_sums, double* mean, double* variance, double* centred);
  // What `convolve` takes for this kernel (taps) and bias.
  void (*fold)(const Plan&, const double* kernel, const double* bias, const double* pivot, A* weights, A* init);
  // Σ_p g[p]·x[p, t] and Σ g, from `correlate`'s sums.
  void (*patch_gradient)(const Plan&, const double* products, const double* sums, const double* pivot, double* gradient,
                         double* total);
  // What `gradient` takes, from Σ_b slope_b·W_b[t]·W_b[t′] (taps × taps) and Σ_b level_b·W_b[t] (taps).
  void (*correct)(const Plan&, const double* squares, const double* levels, const double* pivot, double* scratch,
                  A* correction, A* init);
};

#define ACNET_DEPTHWISE_DECLARE(isa) \
  namespace isa {                    \
  template <class T, class A>        \
  Passes<T, A> passes();             \
  template <class A>                 \
  Algebra<A> algebra();              \
  }
ACNET_DEPTHWISE_DECLARE(generic)
#if defined(__x86_64__)
ACNET_DEPTHWISE_DECLARE(avx2)
ACNET_DEPTHWISE_DECLARE(avx512)
#endif
#undef ACNET_DEPTHWISE_DECLARE

}  // namespace acnet::depthwise
