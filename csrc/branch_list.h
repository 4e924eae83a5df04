// The branches of a step as the operators are given them: six numbers each (pack_taps of steps/packed.py), with a
// weight for every one that is a convolution, and a batch norm for each, or one after their sum; or both, some of the
// branches having their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "check.h"

namespace acnet {

constexpr int64_t kMostBranches = 8, kNumbers = 6;  // of a branch

struct Branch {
  int64_t row, column, rows, columns, step;
  std::vector<int> places;  // of its taps in the whole kernel
  int weight;               // −1: the identity
  int norm;                 // its own batch norm, −1: it has none
};

// The kernel whose map a batch norm normalises: a branch's, or of all of them where it follows their sum.
struct Kernel {
  std::vector<int> places;  // of its taps in the whole one
  int64_t first;            // of its taps among those of all kernels
  int branch;               // the first branch
  bool of_sum;
};

struct BranchList {
  std::vector<Branch> branches;
  std::vector<Kernel> kernels;
  int64_t numbers = 0;  // taps of all kernels
  int64_t own = 0;      // batch norms of branches, the first ones

  // Whether one batch norm follows the sum, and no branch has its own.
  bool summed() const { return own == 0; }
  // Whether one follows the sum of branches of which some have their own.
  bool nested() const { return own > 0 && own < static_cast<int64_t>(kernels.size()); }

  // `channels`: of x, of a group; `identity`: whether there may be one; `nests`: whether batch norms may be nested.
  BranchList(const Check& check, const std::vector<int64_t>& taps, const std::vector<View>& weights, int64_t outputs,
             int64_t channels, const int64_t kernel[2], bool identity, bool nests, int64_t norms) {
    check(!taps.empty() && taps.size() % kNumbers == 0 && taps.size() <= kNumbers * kMostBranches, "taps must hold 1 to ",
          kMostBranches, " branches, six numbers each, got ", taps.size(), " numbers");
    const int64_t count = static_cast<int64_t>(taps.size()) / kNumbers;
    int used = 0;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t* given = &taps[kNumbers * b];
      Branch branch{given[0], given[1], given[2], given[3], std::max<int64_t>(given[4], 1), {}, -1, -1};
      for (int64_t i = 0; i < kNumbers; ++i)
        check(given[i] >= 0 && given[i] < (int64_t(1) << 31), "taps must hold numbers from 0 to 2³¹ − 1, got ", given[i]);
      check(branch.rows >= 1 && branch.columns >= 1 && branch.row + (branch.rows - 1) * branch.step < kernel[0] &&
                branch.column + (branch.columns - 1) * branch.step < kernel[1],
            "taps must lie inside the kernel of ", kernel[0], "×", kernel[1]);
      if (given[4] == 0) {
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
      if (given[5] != 0) branch.norm = static_cast<int>(own++);
      branches.push_back(std::move(branch));
    }
    check(used == static_cast<int>(weights.size()), "weights must have ", used, " entries, one a convolution, got ", weights.size());
    check(norms == own + 1 || (norms == own && own == count), "there must be one of the ", own,
          " batch norms that taps has for branches, and one of the sum, without which every branch has its own, got ", norms);
    check(nests || own == 0 || norms == own, "taps must have a batch norm for each of the branches, or for none of them");
    for (int b = 0; b < count; ++b)
      if (branches[b].norm >= 0) add(branches[b].places, b, false);
    if (norms == own) return;
    std::vector<int> all;
    for (int t = 0; t < kernel[0] * kernel[1]; ++t) all.push_back(t);
    add(std::move(all), 0, true);
  }

 private:
  void add(std::vector<int> places, int branch, bool of_sum) {
    const int64_t first = numbers;
    numbers += static_cast<int64_t>(places.size());
    kernels.push_back({std::move(places), first, branch, of_sum});
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
