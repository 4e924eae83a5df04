// What follows a sum of batch norms, after the residual; ops/epilogue.py has the same numbers.
#pragma once

#include <cstdint>

namespace acnet {

enum class Activation : int64_t { none, relu, relu6, hardswish, silu };
constexpr bool is_clamp(Activation a) { return a == Activation::relu || a == Activation::relu6; }

}  // namespace acnet
