// Folding one block, a list of branches: W[o,c,r,s] = Σ_b s_b[o]·embed(W_b)[o,c,r,s],
// bias[o] = Σ_b (β_b + s_b·(conv_bias_b − μ_b))[o] with s_b = γ_b/√(σ²_b + ε_b) (arXiv 1908.03930 §3.3). A branch without
// weight, the identity, has a diagonal of ones at its tap: output channel o reads the input channel o of its group. A
// batch norm after the sum multiplies all s_b, and makes of the bias β + s·(bias + conv_bias − μ).
// The arithmetic of one channel and of one weight element, and the descriptors it reads from: shared by the CPU operator,
// the CUDA kernel and the tests that run the latter's body. Every form adds the branches with a weight in their order,
// then the identities.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define ACNET_HD __host__ __device__ __forceinline__
#else
#define ACNET_HD inline __attribute__((always_inline))
#endif

namespace acnet {

constexpr int kMostBranches = 64;  // of a block: their scales must fit a CUDA tile

enum Dtype : uint32_t { kFloat, kDouble, kHalf, kBFloat16 };  // two bits each in Branch::dtypes
enum Param { kGamma, kBeta, kMean, kVar, kConvBias, kParams };  // each (K,), contiguous; null where absent

// Sizes and strides count elements; they are 32-bit so that a whole network's descriptors fit into a CUDA launch's
// parameters. Offsets are computed in 64 bits.
struct Branch {
  const void* kernel;  // K×C×rows×columns; null for the identity
  const void* params[kParams];
  double eps;
  int32_t strides[4];  // of o, c, r, s
  uint16_t dtypes : 2 * kParams;   // Dtype of params[param] at bit 2·param
  uint16_t any_variance : 1;       // it is taken as it is
  uint8_t row, column, rows, columns, step;  // the taps, `step` apart, from (row, column) on
  uint8_t index;       // among the block's branches as they were given
};

struct Block {
  void* weight;              // out: K×C×k_h×k_w, dense, in the order that channels_last says
  void* bias;                // out: K
  int32_t channels;          // K
  int32_t inputs;            // C (per group)
  int32_t first_tile;        // CUDA: the first of the launch's tiles that is this block's
  int32_t first_branch;      // of all blocks' branches: those with a weight, then identities, then the sum's norm
  uint8_t branches;          // without the sum's norm
  uint8_t rows, columns;     // k_h, k_w
  uint8_t dtype : 2;         // of the kernels and the outputs
  uint8_t channels_last : 1; // order of weight: (o, r, s, c), else (o, c, r, s)
  uint8_t dense : 1;         // all kernels are dense in that order
  uint8_t aligned : 1;       // the first branch's is, covers all taps, and starts on 16 bytes, as weight
  uint8_t normed : 1;        // the sum has a batch norm

  ACNET_HD int taps() const { return int(rows) * columns; }
  ACNET_HD int64_t row() const { return int64_t(inputs) * taps(); }  // elements of one output channel
  ACNET_HD int64_t numel() const { return channels * row(); }
};

ACNET_HD bool covers_all(const Block& block, const Branch& branch) {
  return branch.kernel && branch.rows == block.rows && branch.columns == block.columns;
}

// What sums are accumulated in: float64 for float64 weights, float32 for all others.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };

template <class A>
ACNET_HD A load_param(const void* data, uint32_t dtype, int64_t i) {
  switch (dtype) {
    case kFloat: return A(static_cast<const float*>(data)[i]);
    case kDouble: return A(static_cast<const double*>(data)[i]);
    case kHalf: return A(float(static_cast<const c10::Half*>(data)[i]));
    default: return A(float(static_cast<const c10::BFloat16*>(data)[i]));
  }
}

template <class A>
ACNET_HD A norm_param(const Branch& branch, int param, int64_t o, A absent) {
  const void* data = branch.params[param];
  return data ? load_param<A>(data, branch.dtypes >> 2 * param & 3, o) : absent;
}

template <class A>
ACNET_HD A norm_scale(const Branch& branch, int64_t o) {
  A const gamma = norm_param(branch, kGamma, o, A(1));
  return branch.params[kVar] ? gamma / std::sqrt(norm_param(branch, kVar, o, A(1)) + A(branch.eps)) : gamma;
}

template <class A>
ACNET_HD A norm_offset(const Branch& branch, int64_t o) {
  return norm_param(branch, kConvBias, o, A(0)) - norm_param(branch, kMean, o, A(0));
}

// Writes the branches' scales for output channel o; returns its fused bias.
template <class A>
ACNET_HD A fold_channel(const Block& block, const Branch* branches, int64_t o, A* scales) {
  A bias = 0;
  for (int b = 0; b < block.branches; ++b) {
    A const scale = norm_scale<A>(branches[b], o);
    scales[b] = scale;
    bias += norm_param(branches[b], kBeta, o, A(0)) + scale * norm_offset<A>(branches[b], o);
  }
  if (block.normed) {
    const Branch& norm = branches[block.branches];
    A const scale = norm_scale<A>(norm, o);
    for (int b = 0; b < block.branches; ++b) scales[b] *= scale;
    bias = norm_param(norm, kBeta, o, A(0)) + scale * (bias + norm_offset<A>(norm, o));
  }
  return bias;
}

// The place of row or column `at` of the kernel among a branch's, or -1.
ACNET_HD int tap_of(int at, int first, int count, int step) {
  at -= first;
  if (at < 0) return -1;
  if (step != 1) {
    if (at % step) return -1;
    at /= step;
  }
  return at < count ? at : -1;
}

// Adds the branches from `first` on to weight element (o, c, r, s), from tensors of any strides.
template <class T, class A>
ACNET_HD A fold_element(const Block& block, const Branch* branches, const A* scales, int first, A sum, int64_t o,
                        int64_t c, int r, int s) {
  for (int b = first; b < block.branches; ++b) {
    const Branch& branch = branches[b];
    int const i = tap_of(r, branch.row, branch.rows, branch.step), j = tap_of(s, branch.column, branch.columns, branch.step);
    if (i < 0 || j < 0) continue;
    const int32_t* stride = branch.strides;
    if (branch.kernel)
      sum += scales[b] * A(static_cast<const T*>(branch.kernel)[o * stride[0] + c * stride[1] + i * stride[2] + j * stride[3]]);
    else if (c == o % block.inputs) sum += scales[b];
  }
  return sum;
}

}  // namespace acnet
