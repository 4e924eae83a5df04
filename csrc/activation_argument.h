// An operator's argument that is the number of an activation.
#pragma once

#include "activation.h"
#include "check.h"

namespace acnet {

inline Activation activation_of(const Check& check, int64_t number) {
  check(number >= 0 && number <= static_cast<int64_t>(Activation::silu), "activation must be a number from 0 to ",
        static_cast<int64_t>(Activation::silu), ", got ", number);
  return static_cast<Activation>(number);
}

}  // namespace acnet
