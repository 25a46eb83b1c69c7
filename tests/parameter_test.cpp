#include "moe/parameter.hpp"

#include <array>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "catch.hpp"
#include "moe/optim/gradient_clipping.hpp"

using namespace moe;

namespace {

struct Affine {
  Parameter<float> weight{2, 3};
  Parameter<float> bias{1, 3};

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
    visit("bias", self.bias);
  }
};

struct State {
  Parameter<double> weight{2, 2};
  Parameter<double> counts{1, 3};
  State() { counts.trained = false; }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
    visit("counts", self.counts);
  }
};

struct Block {
  Affine up;
  Parameter<double> scale{1, 5};
  std::vector<Parameter<float>> extra{2};
  Affine down;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("up", self.up);
    visit("scale", self.scale);
    visit("extra", self.extra);
    visit("down", self.down);
  }
};

struct Model {
  std::vector<std::vector<Affine>> heads{1};
  std::vector<Block> blocks;
  Parameter<float> output{4, 1};

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("heads", self.heads);
    visit("blocks", self.blocks);
    visit("output", self.output);
  }
};

Model make_model(std::size_t blocks) {
  Model model;
  model.heads[0].resize(1);
  model.blocks.resize(blocks);
  return model;
}

/// A parameter that is not tracked, one that is tracked and never added to, and one that is sometimes
/// added to.
template <class Scalar>
struct Kinds {
  Kinds() {
    detail::track_gradients(idle);
    detail::track_gradients(busy);
  }
  void write_by_hand() {
    for_each_parameter(*this, [](const ParameterName&, auto& p) { p.gradient().setOnes(); });
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("untracked", self.untracked);
    visit("idle", self.idle);
    visit("busy", self.busy);
  }

  Parameter<Scalar> untracked{2, 3};
  Parameter<Scalar> idle{2, 3};
  Parameter<Scalar> busy{2, 3};
};

template <class Module>
std::vector<std::string> names_of(Module& module) {
  std::vector<std::string> names;
  for_each_parameter(module, [&](const std::string& name, auto&) { names.push_back(name); });
  return names;
}

}  // namespace

TEST_CASE("parameter: starts at zero, the gradient in the value's shape", "[parameter]") {
  const Parameter<double> parameter(3, 4);
  CHECK(parameter.size() == 12);
  CHECK(parameter.value == Matrix<double>::Zero(3, 4));
  CHECK(parameter.gradient() == Matrix<double>::Zero(3, 4));
  CHECK(Parameter<float>().size() == 0);
}

TEST_CASE("parameter: names are dotted, numbered in vectors, in the order of the members",
          "[parameter]") {
  const std::vector<std::string> expected = {"heads.0.0.weight",
                                             "heads.0.0.bias",
                                             "blocks.0.up.weight",
                                             "blocks.0.up.bias",
                                             "blocks.0.scale",
                                             "blocks.0.extra.0",
                                             "blocks.0.extra.1",
                                             "blocks.0.down.weight",
                                             "blocks.0.down.bias",
                                             "blocks.1.up.weight",
                                             "blocks.1.up.bias",
                                             "blocks.1.scale",
                                             "blocks.1.extra.0",
                                             "blocks.1.extra.1",
                                             "blocks.1.down.weight",
                                             "blocks.1.down.bias",
                                             "output"};
  Model model = make_model(2);
  CHECK(names_of(model) == expected);
  CHECK(names_of(model) == expected);
  CHECK(names_of(std::as_const(model)) == expected);
}

TEST_CASE("parameter: a vector counts past nine and may be empty", "[parameter]") {
  std::vector<Parameter<float>> many(12);
  const auto names = names_of(many);
  REQUIRE(names.size() == 12);
  CHECK(names[0] == "0");
  CHECK(names[9] == "9");
  CHECK(names[11] == "11");
  CHECK(names_of(std::as_const(many)) == names);
  std::vector<Affine> none;
  CHECK(names_of(none).empty());
}

TEST_CASE("parameter: a parameter by itself has no name", "[parameter]") {
  Parameter<float> parameter(1, 1);
  CHECK(names_of(parameter) == std::vector<std::string>{""});
}

TEST_CASE("parameter: the walk hands out the members themselves", "[parameter]") {
  Model model = make_model(1);
  for_each_parameter(model, [](const ParameterName& name, auto& parameter) {
    parameter.value.setConstant(name.string() == "blocks.0.down.bias" ? 2 : 1);
  });
  CHECK(model.blocks[0].down.bias.value == Matrix<float>::Constant(1, 3, 2));
  CHECK(model.blocks[0].down.weight.value == Matrix<float>::Constant(2, 3, 1));
  CHECK(model.output.value == Matrix<float>::Constant(4, 1, 1));
}

TEST_CASE("parameter: parameters of a const module are const", "[parameter]") {
  Model model = make_model(1);
  for_each_parameter(model, [](const ParameterName&, auto& parameter) {
    STATIC_REQUIRE(!std::is_const_v<std::remove_reference_t<decltype(parameter)>>);
  });
  Index visited = 0;
  for_each_parameter(std::as_const(model), [&](const ParameterName&, auto& parameter) {
    STATIC_REQUIRE(std::is_const_v<std::remove_reference_t<decltype(parameter)>>);
    ++visited;
  });
  CHECK(visited == 10);
}

TEST_CASE("parameter: count is that of the scalars", "[parameter]") {
  CHECK(parameter_count(Affine{}) == 6 + 3);
  Model model = make_model(3);
  CHECK(parameter_count(model) == 9 + 3 * (9 + 5 + 9) + 4);
  model.blocks[1].extra[0] = Parameter<float>(7, 2);
  CHECK(parameter_count(model) == 9 + 3 * (9 + 5 + 9) + 4 + 14);
}

TEST_CASE("parameter: zero_gradients clears every gradient and no value", "[parameter]") {
  Model model = make_model(2);
  for_each_parameter(model, [](const ParameterName&, auto& parameter) {
    parameter.value.setConstant(3);
    parameter.gradient().setConstant(4);
  });
  zero_gradients(model);
  Index visited = 0;
  for_each_parameter(model, [&](const ParameterName&, auto& parameter) {
    CHECK((parameter.gradient().array() == 0).all());
    CHECK((parameter.value.array() == 3).all());
    ++visited;
  });
  CHECK(visited == 17);
}

TEMPLATE_TEST_CASE("parameter: lazy zeroing passes by what is known to be zero",
                   "[parameter][lazy]", float, double) {
  Kinds<TestType> kinds;
  const auto are_zero = [&] {  // once they are shown
    std::array<bool, 3> zero{};
    std::size_t i = 0;
    for_each_parameter(kinds,
                       [&](const ParameterName&, auto& p) { zero[i++] = p.gradient().isZero(0); });
    return zero;
  };
  kinds.write_by_hand();
  detail::accumulate(kinds.busy);
  zero_gradients(kinds, Updates::lazy);
  CHECK_FALSE(kinds.busy.stored.memory.isZero(0));  // it was left alone
  CHECK(Matrix<TestType>(std::as_const(kinds.busy).gradient()).isZero(0));
  CHECK(are_zero() == std::array{true, false, true});
  CHECK(kinds.busy.gradient().isZero(0));

  // busy is now known to be zero, and untracked is not whatever became of it.
  detail::accumulate(kinds.untracked);
  zero_gradients(kinds, Updates::lazy);
  kinds.write_by_hand();
  zero_gradients(kinds, Updates::lazy);
  CHECK(are_zero() == std::array{true, false, false});

  // Dense zeroing relies on nothing, and what it zeroed is known to be zero too.
  zero_gradients(kinds);
  CHECK(are_zero() == std::array{true, true, true});
  detail::accumulate(kinds.busy);
  zero_gradients(kinds);
  kinds.write_by_hand();
  zero_gradients(kinds, Updates::lazy);
  CHECK(are_zero() == std::array{true, false, false});
}

TEST_CASE("parameter: whoever adds to a stale gradient writes over it", "[parameter][lazy]") {
  using detail::GradientState;
  std::vector<Parameter<float>> module(2, Parameter<float>(2, 2));
  detail::track_gradients(module);
  const auto states = [&] { return std::pair{module[0].stored.state, module[1].stored.state}; };
  const auto clear = [&] {
    for (Parameter<float>& p : module) p.gradient().setOnes();
    detail::accumulate(module);
    zero_gradients(module, Updates::lazy);
  };

  // A gradient without memory has nothing to be added to; zeros that are there have.
  CHECK(detail::accumulate(module, true));
  for (Parameter<float>& p : module) p.gradient().setZero();
  zero_gradients(module);
  CHECK_FALSE(detail::accumulate(module, true));
  clear();
  CHECK(states() == std::pair{GradientState::stale, GradientState::stale});
  CHECK(detail::accumulate(module, true));
  CHECK(module[0].gradient().isOnes(0));
  CHECK(states() == std::pair{GradientState::added_to, GradientState::added_to});
  CHECK_FALSE(detail::accumulate(module, true));  // only the first time

  // Who can only add finds zeros.
  clear();
  CHECK_FALSE(detail::accumulate(module));
  CHECK(module[0].gradient().isZero(0));
  CHECK(module[1].gradient().isZero(0));

  // The same if a pass adds to all and only some are stale.
  clear();
  detail::accumulate(module[1]);
  module[1].gradient().setConstant(3);
  CHECK_FALSE(detail::accumulate(module, true));
  CHECK(module[0].gradient().isZero(0));
  CHECK(module[1].gradient().isConstant(3, 0));

  // Clearing twice, or densely after lazily, is clearing.
  clear();
  zero_gradients(module, Updates::lazy);
  CHECK(states() == std::pair{GradientState::stale, GradientState::stale});
  zero_gradients(module);
  CHECK(module[0].gradient().isZero(0));
  CHECK(states() == std::pair{GradientState::zero, GradientState::stale});  // until it is shown
  CHECK(module[1].gradient().isZero(0));
  CHECK(states() == std::pair{GradientState::zero, GradientState::zero});
}

TEST_CASE("parameter: accumulate says where to add and what the memory holds",
          "[parameter][lazy]") {
  using Holds = Accumulation<double>::Holds;
  for (const bool tracked : {false, true}) {
    INFO("tracked " << tracked);
    Parameter<double> p(2, 3);
    if (tracked) detail::track_gradients(p);
    {
      const auto [memory, holds] = p.accumulate();
      CHECK(holds == Holds::stale);  // memory that was just taken
      CHECK(&memory == &p.stored.memory);
      REQUIRE(memory.size() == 6);
      memory.setOnes();
    }
    CHECK(p.accumulate().holds == Holds::sum);
    CHECK(std::as_const(p).gradient().isOnes(0));

    zero_gradients(p);
    CHECK(p.accumulate().holds == (tracked ? Holds::zero : Holds::sum));  // a sum of nothing
    CHECK(p.gradient().isZero(0));

    p.gradient().setOnes();
    zero_gradients(p, Updates::lazy);
    CHECK(std::as_const(p).gradient().isZero(0));
    const auto [memory, holds] = p.accumulate();
    CHECK(holds == (tracked ? Holds::stale : Holds::sum));
    CHECK(memory.isConstant(tracked ? 1 : 0, 0));
    CHECK_FALSE(detail::is_idle(p, Updates::lazy));
  }
}

TEST_CASE("parameter: a gradient that was moved out goes on from zero in the memory given",
          "[parameter][lazy]") {
  using Holds = Accumulation<double>::Holds;
  for (const bool tracked : {false, true}) {
    INFO("tracked " << tracked);
    Parameter<double> p(2, 3);
    if (tracked) detail::track_gradients(p);
    p.accumulate().memory.setOnes();
    Matrix<double> out = std::move(p.gradient());
    CHECK(out.isOnes(0));
    CHECK(p.gradient().isZero(0));  // shown, so that it counts as zero below

    const double* const place = out.data();
    p.zero_gradient_in(std::move(out));
    CHECK(std::as_const(p).gradient().isZero(0));
    CHECK(p.stored.memory.data() == place);
    const auto [memory, holds] = p.accumulate();
    CHECK(memory.data() == place);
    CHECK(holds == (tracked ? Holds::stale : Holds::sum));  // a sum of nothing

    memory.setOnes();
    p.zero_gradient_in({});
    CHECK(std::as_const(p).gradient().isZero(0));
    CHECK(p.stored.memory.size() == 0);
    CHECK(p.accumulate().holds == Holds::stale);

    p.gradient().setOnes();
    CHECK_THROWS_WITH(p.zero_gradient_in(Matrix<double>(3, 2)),
                      "moe: Parameter::zero_gradient_in: memory is 3 x 2, must be 2 x 3 or empty");
    CHECK_THROWS_WITH(p.zero_gradient_in(Matrix<double>(2, 4)),
                      "moe: Parameter::zero_gradient_in: memory is 2 x 4, must be 2 x 3 or empty");
    CHECK_THROWS_WITH(p.zero_gradient_in(Matrix<double>(4, 3)),
                      "moe: Parameter::zero_gradient_in: memory is 4 x 3, must be 2 x 3 or empty");
    CHECK(p.gradient().isOnes(0));
  }
}

TEST_CASE("parameter: nobody keeps track unless told", "[parameter][lazy]") {
  Model model = make_model(1);
  for_each_parameter(model, [](const ParameterName&, auto& p) { p.gradient().setOnes(); });
  zero_gradients(model, Updates::lazy);
  for_each_parameter(model, [](const ParameterName&, auto& p) { CHECK(p.gradient().isZero(0)); });

  // A parameter that was assigned is not tracked, so its gradient always counts as added to.
  Parameter<float> parameter(2, 2);
  detail::track_gradients(parameter);
  parameter = Parameter<float>(2, 2);
  parameter.gradient().setOnes();
  zero_gradients(parameter, Updates::lazy);
  CHECK(parameter.gradient().isZero(0));
}

TEST_CASE("parameter: a name that is not asked for takes no memory", "[parameter]") {
  // A type that is trivial to copy and to destroy owns no memory, and the visitor gets this type.
  STATIC_REQUIRE(std::is_trivially_copyable_v<ParameterName>);
  STATIC_REQUIRE(std::is_trivially_destructible_v<ParameterName>);
  Model model = make_model(1);
  for_each_parameter(model, [](auto&& name, auto&) {
    STATIC_REQUIRE(std::is_same_v<decltype(name), const ParameterName&>);
  });
}

TEST_CASE("parameter: one that is not trained is named, and passed by by all that moves weights",
          "[parameter]") {
  State state;
  std::vector<std::string> names;
  for_each_parameter(state, [&](const std::string& name, auto&) { names.push_back(name); });
  CHECK(names == std::vector<std::string>{"weight", "counts"});
  CHECK(parameter_count(state) == 4);
  for (const Updates updates : {Updates::dense, Updates::lazy}) {
    CHECK_FALSE(detail::is_idle(state.weight, updates));
    CHECK(detail::is_idle(state.counts, updates));
    state.counts.gradient().setConstant(3);  // whatever it holds stands for nothing
    CHECK(gradient_norm(state, updates) == 0);
    zero_gradients(state, updates);  // which releases its memory
    CHECK(state.counts.stored.memory.size() == 0);
  }
}
