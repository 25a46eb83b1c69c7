#include "law_runs.hpp"

// What every gate refuses, with which words.

using namespace moe;
using namespace moe::test;

namespace {

constexpr const char* no_forward = "::backward without a forward pass on this tape";

/// A configuration with one number that shapes a gate changed.
template <class Config>
Config with_another_expert(Config config) {
  if constexpr (requires { config.routed; }) {
    config.routed = with_another_expert(config.routed);
  } else if constexpr (requires { config.group_experts; }) {
    ++config.group_experts;
  } else if constexpr (requires { config.row_keys; }) {
    ++config.row_keys;
  } else {
    config.experts *= 2;  // which groups divide
  }
  return config;
}
template <class Config>
Config wider(Config config) {
  ++config.width;
  if constexpr (requires { config.routed; }) config.routed.width = config.width;
  return config;
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("gates: a tape without a forward pass is refused", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  const std::string message = std::string("moe: ") + TestType::name + no_forward;
  typename TestType::Tape tape;
  const auto refuse = [&] {
    CHECK_THROWS_WITH(gate.check_tape(tape), message);
    const std::vector<Scalar> dweight(tape.routing.weight.size(), Scalar(0.5));
    CHECK_THROWS_WITH(test::gate_dx(gate, x, dweight, tape), message);
    CHECK_THROWS_AS(test::gate_dx(gate, x, dweight, tape), std::invalid_argument);
    CHECK(has_zero_gradients(gate));
  };
  refuse();
  gate.evaluate(x, tape);
  refuse();
  gate.forward(x, tape, {.step = 0});
  CHECK_NOTHROW(gate.check_tape(tape));
  gate.evaluate(random_rows<TestType>(12, 3), tape);  // leaves what backward() would mix up
  refuse();
}

TEMPLATE_LIST_TEST_CASE("gates: a refused pass leaves the tape as good as it was", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> wide = test::random_matrix<Scalar>(12, 6, 2);
  const std::vector<std::uint8_t> wrong(11, 0);
  const std::vector<double> noise(1, 0.5);
  GateRun<TestType> expected(make_gate<TestType>(), x, random_dweight<TestType>(),
                             {.step = 3, .loss_scale = 0.5});
  auto gate = make_gate<TestType>();
  typename TestType::Tape tape;
  gate.forward(x, tape, {.step = 3, .loss_scale = 0.5});
  const auto check = [&](auto&& pass) {
    CHECK_THROWS_AS(pass(), std::invalid_argument);
    CHECK(same_routing(tape.routing, expected.tape.routing));
    CHECK(same_balance(tape.balance, expected.tape.balance));
    REQUIRE_NOTHROW(gate.check_tape(tape));
  };
  check([&] { gate.forward(wide, tape, {.step = 0}); });
  check([&] { gate.forward(x, tape, {.step = 0, .valid = wrong}); });
  check([&] { gate.forward(x, tape, {.step = 0, .loss_scale = -1}); });
  check([&] { gate.forward(x, tape, {.step = 0, .noise = noise}); });
  check([&] { gate.evaluate(wide, tape); });
  check([&] { gate.evaluate(x, tape, {.valid = wrong}); });
  const auto dweight = test::dweight_of(tape.routing, random_dweight<TestType>());
  CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), expected.dx));
  CHECK(same_bits(test::gradients_of(gate), test::gradients_of(expected.gate)));
}

TEMPLATE_LIST_TEST_CASE("gates: a bad input is refused and changes nothing", "[gate][laws]",
                        test::GateLaws) {
  using Scalar = typename TestType::Scalar;
  const std::string name = std::string("moe: ") + TestType::name;
  auto gate = make_gate<TestType>();
  const Matrix<Scalar> x = random_rows<TestType>();
  const Matrix<Scalar> wide = test::random_matrix<Scalar>(12, 6, 2);
  typename TestType::Tape tape;
  gate.forward(x, tape, {.step = 3});
  const typename TestType::Tape before = tape;
  const auto dweight = test::dweight_of(tape.routing, random_dweight<TestType>());
  CHECK_THROWS_AS(gate.forward(wide, tape, {.step = 0}), std::invalid_argument);
  CHECK_THROWS_WITH(gate.forward(wide, tape, {.step = 0}),
                    name + ": x has 6 columns, Config.width = 5");
  CHECK_THROWS_WITH(gate.evaluate(wide, tape), name + ": x has 6 columns, Config.width = 5");

  const std::string slots = std::to_string(dweight.size());
  for (const std::size_t size : {dweight.size() - 1, dweight.size() + 1}) {
    CHECK_THROWS_WITH(test::gate_dx(gate, x, std::vector<Scalar>(size), tape),
                      name + "::backward: dweight has " + std::to_string(size) + " entries for " +
                          slots + " slots");
  }
  CHECK_THROWS_WITH(test::gate_dx(gate, wide, dweight, tape),
                    name + "::backward: x is 12 x 6, in forward() it was 12 x 5");
  CHECK_THROWS_WITH(test::gate_dx(gate, x.topRows(11).eval(), dweight, tape),
                    name + "::backward: x is 11 x 5, in forward() it was 12 x 5");
  for (const auto& [rows, columns] : {std::pair{11, 5}, {12, 4}, {0, 0}}) {
    Matrix<Scalar> dx = Matrix<Scalar>::Zero(rows, columns);
    CHECK_THROWS_WITH(gate.backward(x, dweight, tape, dx),
                      name + "::backward: dx is " + std::to_string(rows) + " x " +
                          std::to_string(columns) + ", x is 12 x 5");
  }
  Matrix<Scalar> same = x;
  CHECK_THROWS_AS(gate.backward(same, dweight, tape, same), std::invalid_argument);
  CHECK(same_bits(same, x));
  CHECK(same_routing(tape.routing, before.routing));
  CHECK(same_balance(tape.balance, before.balance));
  CHECK(has_zero_gradients(gate));

  // The tape of another gate.
  auto more = typename TestType::Gate(with_another_expert(TestType::config()), 1);
  auto broad = typename TestType::Gate(wider(TestType::config()), 1);
  CHECK_THROWS_AS(test::gate_dx(more, x, dweight, tape), std::invalid_argument);
  CHECK_THROWS_WITH(
      test::gate_dx(more, x, dweight, tape),
      Catch::Matchers::StartsWith(name + "::backward: the tape is another gate's, of "));
  CHECK_THROWS_AS(more.check_tape(tape), std::invalid_argument);
  CHECK_THROWS_WITH(test::gate_dx(broad, x, dweight, tape),
                    name + "::backward: x is 12 x 5, in forward() it was 12 x 6");
  CHECK(has_zero_gradients(more));
  CHECK(has_zero_gradients(broad));

  GateRun<TestType> expected(gate, x, random_dweight<TestType>(), {.step = 3});
  CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), expected.dx));  // as good as before
}
