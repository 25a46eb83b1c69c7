#include "moe/nn/accuracy.hpp"

#include <cstdint>
#include <limits>
#include <vector>

#include "../allocation.hpp"
#include "../support.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

double one(std::vector<double> logits, Index target) {
  const Matrix<double> row =
      Eigen::Map<const Matrix<double>>(logits.data(), 1, static_cast<Index>(logits.size()));
  return accuracy(row, std::vector<Index>{target});
}

}  // namespace

TEST_CASE("accuracy: the share of tokens whose largest logit is the target's", "[nn][accuracy]") {
  Matrix<float> logits(5, 3);
  logits << 1, 2, 3, 3, 2, 1, 0, 5, -1, -3, -2, -1, 7, 8, 6;
  CHECK(accuracy(logits, std::vector<Index>{2, 0, 1, 2, 1}) == 1);
  CHECK(accuracy(logits, std::vector<Index>{0, 1, 2, 0, 0}) == 0);
  CHECK_THAT(accuracy(logits, std::vector<Index>{2, 0, 0, 2, 0}), WithinAbs(0.6, 1e-15));
  // A part of a matrix, and an expression.
  CHECK_THAT(accuracy(logits.middleCols(1, 2), std::vector<Index>{1, 0, 0, 1, 1}),
             WithinAbs(0.8, 1e-15));
  CHECK(accuracy(-logits, std::vector<Index>{0, 2, 2, 0, 2}) == 1);
}

TEST_CASE("accuracy: of equal logits the first is the largest, and NaN is wrong",
          "[nn][accuracy]") {
  CHECK(one({4, 4, 1}, 0) == 1);
  CHECK(one({4, 4, 1}, 1) == 0);
  CHECK(one({1, 4, 4}, 1) == 1);
  CHECK(one({1, 4, 4}, 2) == 0);
  CHECK(one({0}, 0) == 1);
  CHECK(one({1, infinity, -infinity}, 1) == 1);
  for (Index target = 0; target < 3; ++target) {
    CHECK(one({not_a_number, 1, 2}, target) == 0);
    CHECK(one({1, not_a_number, 2}, target) == 0);
    CHECK(one({3, 1, not_a_number}, target) == 0);
    CHECK(one({not_a_number, not_a_number, not_a_number}, target) == 0);
  }
}

TEST_CASE("accuracy: ignored tokens do not count", "[nn][accuracy]") {
  Matrix<double> logits(4, 2);
  logits << 0, 1, not_a_number, not_a_number, 1, 0, 0, 1;
  // Right, ignored by its target, wrong, right.
  CHECK_THAT(accuracy(logits, std::vector<Index>{1, -1, 1, 1}), WithinAbs(2.0 / 3, 1e-15));
  // The target of padding is not read.
  const std::vector<std::uint8_t> valid{1, 0, 0, 7};
  CHECK(accuracy(logits, std::vector<Index>{1, 99, 99, 1}, valid) == 1);
  CHECK(accuracy(logits, std::vector<Index>{1, 99, 99, 0}, valid) == 0.5);
  CHECK(accuracy(logits, std::vector<Index>{-1, 99, 99, 0}, valid) == 0);
  const std::vector<std::uint8_t> none(4, 0);
  CHECK(accuracy(logits, std::vector<Index>{1, 0, 1, 1}, none) == 0);
  CHECK(accuracy(Matrix<double>(0, 2), std::vector<Index>{}) == 0);
}

TEST_CASE("accuracy: allocates nothing", "[nn][accuracy]") {
  const Matrix<float> logits = test::random_matrix<float>(100, 10, 1);
  const std::vector<Index> targets(100, 3);
  double share = 0;
  CHECK(test::allocations_in([&] { share = accuracy(logits, targets); }) == 0);
  CHECK(share > 0);
  CHECK(share < 0.5);
}

TEST_CASE("accuracy: what is wrong is named", "[nn][accuracy]") {
  const Matrix<float> logits = Matrix<float>::Zero(2, 3);
  CHECK_THROWS_WITH(accuracy(logits, std::vector<Index>{0}),
                    "moe: accuracy: 1 targets for 2 rows of logits");
  CHECK_THROWS_WITH(accuracy(logits, std::vector<Index>{0, 3}),
                    "moe: accuracy: target 3 is outside the 3 classes");
  CHECK_THROWS_WITH(accuracy(logits, std::vector<Index>{0, 1}, std::vector<std::uint8_t>{1}),
                    "moe: accuracy: valid has 1 entries for 2 rows of logits");
}
