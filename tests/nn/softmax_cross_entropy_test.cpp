#include "moe/nn/softmax_cross_entropy.hpp"

#include "../support.hpp"
#include "moe/parameter.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;
using test::random_matrix;

TEST_CASE("cross-entropy: worked by hand", "[nn][softmax_cross_entropy]") {
  // Rows with softmax (1/4, 3/4), ignored, (1/2, 1/2).
  Matrix<double> logits(3, 2);
  logits << 0, std::log(3.0), 5, 7, -2, -2;
  const std::vector<Index> targets{0, -1, 1};
  const SoftmaxCrossEntropy<double> loss;
  SoftmaxCrossEntropy<double>::Tape tape;
  CHECK_THAT(loss.forward(logits, targets, tape), WithinAbs(std::log(8.0) / 2, 1e-14));
  CHECK_THAT(tape.losses[0], WithinAbs(std::log(4.0), 1e-14));
  CHECK(tape.losses[1] == 0);
  CHECK_THAT(tape.losses[2], WithinAbs(std::log(2.0), 1e-14));
  Matrix<double> expected(3, 2);
  expected << -0.375, 0.375, 0, 0, 0.25, -0.25;
  CHECK(test::relative_error(loss.backward(tape), expected) < 1e-14);
}

TEST_CASE("cross-entropy: gradient agrees with differences", "[nn][softmax_cross_entropy]") {
  const Index classes = GENERATE(1, 2, 7, 8, 19, 40);
  const double scale = GENERATE(0.1, 1.0, 5.0);
  Matrix<double> logits = random_matrix(6, classes, 1, scale);
  const std::vector<Index> targets{0, -1, classes - 1, classes / 2, -7, 0};
  const SoftmaxCrossEntropy<double> loss;
  SoftmaxCrossEntropy<double>::Tape tape;
  loss.forward(logits, targets, tape);
  const Matrix<double> expected =
      test::difference_gradient(logits, [&] { return loss.evaluate(logits, targets); });
  // One class has no gradient, so only the differences' own rounding is left.
  if (classes == 1) {
    CHECK(tape.dlogits.isZero(1e-15));
  } else {
    CHECK(test::relative_error(loss.backward(tape), expected) < 1e-7);
  }
  CHECK(tape.dlogits.row(1).isZero(0));
  CHECK(tape.dlogits.row(4).isZero(0));
}

TEMPLATE_TEST_CASE("cross-entropy: the same bits from evaluate and on any number of threads",
                   "[nn][softmax_cross_entropy]", float, double) {
  const auto logits = random_matrix<TestType>(150, 333, 1);
  std::vector<Index> targets(150);
  for (Index t = 0; t < 150; ++t) targets[detail::to_size(t)] = t * 7 % 333 - 5;
  const SoftmaxCrossEntropy<TestType> loss;
  TestType value{};
  Matrix<TestType> dlogits;
  double naive = 0;
  Index counted = 0;
  for (Index t = 0; t < 150; ++t) {
    const Index target = targets[detail::to_size(t)];
    if (target < 0) continue;
    double sum = 0;
    for (Index i = 0; i < 333; ++i) sum += std::exp(static_cast<double>(logits(t, i)));
    naive += std::log(sum) - static_cast<double>(logits(t, target));
    ++counted;
  }
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    typename SoftmaxCrossEntropy<TestType>::Tape tape;
    const TestType now = loss.forward(logits, targets, tape);
    if (threads == 1) {
      value = now;
      dlogits = tape.dlogits;
      CHECK_THAT(static_cast<double>(value),
                 WithinAbs(naive / static_cast<double>(counted), test::tolerance<TestType>));
    }
    CHECK(now == value);
    CHECK(loss.evaluate(logits, targets) == value);
    CHECK(test::same_bits(tape.dlogits, dlogits));
  }
}

TEMPLATE_TEST_CASE("cross-entropy: no overflow from large logits", "[nn][softmax_cross_entropy]",
                   float, double) {
  Matrix<TestType> logits(2, 3);
  logits << 30000, 29999, -30000, -30000, -30001, -60000;
  const SoftmaxCrossEntropy<TestType> loss;
  typename SoftmaxCrossEntropy<TestType>::Tape tape;
  const std::vector<Index> targets{1, 1};
  const double expected = 1 + std::log1p(std::exp(-1.0));
  CHECK_THAT(static_cast<double>(loss.forward(logits, targets, tape)), WithinAbs(expected, 1e-5));
  CHECK(tape.dlogits.allFinite());
  CHECK(test::same_bits(tape.dlogits.row(0).leftCols(2), tape.dlogits.row(1).leftCols(2)));
}

TEST_CASE("cross-entropy: a row has the same bits at any address", "[nn][softmax_cross_entropy]") {
  const Matrix<float> wide = random_matrix<float>(1, 80, 1);
  Matrix<float> block(4, 80);
  for (Index t = 0; t < 4; ++t) block.row(t).segment(t + 1, 37) = wide.row(0).head(37);
  const SoftmaxCrossEntropy<float> loss;
  const std::vector<Index> target{3};
  const float expected = loss.evaluate(wide.leftCols(37), target);
  for (Index t = 0; t < 4; ++t) {
    CHECK(loss.evaluate(block.block(t, t + 1, 1, 37), target) == expected);
  }
}

TEST_CASE("cross-entropy: nothing to count is a loss of 0", "[nn][softmax_cross_entropy]") {
  const SoftmaxCrossEntropy<float> loss;
  SoftmaxCrossEntropy<float>::Tape tape;
  CHECK(loss.forward(Matrix<float>(0, 5), {}, tape) == 0);
  CHECK(tape.dlogits.rows() == 0);
  const std::vector<Index> ignored{-1, -1};
  CHECK(loss.forward(Matrix<float>::Ones(2, 5), ignored, tape) == 0);
  CHECK(tape.dlogits.isZero(0));
  CHECK(loss.evaluate(Matrix<float>(2, 0), ignored) == 0);
  CHECK(parameter_count(loss) == 0);
}

TEMPLATE_TEST_CASE("cross-entropy: NaN reaches the loss and its row only",
                   "[nn][softmax_cross_entropy]", float, double) {
  for (Index position = 0; position < 37; ++position) {
    auto logits = random_matrix<TestType>(3, 37, 1);
    logits(1, position) = std::numeric_limits<TestType>::quiet_NaN();
    const SoftmaxCrossEntropy<TestType> loss;
    typename SoftmaxCrossEntropy<TestType>::Tape tape;
    const std::vector<Index> targets{0, 1, 2};
    CHECK(std::isnan(loss.forward(logits, targets, tape)));
    CHECK(tape.dlogits.row(1).array().isNaN().all());
    CHECK(tape.dlogits.row(0).allFinite());
    CHECK(tape.dlogits.row(2).allFinite());
  }
}

TEST_CASE("cross-entropy: what is wrong is named and changes nothing",
          "[nn][softmax_cross_entropy]") {
  const SoftmaxCrossEntropy<float> loss;
  SoftmaxCrossEntropy<float>::Tape tape;
  const Matrix<float> logits = Matrix<float>::Ones(2, 5);
  const std::vector<Index> good{0, 4};
  const std::vector<Index> large{0, 5};
  const std::vector<Index> many{0, 1, 2};
  loss.forward(logits, good, tape);
  CHECK_THROWS_AS(loss.forward(logits, large, tape), std::invalid_argument);
  CHECK_THROWS_WITH(loss.evaluate(logits, large),
                    "moe: SoftmaxCrossEntropy: target 5 is outside the 5 classes");
  CHECK_THROWS_WITH(loss.forward(logits, many, tape),
                    "moe: SoftmaxCrossEntropy: 3 targets for 2 rows of logits");
  const std::vector<std::uint8_t> one{1}, three{1, 1, 1};
  CHECK_THROWS_WITH(loss.forward(logits, good, tape, one),
                    "moe: SoftmaxCrossEntropy: valid has 1 entries for 2 rows of logits");
  CHECK_THROWS_WITH(loss.evaluate(logits, good, tape, three),
                    "moe: SoftmaxCrossEntropy: valid has 3 entries for 2 rows of logits");
  CHECK_THROWS_WITH(loss.evaluate(logits, large, std::vector<std::uint8_t>{0, 1}),
                    "moe: SoftmaxCrossEntropy: target 5 is outside the 5 classes");
  CHECK(tape.losses.size() == 2);
  CHECK_NOTHROW(loss.backward(tape));
}

TEST_CASE("softmax cross-entropy: no backward after an evaluation", "[nn]") {
  const SoftmaxCrossEntropy<float> loss;
  SoftmaxCrossEntropy<float>::Tape tape;
  const Matrix<float> logits = Matrix<float>::Ones(2, 3);
  const std::vector<Index> targets{0, 2};
  const char* const refused =
      "moe: SoftmaxCrossEntropy::backward without a forward pass on this tape";
  CHECK_THROWS_WITH(loss.backward(tape), refused);
  loss.forward(logits, targets, tape);
  CHECK_NOTHROW(loss.backward(tape));
  loss.evaluate(logits, targets, tape);
  CHECK_THROWS_WITH(loss.backward(tape), refused);
}

TEMPLATE_TEST_CASE("cross-entropy: what is not valid is as if it were not there, to the bit",
                   "[nn][softmax_cross_entropy]", float, double) {
  constexpr TestType nan = std::numeric_limits<TestType>::quiet_NaN();
  constexpr Index rows = 90;
  constexpr Index classes = 37;
  Matrix<TestType> logits = random_matrix<TestType>(rows, classes, 1, 2.0);
  Matrix<TestType> compact(rows, classes);
  std::vector<Index> targets, compact_targets, kept;
  std::vector<std::uint8_t> valid;
  for (Index t = 0; t < rows; ++t) {
    valid.push_back(t % 3 == 1 ? 0 : static_cast<std::uint8_t>(t + 1));  // anything but 0
    targets.push_back(t * 7 % (classes + 2) - 2);  // some of the valid ones are ignored
    if (valid.back() != 0) {
      compact.row(static_cast<Index>(kept.size())) = logits.row(t);
      compact_targets.push_back(targets.back());
      kept.push_back(t);
    } else {
      logits.row(t).setConstant(t % 2 == 0 ? nan : std::numeric_limits<TestType>::infinity());
      targets.back() = t % 2 == 0 ? -1 : classes + 5;
    }
  }
  const Matrix<TestType> small = compact.topRows(static_cast<Index>(kept.size()));
  const SoftmaxCrossEntropy<TestType> loss;
  typename SoftmaxCrossEntropy<TestType>::Tape tape, compact_tape;
  const TestType expected = loss.forward(small, compact_targets, compact_tape);
  const test::Threads scope(GENERATE(1, 3));
  CHECK(expected > 0);
  CHECK(loss.forward(logits, targets, tape, valid) == expected);
  CHECK(loss.evaluate(logits, targets, valid) == expected);
  Matrix<TestType> dlogits = Matrix<TestType>::Zero(rows, classes);
  std::vector<double> losses(rows, 0.0);
  for (std::size_t i = 0; i < kept.size(); ++i) {
    dlogits.row(kept[i]) = compact_tape.dlogits.row(static_cast<Index>(i));
    losses[detail::to_size(kept[i])] = compact_tape.losses[i];
  }
  CHECK(test::same_bits(loss.backward(tape), dlogits));
  CHECK(tape.losses == losses);

  // All valid is the same as no mask.
  const std::vector<std::uint8_t> all(kept.size(), 1);
  CHECK(loss.forward(small, compact_targets, tape, all) == expected);
  CHECK(test::same_bits(tape.dlogits, compact_tape.dlogits));
}

TEST_CASE("cross-entropy: the mean over valid rows by hand", "[nn][softmax_cross_entropy]") {
  // Rows with softmax (1/4, 3/4), not valid, (1/2, 1/2), ignored by its target.
  Matrix<double> logits(4, 2);
  logits << 0, std::log(3.0), 5, 7, -2, -2, 1, 2;
  const std::vector<Index> targets{0, 1, 1, -1};
  const std::vector<std::uint8_t> valid{1, 0, 1, 1};
  const SoftmaxCrossEntropy<double> loss;
  SoftmaxCrossEntropy<double>::Tape tape;
  CHECK_THAT(loss.forward(logits, targets, tape, valid), WithinAbs(std::log(8.0) / 2, 1e-14));
  Matrix<double> expected(4, 2);
  expected << -0.375, 0.375, 0, 0, 0.25, -0.25, 0, 0;
  CHECK(test::relative_error(loss.backward(tape), expected) < 1e-14);
}

TEST_CASE("cross-entropy: no valid row is a loss of 0", "[nn][softmax_cross_entropy]") {
  const SoftmaxCrossEntropy<float> loss;
  SoftmaxCrossEntropy<float>::Tape tape;
  const Matrix<float> nan = Matrix<float>::Constant(2, 3, std::numeric_limits<float>::quiet_NaN());
  const std::vector<Index> targets{-1, 7};
  const std::vector<std::uint8_t> none{0, 0};
  CHECK(loss.forward(nan, targets, tape, none) == 0);
  CHECK(loss.backward(tape).isZero(0));
  CHECK(tape.losses == std::vector<double>{0, 0});
  CHECK(loss.evaluate(nan, targets, none) == 0);
}
