#include "moe/nn/dropout.hpp"

#include "../support.hpp"

using namespace moe;
using test::random_matrix;

TEST_CASE("dropout: an entry is dropped or grows, and its gradient with it", "[nn][dropout]") {
  const Dropout<double> dropout({.rate = 0.75}, 5);
  const Matrix<double> x = random_matrix(40, 13, 1);
  const Matrix<double> dy = random_matrix(40, 13, 2);
  Dropout<double>::Tape tape;
  const Matrix<double> y = dropout.forward(x, tape, {.step = 1});
  const Matrix<double> dx = dropout.backward(dy, tape);
  for (Index i = 0; i < x.size(); ++i) {
    const bool kept = y.data()[i] != 0;
    CHECK(y.data()[i] == (kept ? 4 * x.data()[i] : 0));
    CHECK(dx.data()[i] == (kept ? 4 * dy.data()[i] : 0));
  }
}

TEMPLATE_TEST_CASE("dropout: the key decides, not the pass, the threads or the Scalar",
                   "[nn][dropout]", float, double) {
  const Matrix<TestType> ones = Matrix<TestType>::Ones(301, 67);
  const Dropout<TestType> dropout({.rate = 0.5}, 5);
  const auto mask = [&](const NoiseKey& key, const Dropout<TestType>& module) {
    typename Dropout<TestType>::Tape tape;
    return Matrix<TestType>(module.forward(ones, tape, key));
  };
  const Matrix<TestType> y = mask({.step = 3}, dropout);
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    CHECK(test::same_bits(mask({.step = 3}, dropout), y));
    typename Dropout<TestType>::Tape tape;
    dropout.forward(ones, tape, {.step = 3});
    CHECK(test::same_bits(dropout.backward(ones, tape), y));
  }
  CHECK_FALSE(test::same_bits(mask({.step = 4}, dropout), y));
  CHECK_FALSE(test::same_bits(mask({.step = 3}, Dropout<TestType>({.rate = 0.5}, 6)), y));
  // Tokens keep their noise when a batch is cut.
  CHECK(test::same_bits(mask({.step = 3, .first_token = 100}, dropout).topRows(201),
                        y.bottomRows(201)));
  typename Dropout<float>::Tape tape;
  const Matrix<float> in_float =
      Dropout<float>({.rate = 0.5}, 5).forward(Matrix<float>::Ones(301, 67), tape, {.step = 3});
  CHECK(test::same_bits(in_float.cast<TestType>(), y));
}

TEST_CASE("dropout: keeps the mean and drops at the rate", "[nn][dropout]") {
  const double rate = GENERATE(0.1, 0.5, 0.9);
  const Dropout<double> dropout({.rate = rate}, 5);
  const Index columns = 203;
  Dropout<double>::Tape tape;
  const Matrix<double>& y = dropout.forward(Matrix<double>::Ones(500, columns), tape, {.step = 8});
  // Five standard deviations of a mean of 101500 entries.
  const double bound = 5 * std::sqrt(rate / (1 - rate) / (500 * columns));
  CHECK_THAT(y.mean(), Catch::Matchers::WithinAbs(1.0, bound));
  // Each of the four words of a block drops at the same rate.
  for (Index lane = 0; lane < 4; ++lane) {
    double kept = 0;
    for (Index c = lane; c < 200; c += 4) kept += y.col(c).cwiseSign().sum();
    CHECK_THAT(kept / (500 * 50), Catch::Matchers::WithinAbs(1 - rate, 0.02));
  }
}

TEST_CASE("dropout: identity in evaluation and at rate 0", "[nn][dropout]") {
  const Matrix<float> x = random_matrix<float>(5, 9, 1);
  Dropout<float>::Tape tape;
  CHECK(test::same_bits(Dropout<float>({.rate = 0.5}, 0).evaluate(x), x));
  CHECK(test::same_bits(Dropout<float>({.rate = 0.5}, 0).evaluate(x, tape), x));
  CHECK(test::same_bits(Dropout<float>({}, 0).forward(x, tape, {.step = 0}), x));
  CHECK(test::same_bits(Dropout<float>({}, 0).backward(x, tape), x));
}

TEST_CASE("dropout: NaN is not hidden", "[nn][dropout]") {
  const Matrix<float> x = Matrix<float>::Constant(4, 9, std::numeric_limits<float>::quiet_NaN());
  Dropout<float>::Tape tape;
  CHECK(Dropout<float>({.rate = 0.5}, 0).forward(x, tape, {.step = 0}).array().isNaN().all());
}

TEST_CASE("dropout: no parameters", "[nn][dropout]") {
  CHECK(parameter_count(Dropout<float>({.rate = 0.5}, 0)) == 0);
}

TEST_CASE("dropout: what is wrong is named", "[nn][dropout]") {
  CHECK_THROWS_WITH(Dropout<float>({.rate = 1.0}, 0),
                    "moe: Dropout::Config.rate = 1, must be in [0, 1)");
  CHECK_THROWS_WITH(Dropout<float>({.rate = -0.5}, 0),
                    "moe: Dropout::Config.rate = -0.5, must be in [0, 1)");
  CHECK_THROWS_AS(Dropout<float>({.rate = std::nan("")}, 0), std::invalid_argument);
  const Dropout<float> dropout({.rate = 0.5}, 0);
  Dropout<float>::Tape tape;
  dropout.forward(Matrix<float>::Ones(4, 3), tape, {.step = 0});
  dropout.evaluate(Matrix<float>::Ones(5, 3), tape);
  CHECK_THROWS_WITH(dropout.backward(Matrix<float>::Ones(5, 3), tape),
                    "moe: Dropout::backward: the last pass on this tape was an evaluation");
}
