// Maps as packed_rows.h reads and writes them.
#pragma once

#include <cstdint>

#include "activation.h"

namespace acnet {

// Some channels of a map, `lanes` of them from `data` on. Strides are in elements.
template <class T>
struct Map {
  T* data;
  // Read: one past the map's last element. Written: one past the last element of the plane of the first channel that
  // the rows at hand may cover, counted from `data`; what they write beyond a row is written again by the next one.
  const T* limit;
  int64_t image, channel, row, column;
  int lanes;
};

// What follows the convolution: a residual, added, then the activation. A residual of null is none; else it is a map
// like the output.
template <class T>
struct After {
  Activation activation = Activation::none;
  Map<const T> residual{};
};

}  // namespace acnet
