// fuse_blocks on the CPU: output channels of all blocks in one parallel loop, split by elements, each byte moved once.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>

#include "fuse_blocks.h"
#include "fuse_simd.h"

// One compilation per instruction set, chosen when the library is loaded: the build itself targets any x86-64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ACNET_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define ACNET_CLONES
#endif

namespace acnet {
namespace {

constexpr int64_t kGrain = 16384;     // elements worth a thread of their own
constexpr int kCrossElements = 2048;  // of the buffer that holds what hor and ver add: it stays in the first cache

// Row o of a contiguous weight. hor and ver touch 2k−1 of each k×k kernel: they are laid out in
// `sums` first, whose other elements stay 0 for the whole block, so that the pass over square and weight is one straight
// vector loop. K is k where it is known at compile time, else 0.
template <int K, class T, class A>
ACNET_HD void fold_row(const Block& block, int64_t o, const A* scale, A* sums) {
  int const k = K ? K : block.k, taps = k * k, hor_row = block.hor_row, ver_column = block.ver_column;
  const T* square = static_cast<const T*>(block.kernels[kSquare]) + o * block.row();
  const T* hor = static_cast<const T*>(block.kernels[kHor]);
  const T* ver = static_cast<const T*>(block.kernels[kVer]);
  if (hor) hor += o * block.inputs * k;
  if (ver) ver += o * block.inputs * k;
  T* weight = static_cast<T*>(block.weight) + o * block.row();
  int const chunk = kCrossElements / taps;
  for (int first = 0; first < block.inputs; first += chunk) {
    int const count = std::min(chunk, block.inputs - first);
    for (int c = 0; ver && c < count; ++c)
      for (int r = 0; r < k; ++r)
        sums[c * taps + r * k + ver_column] = cross(scale[kHor], A(0), scale[kVer], A(ver[(first + c) * k + r]));
    for (int c = 0; hor && c < count; ++c) {
      for (int s = 0; s < k; ++s)
        if (s != ver_column || !ver)
          sums[c * taps + hor_row * k + s] = cross(scale[kHor], A(hor[(first + c) * k + s]), scale[kVer], A(0));
      if (ver)
        sums[c * taps + hor_row * k + ver_column] = cross(scale[kHor], A(hor[(first + c) * k + ver_column]), scale[kVer],
                                                          A(ver[(first + c) * k + hor_row]));
    }
    const T* x = square + int64_t(first) * taps;
    T* y = weight + int64_t(first) * taps;
    for (int i = 0; i < count * taps; ++i) y[i] = T(scale[kSquare] * A(x[i]) + sums[i]);
  }
}

// Row o of a channels_last weight: each tap is a vector over the input channels.
template <class T, class A>
ACNET_HD void fold_row_channels_last(const Block& block, int64_t o, const A* scale) {
  int const k = block.k;
  int64_t const n = block.inputs;
  const T* x = static_cast<const T*>(block.kernels[kSquare]) + o * block.row();
  const T* hor = static_cast<const T*>(block.kernels[kHor]);
  const T* ver = static_cast<const T*>(block.kernels[kVer]);
  T* y = static_cast<T*>(block.weight) + o * block.row();
  for (int r = 0; r < k; ++r)
    for (int s = 0; s < k; ++s, x += n, y += n) {
      const T* h = hor && r == block.hor_row ? hor + (o * k + s) * n : nullptr;
      const T* v = ver && s == block.ver_column ? ver + (o * k + r) * n : nullptr;
      A const a = scale[kSquare], b = scale[kHor], d = scale[kVer];
      if (h && v) for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]) + cross(b, A(h[c]), d, A(v[c])));
      else if (h) for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]) + cross(b, A(h[c]), d, A(0)));
      else if (v) for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]) + cross(b, A(0), d, A(v[c])));
      else for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]));
    }
}

// Row o from tensors of any strides.
template <class T, class A>
ACNET_HD void fold_row_strided(const Block& block, int64_t o, const A* scale) {
  int64_t const n = block.inputs, k = block.k;
  int64_t const step_c = block.channels_last ? 1 : k * k, step_tap = block.channels_last ? n : 1;
  T* weight = static_cast<T*>(block.weight) + o * block.row();
  for (int64_t c = 0; c < n; ++c)
    for (int r = 0; r < k; ++r)
      for (int s = 0; s < k; ++s) {
        A const x = load_square<T, A>(block, o, c, r, s);
        weight[c * step_c + (r * k + s) * step_tap] = T(fold_element<T, A>(block, scale, x, o, c, r, s));
      }
}

bool dense_branches(const Block& block) {  // hor and ver in the order of weight, as square
  int32_t const n = block.inputs, k = block.k, c = block.channels_last ? 1 : k, tap = block.channels_last ? n : 1;
  auto dense = [=](const int32_t* stride) { return stride[0] == n * k && (n == 1 || stride[1] == c) && (k == 1 || stride[2] == tap); };
  return (!block.kernels[kHor] || dense(block.hor_strides)) && (!block.kernels[kVer] || dense(block.ver_strides));
}

template <class T>
ACNET_HD void fold_rows_of(const Block& block, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  bool const dense = block.same_order && dense_branches(block) && block.k * block.k <= kCrossElements;
  alignas(64) A sums[kCrossElements];
  if (dense && !block.channels_last) std::fill(sums, sums + kCrossElements, A(0));
  for (int64_t o = begin; o < end; ++o) {
    Channel<A> const channel = fold_channel<A>(block, o);
    static_cast<T*>(block.bias)[o] = T(channel.bias);
    if (!dense) fold_row_strided<T, A>(block, o, channel.scale);
    else if (block.channels_last) fold_row_channels_last<T, A>(block, o, channel.scale);
    else if (block.k == 3) fold_row<3, T, A>(block, o, channel.scale, sums);
    else fold_row<0, T, A>(block, o, channel.scale, sums);
  }
}

ACNET_CLONES void fold_rows(const Block& block, int64_t begin, int64_t end) {
  switch (block.dtype) {
    case kFloat: return fold_rows_of<float>(block, begin, end);
    case kDouble: return fold_rows_of<double>(block, begin, end);
    case kHalf: return fold_rows_of<c10::Half>(block, begin, end);
    default: return fold_rows_of<c10::BFloat16>(block, begin, end);
  }
}

#ifdef ACNET_SIMD
// The same for contiguous float32, where the instruction set ISA has a pattern for the kernel; false where not.
template <class ISA>
bool fold_rows_simd(const Block& block, int64_t begin, int64_t end, Pattern<ISA::width>& pattern) {
  if (block.dtype != kFloat || block.channels_last || !block.same_order || !dense_branches(block)) return false;
  if (!block.kernels[kHor] || !block.kernels[kVer] || !pattern.prepare(block)) return false;
  int const k = block.k;
  for (int64_t o = begin; o < end; ++o) {
    Channel<float> const channel = fold_channel<float>(block, o);
    static_cast<float*>(block.bias)[o] = channel.bias;
    for (int64_t e = fold_row_simd(block, o, channel.scale, pattern); e < block.row(); ++e) {
      int64_t const c = e / (k * k);
      int const r = int(e / k % k), s = int(e % k);
      float const x = load_square<float, float>(block, o, c, r, s);
      static_cast<float*>(block.weight)[o * block.row() + e] = fold_element<float>(block, channel.scale, x, o, c, r, s);
    }
  }
  return true;
}
#endif

// Folds ranges of channels with the widest instructions there are; one a thread.
class Folder {
 public:
  void operator()(const Block& block, int64_t begin, int64_t end) {
#ifdef ACNET_SIMD
    static bool const has_avx512 = __builtin_cpu_supports("avx512f"), has_avx2 = __builtin_cpu_supports("avx2");
    if (has_avx512 && fold_rows_simd<Avx512>(block, begin, end, avx512_)) return;
    if (has_avx2 && fold_rows_simd<Avx2>(block, begin, end, avx2_)) return;
#endif
    fold_rows(block, begin, end);
  }

 private:
#ifdef ACNET_SIMD
  Pattern<Avx512::width> avx512_;
  Pattern<Avx2::width> avx2_;
#endif
};

void check_variances(const std::vector<Block>& blocks, const std::vector<int64_t>& present) {
  for (size_t i = 0; i < blocks.size(); ++i)
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!blocks[i].kernels[slot] || present[3 * i + slot] & kAnyVariance) continue;
      const void* data = blocks[i].norms[slot][kVar];
      uint32_t const dtype = blocks[i].norm_dtypes >> 2 * (slot * kParams + kVar) & 3;
      for (int64_t o = 0; o < blocks[i].channels; ++o) {
        double const var = load_param<double>(data, dtype, o);
        if (var >= 0 && var + blocks[i].eps[slot] > 0 && std::isfinite(var)) continue;
        require.fail(Label{i, slot, kVar}, " must be finite, not negative, and positive with eps added, got ", var,
             " in channel ", o);
      }
    }
}

void run(const std::vector<Block>& blocks, const std::vector<int64_t>& present) {
  check_variances(blocks, present);
  std::vector<int64_t> starts(1, 0);  // of the blocks, in elements of all outputs together
  for (const Block& block : blocks) starts.push_back(starts.back() + block.numel());
  // A thread's range of elements stands for the channels that begin in it.
  auto range = [&](int64_t begin, int64_t end) {
    Folder fold;
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < blocks.size() && starts[i] < end; ++i) {
      int64_t const row = blocks[i].row();
      auto first_from = [&](int64_t element) { return (std::max(element - starts[i], int64_t(0)) + row - 1) / row; };
      fold(blocks[i], first_from(begin), std::min(first_from(end), int64_t(blocks[i].channels)));
    }
  };
  using Range = decltype(range);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<Range*>(context))(begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, starts.back(), kGrain, call, &range));
}

std::tuple<Tensors, Tensors> fuse_blocks(const Tensors& square, const Tensors& hor, const Tensors& ver,
                                         const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                                         const Tensors& var, const Tensors& conv_bias,
                                         const std::vector<int64_t>& present, const std::vector<double>& eps,
                                         const std::vector<int64_t>& place) {
  Fusion fusion = describe_blocks({square, hor, ver, gamma, beta, mean, var, conv_bias, present, eps, place}, nullptr, nullptr);
  run(fusion.blocks, present);
  return {std::move(fusion.weights), std::move(fusion.biases)};
}

void fuse_blocks_out(const Tensors& square, const Tensors& hor, const Tensors& ver,
                     const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                     const Tensors& var, const Tensors& conv_bias,
                     const std::vector<int64_t>& present, const std::vector<double>& eps,
                     const std::vector<int64_t>& place, const Tensors& weight_out,
                     const Tensors& bias_out) {
  Fusion const fusion = describe_blocks({square, hor, ver, gamma, beta, mean, var, conv_bias, present, eps, place}, &weight_out, &bias_out);
  run(fusion.blocks, present);
}

}  // namespace
}  // namespace acnet

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, library) {
  library.def(
      "fuse_blocks(Tensor[] square, Tensor[] hor, Tensor[] ver, Tensor[] gamma, Tensor[] beta, Tensor[] mean, "
      "Tensor[] var, Tensor[] conv_bias, int[] present, float[] eps, int[] place) -> (Tensor[], Tensor[])");
  library.def(
      "fuse_blocks_out(Tensor[] square, Tensor[] hor, Tensor[] ver, Tensor[] gamma, Tensor[] beta, Tensor[] mean, "
      "Tensor[] var, Tensor[] conv_bias, int[] present, float[] eps, int[] place, Tensor(a!)[] weight_out, "
      "Tensor(b!)[] bias_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, library) {
  library.impl("fuse_blocks", TORCH_BOX(&acnet::fuse_blocks));
  library.impl("fuse_blocks_out", TORCH_BOX(&acnet::fuse_blocks_out));
}
