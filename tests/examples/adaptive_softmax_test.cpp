#include "../../examples/language_model/adaptive_softmax.hpp"

#include "../support.hpp"

using namespace moe;
using Catch::Matchers::WithinAbs;
using language_model::AdaptiveSoftmax;
using test::random_matrix;

namespace {

constexpr Index vocabulary = 23;
// In every range, some twice; with {5, 9} the ranges are [0, 5), [5, 9) and [9, 23).
const std::vector<Index> targets{0, 4, 5, 8, 9, 22, 4, 9, 1};

AdaptiveSoftmax<double> make(const std::vector<Index>& cutoffs, Index shrink = 2) {
  return AdaptiveSoftmax<double>(
      {.vocabulary = vocabulary, .width = 6, .cutoffs = cutoffs, .shrink = shrink}, 3);
}

}  // namespace

TEST_CASE("adaptive softmax: gradients agree with differences", "[examples][adaptive_softmax]") {
  const auto cutoffs =
      GENERATE(std::vector<Index>{}, std::vector<Index>{vocabulary}, std::vector<Index>{5},
               std::vector<Index>{5, 9}, std::vector<Index>{1, 5, 9, 22});
  AdaptiveSoftmax<double> softmax = make(cutoffs);
  Matrix<double> x = random_matrix(static_cast<Index>(targets.size()), 6, 1);
  AdaptiveSoftmax<double>::Tape tape, scratch;
  const auto loss = [&] { return softmax.evaluate(x, targets, scratch); };
  CHECK(softmax.forward(x, targets, tape) == loss());
  const Matrix<double> dx = softmax.backward(tape);
  CHECK(test::relative_error(dx, test::difference_gradient(x, loss)) < 1e-7);
  test::check_parameter_gradients(softmax, loss);
}

TEST_CASE("adaptive softmax: the probabilities are those of the loss and add up to one",
          "[examples][adaptive_softmax]") {
  const auto cutoffs =
      GENERATE(std::vector<Index>{}, std::vector<Index>{5}, std::vector<Index>{5, 9});
  const AdaptiveSoftmax<double> softmax = make(cutoffs, 3);
  const Matrix<double> x = random_matrix(static_cast<Index>(targets.size()), 6, 1, 3.0);
  const Matrix<double> log_probabilities = softmax.log_probabilities(x);
  REQUIRE(log_probabilities.cols() == vocabulary);
  double loss = 0;
  for (Index t = 0; t < x.rows(); ++t) {
    CHECK_THAT(log_probabilities.row(t).array().exp().sum(), WithinAbs(1, 1e-13));
    loss -= log_probabilities(t, targets[detail::to_size(t)]);
  }
  AdaptiveSoftmax<double>::Tape tape;
  CHECK_THAT(softmax.evaluate(x, targets, tape),
             WithinAbs(loss / static_cast<double>(x.rows()), 1e-13));
}

TEST_CASE("adaptive softmax: without tails it is the linear layer and its cross-entropy",
          "[examples][adaptive_softmax]") {
  AdaptiveSoftmax<double> softmax = make({});
  const Matrix<double> x = random_matrix(static_cast<Index>(targets.size()), 6, 1);
  Linear<double> linear({.inputs = 6, .outputs = vocabulary}, 3);
  AdaptiveSoftmax<double>::Tape tape;
  CHECK(softmax.forward(x, targets, tape) ==
        SoftmaxCrossEntropy<double>().evaluate(linear.evaluate(x), targets));
}

TEST_CASE("adaptive softmax: on inputs of zero the frequencies are the probabilities",
          "[examples][adaptive_softmax]") {
  AdaptiveSoftmax<double> softmax = make({5, 9});
  std::vector<double> frequencies(vocabulary);
  double sum = 0;
  for (std::size_t v = 0; v < frequencies.size(); ++v) {
    sum += frequencies[v] = 1 / static_cast<double>(v + 1);
  }
  for (double& frequency : frequencies) frequency /= sum;
  softmax.start_from_frequencies(frequencies);
  const Matrix<double> log_probabilities = softmax.log_probabilities(Matrix<double>::Zero(1, 6));
  for (Index v = 0; v < vocabulary; ++v) {
    CHECK_THAT(log_probabilities(0, v),
               WithinAbs(std::log(frequencies[detail::to_size(v)]), 1e-13));
  }
}

TEST_CASE("adaptive softmax: tails without a token", "[examples][adaptive_softmax]") {
  AdaptiveSoftmax<double> softmax = make({5, 9});
  const Matrix<double> x = random_matrix(2, 6, 1);
  AdaptiveSoftmax<double>::Tape tape;
  softmax.forward(random_matrix(static_cast<Index>(targets.size()), 6, 2), targets, tape);
  CHECK(std::isfinite(softmax.forward(x, std::vector<Index>{0, 3}, tape)));
  CHECK(softmax.backward(tape).rows() == 2);
  for_each_parameter(softmax, [](const std::string& name, const auto& parameter) {
    INFO(name);
    if (name.starts_with("tails")) CHECK(parameter.gradient().isZero(0));
  });
}

TEST_CASE("adaptive softmax: what is wrong is named", "[examples][adaptive_softmax]") {
  const AdaptiveSoftmax<double> softmax = make({5, 9});
  AdaptiveSoftmax<double>::Tape tape;
  const Matrix<double> x = random_matrix(1, 6, 1);
  CHECK_THROWS_AS(softmax.evaluate(x, std::vector<Index>{vocabulary}, tape), std::invalid_argument);
  CHECK_THROWS_AS(softmax.evaluate(x, std::vector<Index>{-1}, tape), std::invalid_argument);
  CHECK_THROWS_AS(make({9, 5}), std::invalid_argument);
  CHECK_THROWS_AS(make({5}, 0), std::invalid_argument);
}
