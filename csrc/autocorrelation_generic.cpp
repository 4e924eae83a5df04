// The cross-correlation's passes for any processor.
#include "autocorrelation.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace acnet::autocorrelation::generic {
namespace {
template <class A, class V>
V multiply_add(A a, V b, V c) {
  return a * b + c;
}
}  // namespace
}  // namespace acnet::autocorrelation::generic

#define ACNET_ISA generic
#define ACNET_REGISTER 16
#define ACNET_TILE 4
#include "autocorrelation_kernels.h"
