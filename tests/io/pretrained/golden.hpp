#pragma once

#include <string>

#include "../../support.hpp"
#include "moe/io/pretrained.hpp"

/// \file
/// The models of tests/pretrained, which make_golden.py wrote, and what transformers computed with them.

namespace moe::test {

inline std::string golden(const std::string& model) { return MOE_TEST_PRETRAINED "/" + model; }

/// The rows x, y, dy and dx of a pass that transformers computed.
inline Matrix<double> golden_rows(const std::string& model, const std::string& name) {
  return SafetensorsFile(golden(model) + "/passes.safetensors").matrix<double>(name);
}

/// The largest difference between two matrices of one shape.
template <class A, class B>
double largest_difference(const A& a, const B& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  return (a - b).cwiseAbs().maxCoeff();
}

}  // namespace moe::test
