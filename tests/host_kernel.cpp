// csrc/fuse_kernel.h and csrc/fuse_simd.h for the host. Writes are counted by comparing the outputs, poisoned before each
// thread's turn, with what they were: a thread's own writes are those that changed.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "fuse_kernel.h"
#include "fuse_simd.h"

namespace py = pybind11;
using namespace acnet;

namespace {

Block block_from(const py::dict& d) {
  Block b = {};
  auto pointer = [](const py::handle& v) { return reinterpret_cast<void*>(v.cast<uintptr_t>()); };
  b.weight = pointer(d["weight"]);
  b.bias = pointer(d["bias"]);
  auto kernels = d["kernels"].cast<std::vector<uintptr_t>>();
  auto strides = d["strides"].cast<std::vector<std::vector<int32_t>>>();
  auto norms = d["norms"].cast<std::vector<std::vector<std::pair<uintptr_t, uint32_t>>>>();
  auto eps = d["eps"].cast<std::vector<double>>();
  for (int slot = 0; slot < kSlots; ++slot) {
    b.kernels[slot] = reinterpret_cast<void*>(kernels[slot]);
    b.eps[slot] = eps[slot];
    for (int param = 0; param < kParams; ++param) {
      b.norms[slot][param] = reinterpret_cast<void*>(norms[slot][param].first);
      b.norm_dtypes |= norms[slot][param].second << 2 * (slot * kParams + param);
    }
  }
  for (int i = 0; i < 4; ++i) b.square_strides[i] = strides[kSquare][i];
  constexpr int hor_dims[] = {0, 1, 3}, ver_dims[] = {0, 1, 2};
  for (int i = 0; i < 3; ++i) {
    if (kernels[kHor]) b.hor_strides[i] = strides[kHor][hor_dims[i]];
    if (kernels[kVer]) b.ver_strides[i] = strides[kVer][ver_dims[i]];
  }
  auto shape = d["shape"].cast<std::vector<int32_t>>();
  auto place = d["place"].cast<std::vector<int>>();
  auto flags = d["flags"].cast<std::vector<bool>>();
  b.channels = shape[0], b.inputs = shape[1], b.k = uint8_t(shape[2]);
  b.hor_row = uint8_t(place[0]), b.ver_column = uint8_t(place[1]);
  b.dtype = d["dtype"].cast<int>() & 3;
  b.channels_last = flags[0], b.same_order = flags[1], b.aligned = flags[2];
  return b;
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
void run_tile(const Block& block, int tile, std::vector<T>& weight, std::vector<T>& bias, Writes& writes) {
  static Scales shared;
  std::memset(&shared, 0xFF, sizeof shared);
  Piece const piece = piece_of(block, tile);
  for (int thread = 0; thread < kThreads; ++thread)
    count(static_cast<T*>(block.bias), bias, writes.second, [&] { fold_scales<T>(block, piece, thread, shared); });
  for (int thread = 0; thread < kThreads; ++thread)
    count(static_cast<T*>(block.weight), weight, writes.first, [&] { fold_tile<T>(block, piece, thread, shared); });
}

template <class T>
void run_block(const Launch& launch, int first, int end, Writes& writes) {
  const Block& block = block_of(launch, first);
  std::vector<T> weight(block.numel()), bias(block.channels);
  writes = {std::vector<int>(weight.size()), std::vector<int>(bias.size())};
  for (int tile = first; tile < end; ++tile) {
    if (&block_of(launch, tile) != &block) throw std::runtime_error("a tile is of the wrong block");
    run_tile<T>(block, tile, weight, bias, writes);
  }
  std::memcpy(block.weight, static_cast<const void*>(weight.data()), weight.size() * sizeof(T));
  std::memcpy(block.bias, static_cast<const void*>(bias.data()), bias.size() * sizeof(T));
}

std::vector<Writes> run(const std::vector<py::dict>& descriptions) {
  auto launch = std::make_unique<Launch>();
  std::vector<int> starts;
  int64_t tiles = 0;
  for (const py::dict& d : descriptions) {
    Block& block = launch->blocks[launch->count++] = block_from(d);
    starts.push_back(block.first_tile = int32_t(tiles));
    tiles += tile_count(block);
  }
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

template <class ISA>
int64_t rows(const Block& block) {
  Pattern<ISA::width> pattern;
  if (!pattern.prepare(block)) return 0;
  int64_t done = 0;
  for (int64_t o = 0; o < block.channels; ++o)
    done = fold_row_simd(block, o, fold_channel<float>(block, o).scale, pattern);
  return done;
}

int64_t fold_rows_simd(const std::string& simd, const py::dict& description) {
#ifdef ACNET_SIMD
  Block const block = block_from(description);
  return simd == "avx512" ? rows<Avx512>(block) : rows<Avx2>(block);
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
