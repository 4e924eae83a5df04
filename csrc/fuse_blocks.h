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

// As the schema names them; L blocks, branch order square, hor, ver. The lists of tensors hold those that are present.
struct FuseArguments {
  const Tensors& square;  // L
  const Tensors& hor;
  const Tensors& ver;
  const Tensors& gamma;
  const Tensors& beta;
  const Tensors& mean;
  const Tensors& var;
  const Tensors& conv_bias;
  const std::vector<int64_t>& present;  // 3L: which of a branch's tensors there are, as a sum of Present
  const std::vector<double>& eps;       // 3L
  const std::vector<int64_t>& place;    // 2L: hor's row and ver's column
};

enum Present : int64_t {
  kHasBranch = 1, kHasGamma = 2, kHasBeta = 4, kHasMean = 8, kHasConvBias = 16, kAnyVariance = 32
};
constexpr int64_t kPresentBits[kParams] = {kHasGamma, kHasBeta, kHasMean, kHasBranch, kHasConvBias};  // by Param

struct Fusion {
  std::vector<Block> blocks;
  Tensors weights, biases;  // the outputs
  Tensors copies;           // contiguous copies of strided parameters: alive as long as the descriptors
};

constexpr const char* kSlotNames[] = {"square", "hor", "ver"};
constexpr const char* kParamNames[] = {"gamma", "beta", "mean", "var", "conv_bias"};

// Parts of messages, turned into text only when a check fails: there are thousands of checks a call.
struct At {  // "block 3: var"
  size_t block;
  const char* argument;
};

struct Label {  // "block 3: var of hor"
  size_t block;
  int slot, param;
};

inline std::ostream& operator<<(std::ostream& out, const At& at) { return out << "block " << at.block << ": " << at.argument; }

inline std::ostream& operator<<(std::ostream& out, const Label& label) {
  return out << At{label.block, kParamNames[label.param]} << " of " << kSlotNames[label.slot];
}

constexpr Check require("fuse_blocks");

inline uint32_t dtype_of(const View& v, size_t block, const char* argument) {
  require.floats(v, At{block, argument});
  switch (v.type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::Double: return kDouble;
    case ScalarType::Half: return kHalf;
    default: return kBFloat16;
  }
}

inline void check_device(const View& v, const View& first, size_t block, const char* argument) {
  require(v.device_type == first.device_type && v.device_index == first.device_index, At{block, argument},
          " must be on the device of block 0's square");
  require(v.data != nullptr || v.empty(), At{block, argument}, " has no memory behind its shape ", v.shape());
}

inline void check_lengths(const FuseArguments& a, const Tensors* weight_out, const Tensors* bias_out) {
  size_t const count = a.square.size();
  auto check = [](const char* name, size_t got, size_t expected) {
    require(got == expected, name, " must have ", expected, " entries, got ", got);
  };
  check("present", a.present.size(), 3 * count);
  check("eps", a.eps.size(), 3 * count);
  check("place", a.place.size(), 2 * count);
  size_t kernels[kSlots] = {}, params[kParams] = {};
  for (size_t entry = 0; entry < 3 * count; ++entry) {
    int64_t const present = a.present[entry];
    bool const branch = present & kHasBranch;
    require(present >= 0 && present < 64 && (branch || (present == 0 && entry % 3 != kSquare)), "block ", entry / 3,
            ": present of ", kSlotNames[entry % 3], " cannot be ", present);
    kernels[entry % 3] += branch;
    for (int param = 0; param < kParams; ++param) params[param] += (present & kPresentBits[param]) != 0;
  }
  check("hor", a.hor.size(), kernels[kHor]);
  check("ver", a.ver.size(), kernels[kVer]);
  const Tensors* const lists[] = {&a.gamma, &a.beta, &a.mean, &a.var, &a.conv_bias};
  for (int param = 0; param < kParams; ++param) check(kParamNames[param], lists[param]->size(), params[param]);
  if (weight_out) check("weight_out", weight_out->size(), count);
  if (bias_out) check("bias_out", bias_out->size(), count);
}

inline int32_t narrow32(int64_t stride, size_t block, const char* argument) {
  require(stride >= 0 && stride <= std::numeric_limits<int32_t>::max(), At{block, argument}, " has a stride of ",
          stride, ": more than 2^31 - 1 elements");
  return int32_t(stride);
}

// A branch of rows×columns taps: its pointer, and its strides of o, c and, where it has more than one, r and s.
inline void describe_branch(Block& block, Slot slot, const View& v, const View& square, const View& first, size_t i) {
  const char* name = kSlotNames[slot];
  int64_t const k = square.sizes[2], rows = slot == kHor ? 1 : k, columns = slot == kVer ? 1 : k;
  require(v.dim == 4 && v.sizes[0] == square.sizes[0] && v.sizes[1] == square.sizes[1] && v.sizes[2] == rows &&
              v.sizes[3] == columns,
          At{i, name}, " must have shape (", square.sizes[0], ", ", square.sizes[1], ", ", rows, ", ", columns,
          ") to go with square, got ", v.shape());
  require(v.dtype == square.dtype, At{i, name}, " must have square's dtype");
  check_device(v, first, i, name);
  block.kernels[slot] = v.data;
  int32_t* out = slot == kSquare ? block.square_strides : slot == kHor ? block.hor_strides : block.ver_strides;
  *out++ = narrow32(v.strides[0], i, name);
  *out++ = narrow32(v.strides[1], i, name);
  if (slot != kHor) *out++ = narrow32(v.strides[2], i, name);
  if (slot != kVer) *out++ = narrow32(v.strides[3], i, name);
}

// `next` counts how many of each parameter's list earlier branches have taken.
inline void describe_norm(Block& block, int slot, const FuseArguments& a, const View& first, size_t i, size_t* next,
                          Fusion& fusion) {
  const Tensors* const lists[] = {&a.gamma, &a.beta, &a.mean, &a.var, &a.conv_bias};
  size_t const entry = 3 * i + slot;
  if (!block.kernels[slot]) return;
  require(a.eps[entry] >= 0 && a.eps[entry] <= std::numeric_limits<double>::max(), "block ", i, ": eps of ",
          kSlotNames[slot], " must be finite and not negative, got ", a.eps[entry]);
  block.eps[slot] = a.eps[entry];
  for (int param = 0; param < kParams; ++param) {
    if (!(a.present[entry] & kPresentBits[param])) continue;
    const Tensor& given = (*lists[param])[next[param]++];
    View v(given);
    require(v.dim == 1 && v.sizes[0] == block.channels, Label{i, slot, param}, " must have shape (", block.channels,
            ",), got ", v.shape());
    check_device(v, first, i, kParamNames[param]);
    uint32_t const dtype = dtype_of(v, i, kParamNames[param]);
    if (v.strides[0] != 1 && v.sizes[0] > 1) {
      fusion.copies.push_back(torch::stable::contiguous(given));
      v = View(fusion.copies.back());
    }
    block.norms[slot][param] = v.data;
    block.norm_dtypes |= dtype << 2 * (slot * kParams + param);
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

inline void describe_output(Block& block, const View& square, const View& weight, const View& bias, const View& first, size_t i) {
  bool same = weight.dim == 4;
  for (int d = 0; same && d < 4; ++d) same = weight.sizes[d] == square.sizes[d];
  require(same, At{i, "weight_out"}, " must have square's shape ", square.shape(), ", got ", weight.shape());
  require(bias.dim == 1 && bias.sizes[0] == block.channels, At{i, "bias_out"}, " must have shape (", block.channels,
          ",), got ", bias.shape());
  require(weight.dtype == square.dtype, At{i, "weight_out"}, " must have square's dtype");
  require(bias.dtype == square.dtype, At{i, "bias_out"}, " must have square's dtype");
  check_device(weight, first, i, "weight_out");
  check_device(bias, first, i, "bias_out");
  block.channels_last = !weight.dense(false);
  require(!block.channels_last || weight.dense(true), At{i, "weight_out"}, " must be contiguous or channels_last");
  require(bias.strides[0] == 1 || bias.sizes[0] <= 1, At{i, "bias_out"}, " must be contiguous");
  block.weight = weight.data;
  block.bias = bias.data;
  block.same_order = square.dense(block.channels_last);
  block.aligned = block.same_order && square.aligned() && weight.aligned();
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
      {"square", a.square}, {"hor", a.hor},   {"ver", a.ver}, {"gamma", a.gamma},
      {"beta", a.beta},     {"mean", a.mean}, {"var", a.var}, {"conv_bias", a.conv_bias}};
  for (const auto& [name, tensors] : lists)
    for (size_t i = 0; i < tensors.size(); ++i) {
      Extent const read{View(tensors[i])};  // may overlap the first output that ends behind its begin, if any
      auto const at = std::partition_point(written.begin(), written.end(), [&](auto& w) { return w.first.end <= read.begin; });
      require(at == written.end() || !at->first.overlaps(read), at->second, " must share no memory with ",
              Entry{name, i}, ": it is written");
    }
}

// Checks everything that can be told without reading data, and describes the blocks. Outputs are those given, or new
// ones in square's memory layout. Throws before anything is written.
inline Fusion describe_blocks(const FuseArguments& a, const Tensors* weight_out, const Tensors* bias_out) {
  check_lengths(a, weight_out, bias_out);
  size_t const count = a.square.size();
  Fusion fusion;
  if (count == 0) return fusion;
  fusion.blocks.resize(count);
  View const first(a.square[0]);
  size_t next_hor = 0, next_ver = 0, next[kParams] = {};
  for (size_t i = 0; i < count; ++i) {
    Block& block = fusion.blocks[i] = Block{};
    View const square(a.square[i]);
    require(square.dim == 4 && square.sizes[0] > 0 && square.sizes[1] > 0 && square.sizes[2] == square.sizes[3] &&
                square.sizes[2] % 2 == 1 && square.sizes[2] < 256,
            At{i, "square"}, " must have shape (K, C, k, k) with K, C > 0 and odd k < 256, got ", square.shape());
    block.dtype = dtype_of(square, i, "square") & 3;
    block.channels = narrow32(square.sizes[0], i, "square");
    block.inputs = narrow32(square.sizes[1], i, "square");
    block.k = uint8_t(square.sizes[2]);
    require(block.row() <= std::numeric_limits<int32_t>::max(), At{i, "square"}, " has a channel of ", block.row(),
            " elements: more than 2^31 - 1");
    describe_branch(block, kSquare, square, square, first, i);
    if (a.present[3 * i + kHor]) describe_branch(block, kHor, View(a.hor[next_hor++]), square, first, i);
    if (a.present[3 * i + kVer]) describe_branch(block, kVer, View(a.ver[next_ver++]), square, first, i);
    int64_t const row = a.place[2 * i], column = a.place[2 * i + 1];
    require(row >= 0 && row < block.k && column >= 0 && column < block.k, At{i, "place"},
            " (hor's row, ver's column) must be within the kernel of ", int(block.k), ", got (", row, ", ", column, ")");
    block.hor_row = uint8_t(row);
    block.ver_column = uint8_t(column);
    for (int slot = 0; slot < kSlots; ++slot) describe_norm(block, slot, a, first, i, next, fusion);
    if (weight_out) {
      describe_output(block, square, View((*weight_out)[i]), View((*bias_out)[i]), first, i);
    }
  }
  if (weight_out) {
    check_apart(a, *weight_out, *bias_out);
    return fusion;
  }
  for (size_t i = 0; i < count; ++i) {  // after all checks: an error allocates nothing
    View const square(a.square[i]);
    bool const channels_last = square.dense(true) && !square.dense(false);
    fusion.weights.push_back(empty(square, {square.sizes, square.sizes + 4}, channels_last));
    fusion.biases.push_back(empty(square, {square.sizes[0]}, false));
    describe_output(fusion.blocks[i], square, View(fusion.weights[i]), View(fusion.biases[i]), first, i);
  }
  return fusion;
}

}  // namespace acnet
