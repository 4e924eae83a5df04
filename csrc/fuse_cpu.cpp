// fuse_blocks on the CPU: output channels of all blocks in one parallel loop, split by elements, each byte moved once.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu.h"
#include "functions.h"
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
constexpr int kSums = 2048;        // of the buffer that an output row's sums go through: it stays in the first cache

// The identities' elements of row o anew, with what the branches that have a weight give there.
template <class T, class A>
ACNET_HD void add_identities(const Block& block, const Branch* branches, int64_t o, const A* scales) {
  for (int b = block.branches - 1; !branches[b].kernel; --b) {
    int const c = int(o % block.inputs), r = branches[b].row, s = branches[b].column, tap = r * block.columns + s;
    int64_t const at = block.channels_last ? int64_t(tap) * block.inputs + c : int64_t(c) * block.taps() + tap;
    static_cast<T*>(block.weight)[o * block.row() + at] = T(fold_element<T, A>(block, branches, scales, 0, A(0), o, c, r, s));
  }
}

// Row o of a contiguous weight without the identities, as many kernels at a time as the buffer holds.
template <class T, class A>
ACNET_HD void fold_row(const Block& block, const Branch* branches, int64_t o, const A* scales, A* buffer) {
  int const taps = block.taps(), chunk = kSums / taps;
  T* weight = static_cast<T*>(block.weight) + o * block.row();
  for (int first = 0; first < block.inputs; first += chunk) {
    int const count = std::min(chunk, block.inputs - first), elements = count * taps;
    T* const y = weight + int64_t(first) * taps;
    A* sums = buffer;
    if constexpr (std::is_same_v<T, A>) sums = y;
    for (int b = 0; b < block.branches && branches[b].kernel; ++b) {
      const Branch& branch = branches[b];
      A const scale = scales[b];
      int const own = branch.rows * branch.columns;
      const T* x = static_cast<const T*>(branch.kernel) + (o * block.inputs + first) * own;
      if (covers_all(block, branch)) {
        if (b == 0) for (int i = 0; i < elements; ++i) sums[i] = scale * A(x[i]);
        else for (int i = 0; i < elements; ++i) sums[i] += scale * A(x[i]);
        continue;
      }
      if (b == 0) std::fill(sums, sums + elements, A(0));
      for (int i = 0; i < branch.rows; ++i)
        for (int j = 0; j < branch.columns; ++j, ++x) {
          A* at = sums + (branch.row + i * branch.step) * block.columns + branch.column + j * branch.step;
          for (int c = 0; c < count; ++c) at[c * taps] += scale * A(x[c * own]);
        }
    }
    if constexpr (!std::is_same_v<T, A>) for (int i = 0; i < elements; ++i) y[i] = T(sums[i]);
  }
}

// Which kernels cover each tap of a block, in the order of its taps, and where they do.
class Cover {
 public:
  struct Entry {
    int branch;
    int64_t offset;  // in a row of its own kernel
  };

  void fill(const Block& block, const Branch* branches) {
    for (int r = 0; r < block.rows; ++r)
      for (int s = 0; s < block.columns; ++s) {
        for (int b = 0; b < block.branches && branches[b].kernel; ++b) {
          const Branch& branch = branches[b];
          int const i = tap_of(r, branch.row, branch.rows, branch.step), j = tap_of(s, branch.column, branch.columns, branch.step);
          if (i >= 0 && j >= 0) entries_.push_back({b, int64_t(i * branch.columns + j) * block.inputs});
        }
        ends_.push_back(entries_.size());
      }
  }

  const Entry* begin(int tap) const { return entries_.data() + (tap ? ends_[tap - 1] : 0); }
  const Entry* end(int tap) const { return entries_.data() + ends_[tap]; }

 private:
  std::vector<Entry> entries_;
  std::vector<size_t> ends_;
};

// Row o of a channels_last weight without the identities: each tap is a vector over the input channels.
template <class T, class A>
ACNET_HD void fold_row_channels_last(const Block& block, const Branch* branches, const Cover& cover, int64_t o, const A* scales,
                                     A* sums) {
  int64_t const n = block.inputs;
  T* y = static_cast<T*>(block.weight) + o * block.row();
  const T* rows[kMostBranches];
  for (int b = 0; b < block.branches && branches[b].kernel; ++b)
    rows[b] = static_cast<const T*>(branches[b].kernel) + o * branches[b].rows * branches[b].columns * n;
  for (int tap = 0, taps = block.taps(); tap < taps; ++tap, y += n) {
    const Cover::Entry *const first = cover.begin(tap), *const end = cover.end(tap);
    auto kernel = [&](const Cover::Entry& entry) __attribute__((always_inline)) { return rows[entry.branch] + entry.offset; };
    if (first == end) {
      std::fill(y, y + n, T(0));
    } else if (end - first == 1) {
      const T* x = kernel(first[0]);
      A const a = scales[first[0].branch];
      for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]));
    } else if (end - first == 2) {
      const T *x = kernel(first[0]), *z = kernel(first[1]);
      A const a = scales[first[0].branch], b = scales[first[1].branch];
      for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]) + b * A(z[c]));
    } else if (end - first == 3) {
      const T *x = kernel(first[0]), *z = kernel(first[1]), *w = kernel(first[2]);
      A const a = scales[first[0].branch], b = scales[first[1].branch], d = scales[first[2].branch];
      for (int64_t c = 0; c < n; ++c) y[c] = T(a * A(x[c]) + b * A(z[c]) + d * A(w[c]));
    } else {
      for (int64_t begin = 0; begin < n; begin += kSums) {
        int const count = int(std::min(int64_t(kSums), n - begin));
        std::fill(sums, sums + count, A(0));
        for (const Cover::Entry* entry = first; entry != end; ++entry) {
          const T* x = kernel(*entry) + begin;
          for (int c = 0; c < count; ++c) sums[c] += scales[entry->branch] * A(x[c]);
        }
        for (int c = 0; c < count; ++c) y[begin + c] = T(sums[c]);
      }
    }
  }
}

// Row o from tensors of any strides.
template <class T, class A>
ACNET_HD void fold_row_strided(const Block& block, const Branch* branches, int64_t o, const A* scales) {
  int64_t const n = block.inputs, taps = block.taps();
  int64_t const step_c = block.channels_last ? 1 : taps, step_tap = block.channels_last ? n : 1;
  T* weight = static_cast<T*>(block.weight) + o * block.row();
  for (int64_t c = 0; c < n; ++c)
    for (int r = 0; r < block.rows; ++r)
      for (int s = 0; s < block.columns; ++s)
        weight[c * step_c + (r * block.columns + s) * step_tap] =
            T(fold_element<T, A>(block, branches, scales, 0, A(0), o, c, r, s));
}

template <class T>
ACNET_HD void fold_rows_of(const Block& block, const Branch* branches, int64_t begin, int64_t end) {
  using A = typename Accumulate<T>::type;
  alignas(64) A sums[kSums];
  A scales[kMostBranches];
  bool const plain = block.dense && block.taps() <= kSums;
  Cover cover;
  if (plain && block.channels_last) cover.fill(block, branches);
  for (int64_t o = begin; o < end; ++o) {
    static_cast<T*>(block.bias)[o] = T(fold_channel<A>(block, branches, o, scales));
    if (!plain) {
      fold_row_strided<T, A>(block, branches, o, scales);
      continue;
    }
    if (block.channels_last) fold_row_channels_last<T, A>(block, branches, cover, o, scales, sums);
    else fold_row<T, A>(block, branches, o, scales, sums);
    add_identities<T, A>(block, branches, o, scales);
  }
}

ACNET_CLONES void fold_rows(const Block& block, const Branch* branches, int64_t begin, int64_t end) {
  switch (block.dtype) {
    case kFloat: return fold_rows_of<float>(block, branches, begin, end);
    case kDouble: return fold_rows_of<double>(block, branches, begin, end);
    case kHalf: return fold_rows_of<c10::Half>(block, branches, begin, end);
    default: return fold_rows_of<c10::BFloat16>(block, branches, begin, end);
  }
}

#ifdef ACNET_SIMD
// The same for contiguous float32, where the instruction set ISA has patterns for the branches; false where not.
template <class ISA>
bool fold_rows_simd(const Block& block, const Branch* branches, int64_t begin, int64_t end, Patterns<ISA::width>& patterns) {
  if (!patterns.prepare(block, branches)) return false;
  int const taps = block.taps();
  float scales[kMostBranches];
  for (int64_t o = begin; o < end; ++o) {
    static_cast<float*>(block.bias)[o] = fold_channel<float>(block, branches, o, scales);
    float* const weight = static_cast<float*>(block.weight) + o * block.row();
    for (int64_t e = fold_row_simd(block, branches, o, scales, patterns); e < block.row(); ++e) {
      int const tap = int(e % taps);
      weight[e] = fold_element<float>(block, branches, scales, 0, 0.0f, o, e / taps, tap / block.columns, tap % block.columns);
    }
    add_identities<float>(block, branches, o, scales);
  }
  return true;
}
#endif

// Folds ranges of channels with the widest instructions there are; one a thread.
class Folder {
 public:
  void operator()(const Block& block, const Branch* branches, int64_t begin, int64_t end) {
#ifdef ACNET_SIMD
    static Isa const isa = best_isa();
    if (isa == Isa::avx512 && fold_rows_simd<Avx512>(block, branches, begin, end, avx512_)) return;
    if (isa != Isa::generic && fold_rows_simd<Avx2>(block, branches, begin, end, avx2_)) return;
#endif
    fold_rows(block, branches, begin, end);
  }

 private:
#ifdef ACNET_SIMD
  Patterns<Avx512::width> avx512_;
  Patterns<Avx2::width> avx2_;
#endif
};

void check_variances(const Fusion& fusion) {
  for (size_t i = 0; i < fusion.blocks.size(); ++i) {
    const Block& block = fusion.blocks[i];
    for (int b = 0; b < block.branches + block.normed; ++b) {
      const Branch& branch = fusion.branches[block.first_branch + b];
      if (!branch.params[kVar] || branch.any_variance) continue;
      for (int64_t o = 0; o < block.channels; ++o) {
        double const var = norm_param(branch, kVar, o, 0.0);
        if (var >= 0 && var + branch.eps > 0 && std::isfinite(var)) continue;
        require.fail(Label{i, branch.index, "var", b == block.branches}, " must be finite, not negative, and positive with eps added, got ",
                     var, " in channel ", o);
      }
    }
  }
}

void run(const Fusion& fusion) {
  check_variances(fusion);
  const std::vector<Block>& blocks = fusion.blocks;
  std::vector<int64_t> starts(1, 0);  // of the blocks, in elements of all outputs together
  for (const Block& block : blocks) starts.push_back(starts.back() + block.numel());
  // A thread's range of elements stands for the channels that begin in it.
  auto range = [&](int64_t begin, int64_t end) {
    Folder fold;
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < blocks.size() && starts[i] < end; ++i) {
      int64_t const row = blocks[i].row();
      auto first_from = [&](int64_t element) { return (std::max(element - starts[i], int64_t(0)) + row - 1) / row; };
      fold(blocks[i], &fusion.branches[blocks[i].first_branch], first_from(begin),
           std::min(first_from(end), int64_t(blocks[i].channels)));
    }
  };
  using Range = decltype(range);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<Range*>(context))(begin, end); };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, starts.back(), kGrain, call, &range));
}

}  // namespace

std::tuple<Tensors, Tensors> fuse_blocks(const Tensors& weight, const Tensors& gamma, const Tensors& beta,
                                         const Tensors& mean, const Tensors& var, const Tensors& conv_bias,
                                         const std::vector<int64_t>& blocks, const std::vector<int64_t>& branches,
                                         const std::vector<double>& eps) {
  Fusion fusion = describe_blocks({weight, gamma, beta, mean, var, conv_bias, blocks, branches, eps}, nullptr, nullptr);
  run(fusion);
  return {std::move(fusion.weights), std::move(fusion.biases)};
}

namespace {

void fuse_blocks_out(const Tensors& weight, const Tensors& gamma, const Tensors& beta, const Tensors& mean,
                     const Tensors& var, const Tensors& conv_bias, const std::vector<int64_t>& blocks,
                     const std::vector<int64_t>& branches, const std::vector<double>& eps, const Tensors& weight_out,
                     const Tensors& bias_out) {
  Fusion const fusion = describe_blocks({weight, gamma, beta, mean, var, conv_bias, blocks, branches, eps}, &weight_out, &bias_out);
  run(fusion);
}

}  // namespace
}  // namespace acnet

STABLE_TORCH_LIBRARY_FRAGMENT(acnet_kernels, library) {
  library.def(
      "fuse_blocks(Tensor[] weight, Tensor[] gamma, Tensor[] beta, Tensor[] mean, Tensor[] var, Tensor[] conv_bias, "
      "int[] blocks, int[] branches, float[] eps) -> (Tensor[], Tensor[])");
  library.def(
      "fuse_blocks_out(Tensor[] weight, Tensor[] gamma, Tensor[] beta, Tensor[] mean, Tensor[] var, Tensor[] conv_bias, "
      "int[] blocks, int[] branches, float[] eps, Tensor(a!)[] weight_out, Tensor(b!)[] bias_out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(acnet_kernels, CPU, library) {
  library.impl("fuse_blocks", TORCH_BOX(&acnet::fuse_blocks));
  library.impl("fuse_blocks_out", TORCH_BOX(&acnet::fuse_blocks_out));
}
