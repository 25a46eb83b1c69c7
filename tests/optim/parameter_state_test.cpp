#include "moe/optim/parameter_state.hpp"

#include "../support.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;

TEST_CASE("parameter state: zeros of each shape, kept after the first call",
          "[optim][parameter_state]") {
  const Linear<float> module({.inputs = 3, .outputs = 2}, 0);
  detail::ParameterState<float> state;
  state.match(module, "Test");
  CHECK(state[0].rows() == 3);
  CHECK(state[0].cols() == 2);
  CHECK(state[1].cols() == 2);
  CHECK(state[0].isZero(0));
  state[0](1, 1) = 5;
  state.match(module, "Test");
  CHECK(state[0](1, 1) == 5);
}

TEST_CASE("parameter state: of what is not trained it has no matrix, until it is",
          "[optim][parameter_state]") {
  Linear<float> module({.inputs = 3, .outputs = 2}, 0);
  module.weight.trained = false;
  detail::ParameterState<float> state(detail::StatePart::rows_by_one);
  state.match(module, "Test");
  CHECK_FALSE(state.remembers(0));
  CHECK(state.remembers(1));
  state[1].setConstant(5);
  module.weight.trained = true;
  module.bias.trained = false;
  state.match(module, "Test");
  CHECK(state[0].rows() == 3);
  CHECK(state[0].cols() == 1);
  CHECK(state[0].isZero(0));
  CHECK(state[1](0, 0) == 5);
}

TEST_CASE("parameter state: another shape is named", "[optim][parameter_state]") {
  detail::ParameterState<float> state;
  state.match(Linear<float>({.inputs = 3, .outputs = 2, .bias = false}, 0), "Test");
  CHECK_THROWS_WITH(
      state.match(Linear<float>({.inputs = 2, .outputs = 3, .bias = false}, 0), "Test"),
      "moe: Test: weight is 2 x 3, was 3 x 2 at the first update");
}

TEST_CASE("parameter state: more parameters than before are named too",
          "[optim][parameter_state]") {
  detail::ParameterState<float> state;
  state.match(Linear<float>({.inputs = 3, .outputs = 2, .bias = false}, 0), "Test");
  CHECK_THROWS_WITH(state.match(Linear<float>({.inputs = 3, .outputs = 2}, 0), "Test"),
                    "moe: Test: the module has 2 parameters, had 1 at the first update");
}
