// The arguments of fuse_blocks and fuse_blocks_out: checked, and turned into descriptors. Included by the CPU and by
// the CUDA source, which go into libraries of their own.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "check.h"
#include "fuse_math.h"

namespace acnet {

// As the schema names them; L blocks of B entries in all. The lists of tensors hold those that are present.
struct FuseArguments {
  const Tensors& weight;
  const Tensors& gamma;
  const Tensors& beta;
  const Tensors& mean;
  const Tensors& var;
  const Tensors& conv_bias;
  const std::vector<int64_t>& blocks;    // 4L: the number of entries, k_h, k_w, groups
  const std::vector<int64_t>& branches;  // 6B: present, a sum of Present; row, column, rows, columns, step
  const std::vector<double>& eps;        // B
};

enum Present : int64_t {
  kHasWeight = 1, kHasGamma = 2, kHasBeta = 4, kHasMean = 8, kHasVar = 16, kHasConvBias = 32,
  kAnyVariance = 64,
  kSum = 128  // no branch, but the batch norm after the sum of those before it
};
constexpr int64_t kPresentBits[kParams] = {kHasGamma, kHasBeta, kHasMean, kHasVar, kHasConvBias};  // by Param
constexpr size_t kBlockNumbers = 4, kBranchNumbers = 6;

struct Fusion {
  std::vector<Block> blocks;
  std::vector<Branch> branches;
  Tensors weights, biases;  // the outputs
  Tensors copies;           // contiguous copies of strided parameters: alive as long as the descriptors
};

constexpr const char* kParamNames[] = {"gamma", "beta", "mean", "var", "conv_bias"};

// Parts of messages, turned into text only when a check fails: there are thousands of checks a call.
struct At {  // "block 3: weight_out"
  size_t block;
  const char* argument;
};

struct Label {  // "block 3: var of branch 1"
  size_t block, branch;
  const char* argument;
  bool sum = false;
};

inline std::ostream& operator<<(std::ostream& out, const At& at) { return out << "block " << at.block << ": " << at.argument; }

inline std::ostream& operator<<(std::ostream& out, const Label& label) {
  out << At{label.block, label.argument} << " of ";
  return label.sum ? out << "the sum" : out << "branch " << label.branch;
}

constexpr Check require("fuse_blocks");

template <class Name>
uint32_t dtype_of(const View& v, const Name& name) {
  require.floats(v, name);
  switch (v.type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::Half: return kHalf;
    default: return kBFloat16;
  }
}

template <class Name>
void check_device(const View& v, const View& first, const Name& name) {
  require(v.device_type == first.device_type && v.device_index == first.device_index, name,
          " must be on the device of the first weight");
  require(v.data != nullptr || v.empty(), name, " has no memory behind its shape ", v.shape());
}

// The lengths of all lists, and what the numbers among them may be.
inline void check_numbers(const FuseArguments& a, const Tensors* weight_out, const Tensors* bias_out) {
  auto check = [](const char* name, size_t got, size_t expected) {
    require(got == expected, name, " must have ", expected, " entries, got ", got);
  };
  size_t const count = a.blocks.size() / kBlockNumbers;
  check("blocks", a.blocks.size(), kBlockNumbers * count);
  size_t entries = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* const numbers = &a.blocks[kBlockNumbers * i];
    require(numbers[0] >= 1 && numbers[0] <= kMostBranches + 1, "block ", i, " must have from 1 to ", kMostBranches,
            " branches, got ", numbers[0]);
    require(std::min(numbers[1], numbers[2]) >= 1 && std::max(numbers[1], numbers[2]) <= kMostTaps, "block ", i,
            ": kernel must be from 1 to ", kMostTaps, " a side, got (", numbers[1], ", ", numbers[2], ")");
    entries += size_t(numbers[0]);
  }
  check("branches", a.branches.size(), kBranchNumbers * entries);
  check("eps", a.eps.size(), entries);
  size_t weights = 0, params[kParams] = {}, entry = 0;
  for (size_t i = 0; i < count; ++i) {
    size_t const own = size_t(a.blocks[kBlockNumbers * i]), before = weights;
    for (size_t b = 0; b < own; ++b, ++entry) {
      const int64_t* const numbers = &a.branches[kBranchNumbers * entry];
      int64_t const present = numbers[0], most = kMostTaps;
      bool const weight = present & kHasWeight, sum = present & kSum;
      require(present >= 0 && present < 2 * kSum && !(sum && (weight || b + 1 < own)), "block ", i, ": present of branch ",
              b, " cannot be ", present);
      require(sum || b < kMostBranches, "block ", i, " must have from 1 to ", kMostBranches, " branches, got ", own);
      require(a.eps[entry] >= 0 && a.eps[entry] <= std::numeric_limits<double>::max(), Label{i, b, "eps", sum},
              " must be finite and not negative, got ", a.eps[entry]);
      weights += weight;
      for (int param = 0; param < kParams; ++param) params[param] += (present & kPresentBits[param]) != 0;
      if (sum) continue;
      bool inside = numbers[5] >= 1 && numbers[5] <= most;
      for (int d = 1; d <= 2; ++d) {  // in the order that keeps sums small
        inside = inside && numbers[d] >= 0 && numbers[d] < most && numbers[d + 2] >= 1 && numbers[d + 2] <= (weight ? most : 1);
        inside = inside && numbers[d] + (numbers[d + 2] - 1) * numbers[5] < a.blocks[kBlockNumbers * i + d];
      }
      require(inside, Label{i, b, "taps"}, " (row, column, rows, columns, step) must be a rectangle", weight ? "" : " of one tap",
              " inside the kernel of ", a.blocks[kBlockNumbers * i + 1], "×", a.blocks[kBlockNumbers * i + 2], ", got ",
              Shape{numbers + 1, 5});
    }
    require(weights > before, "block ", i, " must have a branch with a weight");
  }
  check("weight", a.weight.size(), weights);
  const Tensors* const lists[] = {&a.gamma, &a.beta, &a.mean, &a.var, &a.conv_bias};
  for (int param = 0; param < kParams; ++param) check(kParamNames[param], lists[param]->size(), params[param]);
  if (weight_out) check("weight_out", weight_out->size(), count);
  if (bias_out) check("bias_out", bias_out->size(), count);
}

template <class Name>
int32_t narrow32(int64_t number, const Name& name) {
  require(number >= 0 && number <= std::numeric_limits<int32_t>::max(), name, " has a size or stride of ", number,
          ": more than 2^31 - 1 elements");
  return int32_t(number);
}

// Which order a block's kernels have: what decides the output's, and which of its kernels a plain loop can read.
struct Order {
  bool contiguous = true, channels_last = true;              // all kernels are dense in that order
  bool first_contiguous = false, first_channels_last = false;  // the first is
  bool wanted = false;                                       // channels_last, for a new output
};

// A kernel of a branch: its pointer and its strides.
inline void describe_kernel(Branch& branch, const View& v, const View& own, const View& first, const Label& label, Order& order) {
  require(v.has_shape({own.sizes[0], own.sizes[1], branch.rows, branch.columns}), label, " must have shape (",
          own.sizes[0], ", ", own.sizes[1], ", ", int(branch.rows), ", ", int(branch.columns), "), got ", v.shape());
  require(v.dtype == own.dtype, label, " must have the dtype of the block's first weight");
  check_device(v, first, label);
  branch.kernel = v.data;
  for (int d = 0; d < 4; ++d) branch.strides[d] = v.sizes[d] == 1 ? 0 : narrow32(v.strides[d], label);
  bool const contiguous = v.dense(false), channels_last = v.dense(true);
  order.contiguous &= contiguous;
  order.channels_last &= channels_last;
  order.wanted |= channels_last && !contiguous;
}

// `next` counts how many of each parameter's list earlier entries have taken.
inline void describe_params(Branch& branch, const FuseArguments& a, int64_t present, int64_t channels, const View& first,
                            Label label, size_t* next, Fusion& fusion) {
  const Tensors* const lists[] = {&a.gamma, &a.beta, &a.mean, &a.var, &a.conv_bias};
  for (int param = 0; param < kParams; ++param) {
    if (!(present & kPresentBits[param])) continue;
    const Tensor& given = (*lists[param])[next[param]++];
    label.argument = kParamNames[param];
    View v(given);
    require.shape(v, label, {channels});
    check_device(v, first, label);
    uint32_t const dtype = dtype_of(v, label);
    if (v.strides[0] != 1 && v.sizes[0] > 1) {
      fusion.copies.push_back(torch::stable::contiguous(given));
      v = View(fusion.copies.back());
    }
    branch.params[param] = v.data;
    branch.dtypes |= dtype << 2 * param & ((1 << 2 * kParams) - 1);
  }
}

inline Tensor empty(const View& like, std::vector<int64_t> sizes, bool channels_last) {
  std::vector<int64_t> strides(sizes.size(), 1);
  if (sizes.size() == 4) {
    int64_t const c = sizes[1], h = sizes[2], w = sizes[3];
    strides = channels_last ? std::vector<int64_t>{h * w * c, 1, w * c, c} : std::vector<int64_t>{c * h * w, h * w, w, 1};
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), like.dtype->number,
                                                  like.device_type, like.device_index, &handle));
  return Tensor(handle);
}

// An output and how its order goes with that of the block's kernels.
inline void describe_output(Block& block, const Branch& main, const View& own, const View& weight, const View& bias,
                            const View& first, const Order& order, size_t i) {
  require.shape(weight, At{i, "weight_out"}, {block.channels, block.inputs, block.rows, block.columns});
  require.shape(bias, At{i, "bias_out"}, {block.channels});
  require(weight.dtype == own.dtype, At{i, "weight_out"}, " must have the dtype of the block's first weight");
  require(bias.dtype == own.dtype, At{i, "bias_out"}, " must have the dtype of the block's first weight");
  check_device(weight, first, At{i, "weight_out"});
  check_device(bias, first, At{i, "bias_out"});
  block.channels_last = !weight.dense(false);
  require(!block.channels_last || weight.dense(true), At{i, "weight_out"}, " must be contiguous or channels_last");
  require(bias.strides[0] == 1 || bias.sizes[0] <= 1, At{i, "bias_out"}, " must be contiguous");
  block.weight = weight.data;
  block.bias = bias.data;
  block.dense = block.channels_last ? order.channels_last : order.contiguous;
  bool const same = covers_all(block, main) && (block.channels_last ? order.first_channels_last : order.first_contiguous);
  block.aligned = same && own.aligned() && weight.aligned();
}

inline void check_apart(const FuseArguments& a, const Tensors& weight_out, const Tensors& bias_out) {
  std::vector<std::pair<Extent, Entry>> written;
  written.reserve(2 * weight_out.size());
  for (size_t i = 0; i < weight_out.size(); ++i) {
    written.emplace_back(View(weight_out[i]), Entry{"weight_out", i});
    written.emplace_back(View(bias_out[i]), Entry{"bias_out", i});
  }
  std::sort(written.begin(), written.end(), [](auto& x, auto& y) { return x.first.begin < y.first.begin; });
  for (size_t i = 1; i < written.size(); ++i)
    require(written[i - 1].first.end <= written[i].first.begin, written[i - 1].second, " must share no memory with ",
            written[i].second, ": both are written");
  const std::pair<const char*, const Tensors&> lists[] = {
      {"weight", a.weight}, {"gamma", a.gamma}, {"beta", a.beta},
      {"mean", a.mean},     {"var", a.var},     {"conv_bias", a.conv_bias}};
  for (const auto& [name, tensors] : lists)
    for (size_t i = 0; i < tensors.size(); ++i) {
      Extent const read{View(tensors[i])};  // may overlap the first output that ends behind its begin, if any
      auto const at = std::partition_point(written.begin(), written.end(), [&](auto& w) { return w.first.end <= read.begin; });
      require(at == written.end() || !at->first.overlaps(read), at->second, " must share no memory with ",
              Entry{name, i}, ": it is written");
    }
}

// Checks everything that can be told without reading data, and describes the blocks. Outputs are those given, or new
// ones: channels_last where one of the block's weights is that and not contiguous. Throws before anything is written.
inline Fusion describe_blocks(const FuseArguments& a, const Tensors* weight_out, const Tensors* bias_out) {
  check_numbers(a, weight_out, bias_out);
  size_t const count = a.blocks.size() / kBlockNumbers;
  Fusion fusion;
  if (count == 0) return fusion;
  fusion.blocks.resize(count);
  fusion.branches.resize(a.eps.size());
  std::vector<Order> orders(count);
  std::vector<View> firsts;  // each block's first weight
  firsts.reserve(count);
  View const first(a.weight[0]);
  size_t next_weight = 0, next[kParams] = {}, entry = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t* const numbers = &a.blocks[kBlockNumbers * i];
    Block& block = fusion.blocks[i];
    size_t const begin = entry, end = begin + size_t(numbers[0]);
    size_t kernels = 0, leading = 0;
    for (size_t e = begin; e < end; ++e) {
      bool const weight = a.branches[kBranchNumbers * e] & kHasWeight;
      kernels += weight;
      leading += kernels == 0;
    }
    const View& own = firsts.emplace_back(a.weight[next_weight]);
    Label const label{i, leading, "weight"};
    require(own.dim == 4 && own.sizes[0] > 0 && own.sizes[1] > 0, label, " must have shape (K, C, rows, columns) with K, C > 0, got ",
            own.shape());
    block.dtype = dtype_of(own, label) & 3;
    block.channels = narrow32(own.sizes[0], label);
    block.inputs = narrow32(own.sizes[1], label);
    block.rows = uint8_t(numbers[1]);
    block.columns = uint8_t(numbers[2]);
    block.first_branch = int32_t(begin);
    require(block.row() <= std::numeric_limits<int32_t>::max(), "block ", i, " has a channel of ", block.row(),
            " elements: more than 2^31 - 1");
    require(numbers[3] >= 1 && block.channels % numbers[3] == 0, "block ", i, ": groups must divide its ", block.channels,
            " channels, got ", numbers[3]);
    block.normed = (a.branches[kBranchNumbers * (end - 1)] & kSum) != 0;
    block.branches = uint8_t(end - begin - block.normed);
    Order& order = orders[i];
    size_t kernel = begin, identity = begin + kernels;
    for (; entry < end; ++entry) {
      const int64_t* const taps = &a.branches[kBranchNumbers * entry];
      bool const weight = taps[0] & kHasWeight, sum = taps[0] & kSum;
      Label const own_label{i, entry - begin, "weight", sum};
      Branch& branch = fusion.branches[weight ? kernel++ : identity++];
      branch.index = uint8_t(entry - begin);
      branch.eps = a.eps[entry];
      branch.any_variance = (taps[0] & kAnyVariance) != 0;
      if (!sum) {
        branch.row = uint8_t(taps[1]);
        branch.column = uint8_t(taps[2]);
        branch.rows = uint8_t(taps[3]);
        branch.columns = uint8_t(taps[4]);
        branch.step = uint8_t(taps[5]);
      }
      if (weight) {
        View const v(a.weight[next_weight++]);
        describe_kernel(branch, v, own, first, own_label, order);
        if (kernel == begin + 1) order.first_contiguous = order.contiguous, order.first_channels_last = order.channels_last;
      } else if (!sum) {
        require(block.channels == numbers[3] * block.inputs, "block ", i, ": branch ", entry - begin,
                ", without weight, is the identity: it needs as many channels as inputs, got ", block.channels, " and ",
                numbers[3] * block.inputs);
      }
      describe_params(branch, a, taps[0], block.channels, first, own_label, next, fusion);
    }
    if (weight_out)
      describe_output(block, fusion.branches[begin], own, View((*weight_out)[i]), View((*bias_out)[i]), first, order, i);
  }
  if (weight_out) {
    check_apart(a, *weight_out, *bias_out);
    return fusion;
  }
  for (size_t i = 0; i < count; ++i) {  // after all checks: an error allocates nothing
    Block& block = fusion.blocks[i];
    fusion.weights.push_back(empty(firsts[i], {block.channels, block.inputs, block.rows, block.columns}, orders[i].wanted));
    fusion.biases.push_back(empty(firsts[i], {block.channels}, false));
    describe_output(block, fusion.branches[block.first_branch], firsts[i], View(fusion.weights[i]),
                    View(fusion.biases[i]), first, orders[i], i);
  }
  return fusion;
}

}  // namespace acnet
