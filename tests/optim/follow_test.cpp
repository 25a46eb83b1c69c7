#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "laws.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"

using namespace moe;
using test::random_matrix;
using test::same_bits;
using Sources = std::vector<Index>;

namespace {

constexpr Index width = 6;

/// A layer between two others.
template <class Gate>
struct Model {
  using Scalar = typename Gate::Scalar;
  using Layer = MoELayer<Expert<FeedForward, Scalar>, Gate>;

  explicit Model(const typename Gate::Config& gate)
      : before({.inputs = width, .outputs = width}, 1),
        layer({.width = width, .expert = {.hidden = 9}, .gate = gate, .seed = 2}),
        after({.inputs = width, .outputs = width}, 3) {}

  /// Gradients as of an update; not all experts get tokens. They are drawn by the parameters' values
  /// through the layer, and for the others by the step.
  void backward(std::uint64_t step, Updates updates) {
    zero_gradients(*this, updates);
    const auto seed = step + 100;
    const auto x = random_matrix<Scalar>(4, width, seed);
    layer.forward(x, tape, {.step = step});
    layer.backward(random_matrix<Scalar>(4, width, seed + 50), tape);
    for (auto* linear : {&before, &after}) {
      for_each_parameter(*linear, [&](const std::string& name, auto& p) {
        p.gradient() = random_matrix<Scalar>(p.value.rows(), p.value.cols(), seed + name.size());
      });
    }
  }

  template <class Optimizer>
  void train(Optimizer& optimizer, std::uint64_t first, int updates) {
    for (int i = 0; i < updates; ++i) {
      backward(first + static_cast<std::uint64_t>(i), optimizer.config().updates);
      optimizer.update(*this, 0.01);
    }
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("before", self.before);
    visit("layer", self.layer);
    visit("after", self.after);
  }

  Linear<Scalar> before;
  Layer layer;
  Linear<Scalar> after;
  typename Layer::Tape tape;
};

std::vector<std::string> names_of(const auto& module) {
  std::vector<std::string> names;
  for_each_parameter(module, [&](const std::string& name, const auto&) { names.push_back(name); });
  return names;
}

/// The name that a parameter had before a change, or nothing if it is new; `columns` becomes the sources of
/// its columns, or empty. For a flat gate, from the names alone.
std::string old_name(const std::string& name, const Sources& sources, Sources& columns) {
  columns.clear();
  if (name.starts_with("layer.gate.")) {
    columns = sources;
    return name;
  }
  const std::string start = "layer.experts.";
  if (!name.starts_with(start)) return name;
  const auto dot = name.find('.', start.size());
  const Index source = sources[detail::to_size(std::stol(name.substr(start.size(), dot)))];
  return source < 0 ? "" : start + std::to_string(source) + name.substr(dot);
}

/// Of a state's matrix, which may have one row or one column of its parameter, or be empty.
template <class Scalar>
Matrix<Scalar> with_columns(const Matrix<Scalar>& old, const Sources& columns, bool row_means) {
  if (old.size() == 0 || columns.empty() || row_means) return old;
  Matrix<Scalar> now = Matrix<Scalar>::Zero(old.rows(), static_cast<Index>(columns.size()));
  for (std::size_t e = 0; e < columns.size(); ++e) {
    if (columns[e] >= 0) now.col(static_cast<Index>(e)) = old.col(columns[e]);
  }
  return now;
}

/// Trains, changes the experts, follows, and compares with a model that was made with the new number of
/// experts and given parameters and states by hand, right away and after more training.
template <class Law, class Gate>
void check_follows(const typename Gate::Config& gate, Updates updates, auto&& change_layer) {
  using Scalar = typename Gate::Scalar;
  Model<Gate> model(gate);
  for_each_parameter(model.layer, [&](const std::string& name, auto& p) {
    if (p.trained) {
      p.value = random_matrix<Scalar>(p.value.rows(), p.value.cols(),
                                      std::hash<std::string>{}(name), 0.3);
    }
  });
  auto optimizer = Law::make({.weight_decay = 0.01, .updates = updates});
  model.train(optimizer, 1, 3);

  const std::vector<std::string> names_before = names_of(model);
  const test::SavedState<Scalar> before(optimizer, model);
  const ExpertChange change = change_layer(model.layer);
  if (Law::remembers) {
    CHECK_THROWS_WITH(optimizer.update(model, 0.01),
                      Catch::Matchers::Contains(std::string(Law::name) +
                                                ": layer.gate.weight"
                                                " is of a layer whose experts were changed"));
  }
  optimizer.follow(model, model.layer, change);

  Model<Gate> reference(model.layer.config().gate);
  std::map<std::string, Matrix<Scalar>> values;
  for_each_parameter(model, [&](const std::string& name, auto& p) { values[name] = p.value; });
  for_each_parameter(reference,
                     [&](const std::string& name, auto& p) { p.value = values.at(name); });
  auto by_hand = Law::make({.weight_decay = 0.01, .updates = updates});
  const std::vector<std::string> names = names_of(reference);
  by_hand.for_each_state(reference, [&](const std::string& key, auto&& state) {
    Sources columns;
    if constexpr (requires { state.rows(); }) {
      const auto dot = key.find('.');
      const std::string what = key.substr(0, dot);
      const std::string name = old_name(key.substr(dot + 1), change.sources, columns);
      if (name.empty()) return;
      state = with_columns(before.matrices.at(what + '.' + name), columns, what == "row_means");
    } else if (key == "steps") {
      state[0] = before.numbers.at(key)[0];
    } else {
      for (std::size_t i = 0; i < names.size(); ++i) {
        const std::string name = old_name(names[i], change.sources, columns);
        const auto at = std::ranges::find(names_before, name) - names_before.begin();
        state[i] = name.empty() ? 0 : before.numbers.at(key)[static_cast<std::size_t>(at)];
      }
    }
  });

  const auto compare = [&] {
    const test::SavedState<Scalar> actual(optimizer, model);
    const test::SavedState<Scalar> expected(by_hand, reference);
    REQUIRE(actual.matrices.size() == expected.matrices.size());
    for (const auto& [name, matrix] : expected.matrices) {
      INFO(name);
      CHECK(same_bits(actual.matrices.at(name), matrix));
    }
    CHECK(actual.numbers == expected.numbers);
    for_each_parameter(model, [&](const std::string& name, auto& p) { values[name] = p.value; });
    for_each_parameter(reference, [&](const std::string& name, auto& p) {
      INFO(name);
      CHECK(same_bits(p.value, values.at(name)));
    });
  };
  compare();
  model.train(optimizer, 10, 3);
  reference.train(by_hand, 10, 3);
  compare();

  // What is saved after the change loads, into an optimizer that knows of none.
  const test::SavedState<Scalar> saved(optimizer, model);
  auto loaded = Law::make({.weight_decay = 0.01, .updates = updates});
  saved.restore(loaded, model);
  model.train(loaded, 20, 1);
  reference.train(by_hand, 20, 1);
  for_each_parameter(model, [&](const std::string& name, auto& p) { values[name] = p.value; });
  for_each_parameter(reference, [&](const std::string& name, auto& p) {
    CHECK(same_bits(p.value, values.at(name)));
  });
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("follow: an optimizer goes on as if the layer had always had these experts",
                        "[optim][change]", test::Optimizers) {
  using Law = TestType;
  using Scalar = typename Law::Scalar;
  using Noisy = NoisyTopKGate<Scalar>;
  using TopK = TopKGate<Scalar>;
  for (const Updates updates : {Updates::dense, Updates::lazy}) {
    check_follows<Law, Noisy>({.experts = 5, .top_k = 2}, updates, [](auto& layer) {
      return layer.remove_experts({3, 1});
    });
    check_follows<Law, Noisy>({.experts = 4, .top_k = 2}, updates,
                              [](auto& layer) { return layer.add_experts(3, 9); });
    check_follows<Law, TopK>(
        {.experts = 4, .top_k = 2, .bias = true, .selection_bias = true}, updates, [](auto& layer) {
          return layer.copy_experts({2, 0, 2}, {.noise_stddev = 0.1, .seed = 9});
        });
  }
}

TEMPLATE_LIST_TEST_CASE("follow: groups of a hierarchical gate take their states with them",
                        "[optim][change]", test::Optimizers) {
  using Law = TestType;
  using Scalar = typename Law::Scalar;
  Model<HierarchicalGate<Scalar>> model(
      {.groups = 3, .group_experts = 2, .top_k_groups = 2, .top_k = 1});
  auto optimizer = Law::make();
  model.train(optimizer, 1, 3);
  const test::SavedState<Scalar> before(optimizer, model);
  optimizer.follow(model, model.layer, model.layer.remove_experts({0, 1}));
  optimizer.follow(model, model.layer, model.layer.copy_experts({2, 3}, {.seed = 4}));
  optimizer.follow(model, model.layer, model.layer.add_experts(2, 4));
  const test::SavedState<Scalar> after(optimizer, model);
  const Sources groups{1, 2, 2, -1};
  for (const auto& [name, matrix] : after.matrices) {
    INFO(name);
    const auto at = name.find("secondary.");
    if (at == std::string::npos) continue;
    const Index source = groups[detail::to_size(std::stol(name.substr(at + 10)))];
    std::string old = name;
    old.replace(at + 10, 1, std::to_string(source));
    if (source < 0) {
      CHECK(matrix.isZero(0));
    } else {
      CHECK(same_bits(matrix, before.matrices.at(old)));
    }
  }
  model.train(optimizer, 4, 2);
}

TEMPLATE_LIST_TEST_CASE(
    "follow: a change that is not the next one is refused, with nothing changed", "[optim][change]",
    test::Optimizers) {
  using Law = TestType;
  using Scalar = typename Law::Scalar;
  Model<NoisyTopKGate<Scalar>> model({.experts = 4, .top_k = 2});
  auto optimizer = Law::make();
  const auto refused = [&](const ExpertChange& change, const char* message) {
    CHECK_THROWS_WITH(optimizer.follow(model, model.layer, change),
                      Catch::Matchers::Contains(std::string(Law::name) + "::follow: ") &&
                          Catch::Matchers::Contains(message));
  };
  model.train(optimizer, 1, 2);
  const ExpertChange first = model.layer.add_experts(1, 1);
  const ExpertChange second = model.layer.remove_experts({0});
  refused(first, "gate.weight of the layer was not made by this change");
  if (Law::remembers) refused(second, "follow() was not called for a change before this one");
  if (!Law::remembers) return;
  // As many experts as before, of the same shapes, and none of its own.
  CHECK_THROWS_WITH(optimizer.update(model, 0.1),
                    Catch::Matchers::Contains(": layer.gate.weight is of a layer whose"));
  CHECK_THROWS_AS(test::SavedState<Scalar>(optimizer, model), std::invalid_argument);

  Model<NoisyTopKGate<Scalar>> other({.experts = 4, .top_k = 2});
  auto fresh = Law::make();
  other.train(fresh, 1, 2);
  const ExpertChange change = other.layer.remove_experts({1});
  CHECK_THROWS_WITH(fresh.follow(model, other.layer, change),
                    Catch::Matchers::Contains("the layer is not part of the model"));
  CHECK_THROWS_WITH(fresh.follow(other.layer, other.layer, change),
                    Catch::Matchers::Contains("parameters before the change"));
  fresh.follow(other, other.layer, change);
  CHECK_THROWS_AS(fresh.follow(other, other.layer, change), std::invalid_argument);
  other.train(fresh, 4, 1);
}

TEMPLATE_LIST_TEST_CASE("follow: before the first update there is nothing to follow with",
                        "[optim][change]", test::Optimizers) {
  using Law = TestType;
  Model<NoisyTopKGate<typename Law::Scalar>> model({.experts = 4, .top_k = 2});
  auto optimizer = Law::make();
  optimizer.follow(model, model.layer, model.layer.add_experts(2, 1));
  model.train(optimizer, 1, 2);
  CHECK(model.layer.config().gate.experts == 6);
}

TEMPLATE_LIST_TEST_CASE("follow: of copies of what was never trained nothing is remembered",
                        "[optim][change]", test::Optimizers) {
  using Law = TestType;
  using Scalar = typename Law::Scalar;
  Model<NoisyTopKGate<Scalar>> model({.experts = 4, .top_k = 2});
  const auto set_trained = [&](const std::string& start, bool trained) {
    for_each_parameter(model, [&](const std::string& name, auto& p) {
      if (name.starts_with(start)) p.trained = trained;
    });
  };
  auto optimizer = Law::make();
  set_trained("layer.experts.1.", false);
  set_trained("layer.gate.weight", false);
  model.train(optimizer, 1, 4);
  set_trained("layer.experts.2.", false);
  const test::SavedState<Scalar> before(optimizer, model);
  optimizer.follow(model, model.layer, model.layer.remove_experts({0}));
  optimizer.follow(model, model.layer, model.layer.copy_experts({0, 1}, {.seed = 4}));
  const test::SavedState<Scalar> after(optimizer, model);
  const Sources sources{1, 2, 3, 1, 2};
  const std::string experts = "layer.experts.";
  for (const auto& [name, matrix] : after.matrices) {
    INFO(name);
    if (name.ends_with("layer.gate.weight")) CHECK(matrix.size() == 0);
    const auto at = name.find(experts);
    if (at == std::string::npos) continue;
    const Index source = sources[detail::to_size(name[at + experts.size()] - '0')];
    std::string old = name;
    old.replace(at + experts.size(), 1, std::to_string(source));
    CHECK(same_bits(matrix, before.matrices.at(old)));
    CHECK((matrix.size() == 0) == (source == 1));
  }
  // Thawed before the change, it is new to the optimizer all the same.
  set_trained("layer.experts.3.", true);
  set_trained("layer.gate.weight", true);
  optimizer.follow(model, model.layer, model.layer.remove_experts({1}));
  for (const auto& [name, matrix] : test::SavedState<Scalar>(optimizer, model).matrices) {
    INFO(name);
    if (name.find(experts + '2') == name.npos && !name.ends_with("layer.gate.weight")) continue;
    CHECK(matrix.size() > 0);
    CHECK(matrix.isZero(0));
  }
  model.train(optimizer, 5, 2);
}

TEST_CASE("follow: groups of parameters are resolved anew", "[optim][change]") {
  Model<NoisyTopKGate<double>> model({.experts = 4, .top_k = 2});
  Adam<double> adam({});
  adam.set_groups([](std::string_view name) -> ParameterGroup {
    return {.rate_factor = name.starts_with("layer.experts.2.") ? 0.0 : 1.0};
  });
  model.train(adam, 1, 2);
  adam.follow(model, model.layer, model.layer.remove_experts({0}));
  std::map<std::string, Matrix<double>> values;
  for_each_parameter(model, [&](const std::string& name, auto& p) { values[name] = p.value; });
  model.train(adam, 3, 2);
  for_each_parameter(model, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(same_bits(p.value, values.at(name)) == name.starts_with("layer.experts.2."));
  });
}
