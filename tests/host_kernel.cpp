// csrc/fuse_kernel.h and csrc/fuse_simd.h for the host. Writes are counted by comparing the outputs, poisoned before each
// thread's turn, with what they were: a thread's own writes are those that changed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "fuse_kernel.h"
#include "fuse_simd.h"

namespace py = pybind11;
using namespace acnet;

namespace {

// A descriptor; its branches are appended to those given.
Block block_from(const py::dict& d, std::vector<Branch>& branches) {
  auto pointer = [](const py::handle& v) { return reinterpret_cast<void*>(v.cast<uintptr_t>()); };
  Block block = {};
  block.weight = pointer(d["weight"]);
  block.bias = pointer(d["bias"]);
  block.first_branch = int32_t(branches.size());
  for (const py::handle& given : d["entries"]) {
    Branch& branch = branches.emplace_back();
    branch.kernel = pointer(given["kernel"]);
    auto params = given["params"].cast<std::vector<std::pair<uintptr_t, uint32_t>>>();
    for (int param = 0; param < kParams; ++param) {
      branch.params[param] = reinterpret_cast<void*>(params[param].first);
      branch.dtypes |= params[param].second << 2 * param & 1023;
    }
    branch.eps = given["eps"].cast<double>();
    auto strides = given["strides"].cast<std::vector<int32_t>>();
    std::copy(strides.begin(), strides.end(), branch.strides);
    auto taps = given["taps"].cast<std::vector<uint8_t>>();
    branch.row = taps[0], branch.column = taps[1], branch.rows = taps[2], branch.columns = taps[3], branch.step = taps[4];
  }
  auto shape = d["shape"].cast<std::vector<int32_t>>();
  block.channels = shape[0], block.inputs = shape[1], block.rows = uint8_t(shape[2]), block.columns = uint8_t(shape[3]);
  block.dtype = d["dtype"].cast<int>() & 3;
  auto flags = d["flags"].cast<std::vector<bool>>();
  block.channels_last = flags[0], block.dense = flags[1], block.aligned = flags[2], block.normed = flags[3];
  block.branches = uint8_t(branches.size() - block.first_branch - block.normed);
  return block;
}

// Runs call() over an output poisoned with 0xFF (a NaN no fold makes), counts what it wrote, and keeps that in `result`.
template <class T, class Call>
void count(T* live, std::vector<T>& result, std::vector<int>& writes, Call call) {
  std::memset(static_cast<void*>(live), 0xFF, result.size() * sizeof(T));
  T poison;
  std::memset(static_cast<void*>(&poison), 0xFF, sizeof(T));
  call();
  for (size_t i = 0; i < result.size(); ++i)
    if (std::memcmp(&live[i], &poison, sizeof(T))) {
      result[i] = live[i];
      ++writes[i];
    }
}

using Writes = std::pair<std::vector<int>, std::vector<int>>;

template <class T>
void run_tile(const Block& block, const Branch* branches, int tile, std::vector<T>& weight, std::vector<T>& bias, Writes& writes) {
  static Scales shared;
  std::memset(&shared, 0xFF, sizeof shared);
  Piece const piece = piece_of(block, tile);
  for (int thread = 0; thread < kThreads; ++thread)
    count(static_cast<T*>(block.bias), bias, writes.second, [&] { fold_scales<T>(block, branches, piece, thread, shared); });
  for (int thread = 0; thread < kThreads; ++thread)
    count(static_cast<T*>(block.weight), weight, writes.first, [&] { fold_tile<T>(block, branches, piece, thread, shared); });
}

template <class T>
void run_block(const Launch& launch, int first, int end, Writes& writes) {
  const Block& block = block_of(launch, first);
  std::vector<T> weight(block.numel()), bias(block.channels);
  writes = {std::vector<int>(weight.size()), std::vector<int>(bias.size())};
  for (int tile = first; tile < end; ++tile) {
    if (&block_of(launch, tile) != &block) throw std::runtime_error("a tile is of the wrong block");
    run_tile<T>(block, launch.branches + block.first_branch, tile, weight, bias, writes);
  }
  std::memcpy(block.weight, static_cast<const void*>(weight.data()), weight.size() * sizeof(T));
  std::memcpy(block.bias, static_cast<const void*>(bias.data()), bias.size() * sizeof(T));
}

std::vector<Writes> run(const std::vector<py::dict>& descriptions) {
  auto launch = std::make_unique<Launch>();
  std::vector<int> starts;
  std::vector<Branch> branches;
  int64_t tiles = 0;
  for (const py::dict& d : descriptions) {
    Block& block = launch->blocks[launch->count++] = block_from(d, branches);
    starts.push_back(block.first_tile = int32_t(tiles));
    tiles += tile_count(block);
  }
  if (launch->count > kMaxBlocks || branches.size() > kMaxBranches) throw std::runtime_error("too much for a launch");
  std::copy(branches.begin(), branches.end(), launch->branches);
  starts.push_back(int(tiles));
  std::vector<Writes> writes(descriptions.size());
  for (size_t i = 0; i < descriptions.size(); ++i) switch (launch->blocks[i].dtype) {
      case kFloat: run_block<float>(*launch, starts[i], starts[i + 1], writes[i]); break;
      case kDouble: run_block<double>(*launch, starts[i], starts[i + 1], writes[i]); break;
      case kHalf: run_block<c10::Half>(*launch, starts[i], starts[i + 1], writes[i]); break;
      default: run_block<c10::BFloat16>(*launch, starts[i], starts[i + 1], writes[i]);
    }
  return writes;
}

bool supports(const std::string& simd) {
#ifdef ACNET_SIMD
  return simd == "avx512" ? __builtin_cpu_supports("avx512f") : __builtin_cpu_supports("avx2");
#else
  return false;
#endif
}

#ifdef ACNET_SIMD
template <class ISA>
int64_t rows(const Block& block, const Branch* branches) {
  Patterns<ISA::width> patterns;
  if (!patterns.prepare(block, branches)) return 0;
  int64_t done = 0;
  float scales[kMostBranches];
  for (int64_t o = 0; o < block.channels; ++o) {
    fold_channel<float>(block, branches, o, scales);
    done = fold_row_simd(block, branches, o, scales, patterns);
  }
  return done;
}
#endif

int64_t fold_rows_simd(const std::string& simd, const py::dict& description) {
#ifdef ACNET_SIMD
  std::vector<Branch> branches;
  Block const block = block_from(description, branches);
  return simd == "avx512" ? rows<Avx512>(block, branches.data()) : rows<Avx2>(block, branches.data());
#else
  return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(host_kernel, module) {
  module.def("launch", &run);
  module.def("supports", &supports);
  module.def("fold_rows_simd", &fold_rows_simd);
}
