// The branches of a step as the operators are given them: five numbers each (ops/recompute.py's pack_taps), with a
// weight for every one that is a convolution and a batch norm for each, or one for all.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"

namespace acnet {

constexpr int64_t kMostBranches = 8;

struct Branch {
  int64_t row, column, rows, columns, step;
  std::vector<int> places;  // of its taps in the whole kernel
  int weight;               // −1: the identity
};

// A kernel of the step: one a branch, or one of all where a batch norm follows their sum.
struct Kernel {
  std::vector<int> places;  // of its taps in the whole one
  int64_t first;            // of its taps among those of all kernels
  int branch;               // the first branch
};

struct BranchList {
  std::vector<Branch> branches;
  std::vector<Kernel> kernels;
  int64_t numbers = 0;  // taps of all kernels

  // `channels`: of x, of a group; `identity`: whether there may be one.
  BranchList(const Check& check, const std::vector<int64_t>& taps, const std::vector<View>& weights, int64_t outputs,
             int64_t channels, const int64_t kernel[2], bool identity, int64_t norms) {
    check(!taps.empty() && taps.size() % 5 == 0 && taps.size() <= 5 * kMostBranches, "taps must hold 1 to ", kMostBranches,
          " branches, five numbers each, got ", taps.size(), " numbers");
    const int64_t count = static_cast<int64_t>(taps.size()) / 5;
    int used = 0;
    for (int64_t b = 0; b < count; ++b) {
      Branch branch{taps[5 * b], taps[5 * b + 1], taps[5 * b + 2], taps[5 * b + 3], std::max<int64_t>(taps[5 * b + 4], 1), {}, -1};
      for (int64_t i = 5 * b; i < 5 * b + 5; ++i)
        check(taps[i] >= 0 && taps[i] < (int64_t(1) << 31), "taps must hold numbers from 0 to 2³¹ − 1, got ", taps[i]);
      check(branch.rows >= 1 && branch.columns >= 1 && branch.row + (branch.rows - 1) * branch.step < kernel[0] &&
                branch.column + (branch.columns - 1) * branch.step < kernel[1],
            "taps must lie inside the kernel of ", kernel[0], "×", kernel[1]);
      if (taps[5 * b + 4] == 0) {
        check(branch.rows == 1 && branch.columns == 1 && identity,
              "taps must have the identity on one tap, of as many channels out as in, at stride 1");
      } else {
        check(used < static_cast<int>(weights.size()), "weights must have one entry a convolution, got ", weights.size());
        const Entry name{"weights", static_cast<size_t>(used)};
        check.readable(weights[used], name);
        check.floats(weights[used], name);
        check.shape(weights[used], name, {outputs, channels, branch.rows, branch.columns});
        branch.weight = used++;
      }
      for (int64_t r = 0; r < branch.rows; ++r)
        for (int64_t c = 0; c < branch.columns; ++c)
          branch.places.push_back(
              static_cast<int>((branch.row + r * branch.step) * kernel[1] + branch.column + c * branch.step));
      branches.push_back(std::move(branch));
    }
    check(used == static_cast<int>(weights.size()), "weights must have ", used, " entries, one a convolution, got ", weights.size());
    check(norms == count || norms == 1, "there must be ", count, " batch norms, one a branch, or 1, got ", norms);
    if (norms == count) {
      for (int64_t b = 0; b < count; ++b) {
        kernels.push_back({branches[b].places, numbers, static_cast<int>(b)});
        numbers += static_cast<int64_t>(branches[b].places.size());
      }
    } else {
      numbers = kernel[0] * kernel[1];
      kernels.push_back({{}, 0, 0});
      for (int t = 0; t < numbers; ++t) kernels[0].places.push_back(t);
    }
  }
};

// γs or βs: one vector a batch norm, or none.
inline void check_affine(const Check& check, const std::vector<View>& values, int64_t norms, int64_t outputs, const char* name) {
  check(values.empty() || static_cast<int64_t>(values.size()) == norms, name, " must have one entry a batch norm, ", norms,
        " here, or none, got ", values.size());
  for (size_t b = 0; b < values.size(); ++b) {
    check.readable(values[b], Entry{name, b});
    check.floats(values[b], Entry{name, b});
    check.shape(values[b], Entry{name, b}, {outputs});
  }
}

}  // namespace acnet
