// Folding one block: W[o,c,r,s] = Σ_b s_b[o]·embed(W_b)[o,c,r,s], bias[o] = Σ_b (β_b + s_b·(conv_bias_b − μ_b))[o]
// with s_b = γ_b/√(σ²_b + ε_b) (arXiv 1908.03930 §3.3). The arithmetic of one channel and of one weight element, and
// the descriptor it reads from: shared by the CPU operator, the CUDA kernel and the tests that run the latter's body.
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

enum Dtype : uint32_t { kFloat, kDouble, kHalf, kBFloat16 };  // two bits each in Block::norm_dtypes
enum Slot { kSquare, kHor, kVer, kSlots };
enum Param { kGamma, kBeta, kMean, kVar, kConvBias, kParams };  // each (K,), contiguous; null where absent

// One block's tensors. Sizes and strides count elements; they are 32-bit so that a whole network's descriptors fit
// into a CUDA launch's parameters. Offsets are computed in 64 bits.
struct Block {
  void* weight;                      // out: K×C×k×k, dense, in the order that channels_last says
  void* bias;                        // out: K
  const void* kernels[kSlots];       // K×C×k×k, K×C×1×k, K×C×k×1; hor and ver null where absent
  const void* norms[kSlots][kParams];
  double eps[kSlots];
  int32_t square_strides[4];         // of o, c, r, s
  int32_t hor_strides[3];            // of o, c, s
  int32_t ver_strides[3];            // of o, c, r
  int32_t channels;                  // K
  int32_t inputs;                    // C (per group)
  int32_t first_tile;                // CUDA: the first of the launch's tiles that is this block's
  uint32_t norm_dtypes;              // Dtype of norms[slot][param] at bit 2·(slot·kParams + param)
  uint8_t k;
  uint8_t hor_row;
  uint8_t ver_column;
  uint8_t dtype : 2;                 // of the kernels and the outputs
  uint8_t channels_last : 1;         // order of weight: (o, r, s, c), else (o, c, r, s)
  uint8_t same_order : 1;            // square is dense in the same order as weight
  uint8_t aligned : 1;               // and both start on 16 bytes

  ACNET_HD int64_t row() const { return int64_t(inputs) * k * k; }  // elements of one output channel
  ACNET_HD int64_t numel() const { return channels * row(); }
};

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
struct Channel {
  A scale[kSlots];  // 0 where the branch is absent
  A bias;
};

template <class A>
ACNET_HD A norm_param(const Block& block, int slot, int param, int64_t o, A absent) {
  const void* data = block.norms[slot][param];
  return data ? load_param<A>(data, block.norm_dtypes >> 2 * (slot * kParams + param) & 3, o) : absent;
}

// The scales and the fused bias of output channel o.
template <class A>
ACNET_HD Channel<A> fold_channel(const Block& block, int64_t o) {
  Channel<A> out = {};
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!block.kernels[slot]) continue;
    A const var = norm_param(block, slot, kVar, o, A(1)) + A(block.eps[slot]);
    A const scale = norm_param(block, slot, kGamma, o, A(1)) / std::sqrt(var);
    A const offset = norm_param(block, slot, kConvBias, o, A(0)) - norm_param(block, slot, kMean, o, A(0));
    out.scale[slot] = scale;
    out.bias += norm_param(block, slot, kBeta, o, A(0)) + scale * offset;
  }
  return out;
}

// What hor and ver add to element (r, s) of a kernel; h and v are their weights there, 0 off their row and column.
template <class A>
ACNET_HD A cross(A hor_scale, A h, A ver_scale, A v) { return hor_scale * h + ver_scale * v; }

// Weight element (o, c, r, s) from tensors of any strides.
template <class T, class A>
ACNET_HD A fold_element(const Block& block, const A* scale, A square, int64_t o, int64_t c, int r, int s) {
  A h = 0, v = 0;
  if (block.kernels[kHor] && r == block.hor_row) {
    const int32_t* stride = block.hor_strides;
    h = A(static_cast<const T*>(block.kernels[kHor])[o * stride[0] + c * stride[1] + s * stride[2]]);
  }
  if (block.kernels[kVer] && s == block.ver_column) {
    const int32_t* stride = block.ver_strides;
    v = A(static_cast<const T*>(block.kernels[kVer])[o * stride[0] + c * stride[1] + r * stride[2]]);
  }
  return scale[kSquare] * square + cross(scale[kHor], h, scale[kVer], v);
}

template <class T, class A>
ACNET_HD A load_square(const Block& block, int64_t o, int64_t c, int r, int s) {
  const int32_t* stride = block.square_strides;
  int64_t const at = o * stride[0] + c * stride[1] + r * stride[2] + s * stride[3];
  return A(static_cast<const T*>(block.kernels[kSquare])[at]);
}

}  // namespace acnet
