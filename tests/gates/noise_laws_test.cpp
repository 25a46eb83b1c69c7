#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "law_runs.hpp"

// Pass::noise: numbers that are given instead of drawn.

using namespace moe;
using namespace moe::test;

namespace {

template <class Law>
Index noise_columns(const typename Law::Gate& gate) {
  if constexpr (requires { gate.noise_columns(); }) {
    return gate.noise_columns();
  } else {
    return 0;
  }
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("gates: noise that is given is as good as drawn", "[gate][laws][noise]",
                        test::GateLaws) {
  const auto gate = make_gate<TestType>();
  const auto x = random_rows<TestType>();
  const Pass pass{.step = (std::uint64_t{1} << 33) + 2, .first_token = 9};
  const std::vector<double> noise = TestType::drawn_noise(gate, TestType::seed, x, pass);
  REQUIRE(static_cast<Index>(noise.size()) == 12 * noise_columns<TestType>(gate));
  if (noise.empty()) return;
  GateRun<TestType> drawn(gate, x, random_dweight<TestType>(), pass);
  GateRun<TestType> given(gate, x, random_dweight<TestType>(), {.step = 0, .noise = noise});
  check_same(given, drawn);
  // Neither step nor place is used then, and another noise is another pass.
  GateRun<TestType> other(gate, x, random_dweight<TestType>(), {.step = 0});
  CHECK_FALSE(same_bits(other.dx, given.dx));
}

TEMPLATE_LIST_TEST_CASE("gates: a row of noise is of the row of x, whatever the mask",
                        "[gate][laws][noise]", test::GateLaws) {
  const auto gate = make_gate<TestType>();
  const auto x = random_rows<TestType>();
  const Pass key{.step = 2, .first_token = 5};
  std::vector<double> noise = TestType::drawn_noise(gate, TestType::seed, x, key);
  if (noise.empty()) return;
  const std::vector<std::uint8_t> valid{0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0};
  Pass masked = key;
  masked.valid = valid;
  GateRun<TestType> drawn(gate, x, random_dweight<TestType>(), masked);
  const std::size_t columns = noise.size() / 12;
  for (std::size_t i = 0; i < noise.size(); ++i) {
    if (valid[i / columns] == 0) noise[i] = std::nan("");  // which is not read
  }
  GateRun<TestType> given(gate, x, random_dweight<TestType>(),
                          {.step = 0, .valid = valid, .noise = noise});
  check_same(given, drawn);
}

TEMPLATE_LIST_TEST_CASE("gates: gradients with given noise are derivatives", "[gate][laws][noise]",
                        test::GateLawsInDouble) {
  const auto gate = make_gate<TestType>();
  const Index columns = noise_columns<TestType>(gate);
  if (columns == 0) return;
  // In [0, 1), which is in the range of any noise.
  const Matrix<double> noise =
      test::random_matrix(12, columns, 3).unaryExpr([](double n) { return std::abs(std::sin(n)); });
  test::check_gradients<TestType>(
      {.step = 3, .noise = {noise.data(), static_cast<std::size_t>(noise.size())}});
}

TEMPLATE_LIST_TEST_CASE("gates: noise of another size is refused", "[gate][laws][noise]",
                        test::GateLaws) {
  const auto gate = make_gate<TestType>();
  const Index columns = noise_columns<TestType>(gate);
  typename TestType::Tape tape;
  for (const Index size : {Index{1}, 12 * columns - 1, 12 * columns + 1}) {
    if (size < 1) continue;
    const std::vector<double> noise(static_cast<std::size_t>(size), 0.5);
    const Pass pass{.step = 0, .noise = noise};
    CHECK_THROWS_AS(gate.forward(random_rows<TestType>(), tape, pass), std::invalid_argument);
    CHECK_THROWS_WITH(gate.forward(random_rows<TestType>(), tape, pass),
                      std::string("moe: ") + TestType::name + ": Pass.noise has " +
                          std::to_string(size) + " numbers, must be 12 x " +
                          std::to_string(columns) + " or none");
    CHECK_FALSE(tape.trained);
  }
}

TEMPLATE_TEST_CASE("gates: a noise of zeros is none", "[gate][laws][noise]",
                   test::NoisyTopKLaw<float>, test::NoisyTopKLaw<double>,
                   test::HierarchicalLaw<float>, test::HierarchicalLaw<double>,
                   (test::SharedExpertLaw<test::NoisyTopKLaw<double>, true>)) {
  const auto gate = make_gate<TestType>();
  const auto x = random_rows<TestType>();
  const std::vector<double> zeros(static_cast<std::size_t>(12 * noise_columns<TestType>(gate)),
                                  0.0);
  typename TestType::Tape tape;
  gate.forward(x, tape, {.step = 3, .noise = zeros});
  typename TestType::Tape clean;
  gate.evaluate(x, clean);
  CHECK(same_routing(tape.routing, clean.routing));
  CHECK(same_bits(tape.balance.importance, clean.balance.importance));
  if constexpr (requires { tape.noisy; }) CHECK(same_bits(tape.noisy, tape.clean));
}

TEMPLATE_TEST_CASE("gates: a factor of the noise multiplies what is drawn and what is given",
                   "[gate][laws][noise]", test::NoisyTopKLaw<float>, test::NoisyTopKLaw<double>,
                   test::ProductKeyLaw<float>,
                   (test::SharedExpertLaw<test::NoisyTopKLaw<double>, true>)) {
  const auto gate = make_gate<TestType>();
  const auto x = random_rows<TestType>();
  const Pass pass{.step = 3, .first_token = 4};
  const std::vector<double> noise = TestType::drawn_noise(gate, TestType::seed, x, pass);
  // A quarter of a number is exact, and so is the product of a quarter and a half.
  const auto times = [&](double factor) {
    std::vector<double> scaled = noise;
    for (double& n : scaled) n *= factor;
    return scaled;
  };
  const std::vector<double> quarter = times(0.25);
  const std::vector<double> half = times(0.5);
  const auto run = [&](const Pass& of) {
    return GateRun<TestType>(gate, x, random_dweight<TestType>(), of);
  };
  auto expected = run({.step = 0, .noise = quarter});
  auto drawn = run({.step = 3, .first_token = 4, .noise_factor = 0.25});
  auto given = run({.step = 0, .noise = half, .noise_factor = 0.5});
  check_same(drawn, expected);
  check_same(given, expected);
  CHECK_FALSE(same_bits(run(pass).dx, expected.dx));

  // None at all, and then the given numbers are not read.
  typename TestType::Tape clean;
  gate.evaluate(x, clean);
  const std::vector<double> unread(noise.size(), std::nan(""));
  for (const std::vector<double>& numbers : {std::vector<double>(), unread}) {
    typename TestType::Tape tape;
    gate.forward(x, tape, {.step = 3, .noise = numbers, .noise_factor = 0});
    CHECK(same_routing(tape.routing, clean.routing));
  }
}

TEST_CASE("gates: a factor of the noise is one of both levels of a hierarchy",
          "[gate][laws][noise]") {
  using Law = test::HierarchicalLaw<double>;
  const auto gate = make_gate<Law>();
  const auto x = random_rows<Law>();
  typename Law::Tape whole, part;
  gate.forward(x, whole, {.step = 3});
  gate.forward(x, part, {.step = 3, .noise_factor = 0.25});
  CHECK(part.primary.noise == 0.25 * whole.primary.noise);
  // Groups that both passes chose for a token; the others' noise is NaN.
  const auto all = Law::drawn_noise(gate, Law::seed, x, {.step = 3});
  const auto quarter = Law::drawn_noise(gate, Law::seed, x, {.step = 3, .noise_factor = 0.25});
  int compared = 0;
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (std::isnan(all[i]) || std::isnan(quarter[i])) continue;
    CHECK(quarter[i] == 0.25 * all[i]);
    ++compared;
  }
  CHECK(compared > 12 * 3 + 12 * 4);  // the first level, and a group a token and more

  gate.forward(x, part, {.step = 3, .noise_factor = 0});
  gate.evaluate(x, whole);
  CHECK(same_routing(part.routing, whole.routing));
}

TEMPLATE_LIST_TEST_CASE("gates: gradients with a factor of the noise are derivatives",
                        "[gate][laws][noise]", test::GateLawsInDouble) {
  test::check_gradients<TestType>({.step = 3, .noise_factor = 0.375});
}

TEMPLATE_LIST_TEST_CASE("gates: a factor of the noise that is none is refused",
                        "[gate][laws][noise]", test::GateLawsInDouble) {
  const auto gate = make_gate<TestType>();
  typename TestType::Tape tape;
  CHECK_THROWS_WITH(
      gate.forward(random_rows<TestType>(), tape, {.step = 3, .noise_factor = -0.5}),
      std::string("moe: ") + TestType::name + ": Pass.noise_factor = -0.5, must be from 0 to 1");
  for (const double factor : {std::nan(""), std::numeric_limits<double>::infinity(), 1.5}) {
    CHECK_THROWS_AS(
        gate.forward(random_rows<TestType>(), tape, {.step = 3, .noise_factor = factor}),
        std::invalid_argument);
  }
  CHECK_FALSE(tape.trained);
}

TEMPLATE_TEST_CASE("gates: jitter and second choices take the numbers that are given",
                   "[gate][laws][noise]", float, double) {
  using Law = test::JitterLaw<TestType>;
  const auto gate = make_gate<Law>();
  const Index columns = gate.noise_columns();
  REQUIRE(columns == 6);  // of the five entries of x, and the second choice
  const Matrix<TestType> x = random_rows<Law>();
  const auto pass = [&](double jitter, double second, double factor = 1) {
    Matrix<double> noise = Matrix<double>::Constant(12, columns, jitter);
    noise.col(5).setConstant(second);
    typename Law::Tape tape;
    gate.forward(x, tape,
                 {.step = 0,
                  .noise = {noise.data(), static_cast<std::size_t>(noise.size())},
                  .noise_factor = factor});
    return tape;
  };
  // No jitter, and every second choice kept.
  const auto none = pass(0, 0);
  CHECK(same_bits(none.jittered, x));
  typename Law::Tape served;
  gate.evaluate(x, served);
  CHECK(same_routing(none.routing, served.routing));
  // 1 + 0.2·u.
  const auto half = pass(0.5, 0);
  CHECK(test::relative_error(half.jittered, Matrix<TestType>(x * TestType(1.1))) < 1e-6);
  CHECK(same_bits(pass(1, 0, 0.5).jittered, half.jittered));
  CHECK(same_bits(pass(1, 0, 0).jittered, x));
  CHECK(same_bits(pass(std::nan(""), 0, 0).jittered, x));  // which is not read
  // The number that decides about the second choice is none to be made smaller.
  CHECK(same_routing(pass(1, 0.6, 0.5).routing, pass(0.5, 0.6).routing));
  const auto least = pass(-1, 0);
  CHECK(test::relative_error(least.jittered, Matrix<TestType>(x * TestType(0.8))) < 1e-6);
  // Kept if the number is below twice the weight, which is at most 1/2.
  for (const double second : {0.3, 0.6, 0.999}) {
    const auto tape = pass(0, second);
    Index kept = 0;
    for (Index t = 0; t < 12; ++t) {
      CHECK(tape.choices.keeps[2 * t] == 1);
      const bool keeps = second < 2 * static_cast<double>(tape.choices.weight[2 * t + 1]);
      CHECK(tape.choices.keeps[2 * t + 1] == (keeps ? 1 : 0));
      kept += keeps ? 1 : 0;
    }
    CHECK(kept < 12);
    CHECK(tape.routing.slots() == 12 + kept);
  }
}
