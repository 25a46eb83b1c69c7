// Must not compile, and say why (tests/CMakeLists.txt).

#include <vector>

#include "moe/nn/softmax_cross_entropy.hpp"

float loss(const moe::Matrix<float>& logits, const std::vector<int>& targets) {
  return moe::SoftmaxCrossEntropy<float>().evaluate(logits, targets);
}
