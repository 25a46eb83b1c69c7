#pragma once

#include "moe/nn/linear.hpp"

/// \file
/// What tests of saving and loading save.

namespace moe::test {

/// A layer all of whose numbers are `value`.
inline Linear<float> filled(float value) {
  Linear<float> linear({.inputs = 30, .outputs = 20}, 1);
  linear.weight.value.setConstant(value);
  linear.bias.value.setConstant(value);
  return linear;
}

}  // namespace moe::test
