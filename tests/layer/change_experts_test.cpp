#include "change_experts.hpp"

#include <cmath>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "moe/config_fields.hpp"

using namespace moe;
using namespace moe::test;
using namespace moe::test::change;

namespace {

/// What a parameter's columns belong to: units and their sources, or nothing that changes.
template <class Law>
void check_gate(const Values& before, const Values& after, const Sources& units) {
  for (const auto& [name, value] : after) {
    if (!name.starts_with("gate.")) continue;
    INFO(name);
    const auto at = name.find("secondary.");
    if (at != std::string::npos) {
      const auto number = name.substr(at + 10, name.find('.', at + 10) - at - 10);
      const Index source = units[detail::to_size(std::stol(number))];
      if (source == fresh_source) {
        CHECK(value.isZero(0));
      } else {
        std::string old = name;
        old.replace(at + 10, number.size(), std::to_string(source));
        CHECK(same_bits(value, before.at(old)));
      }
    } else if (name == "gate.shared_weight" || name.starts_with("gate.columns.")) {
      CHECK(same_bits(value, before.at(name)));
    } else {
      REQUIRE(value.cols() == static_cast<Index>(units.size()));
      for (Index e = 0; e < value.cols(); ++e) {
        const Index source = units[detail::to_size(e)];
        if (source != fresh_source) CHECK(same_bits(value.col(e), before.at(name).col(source)));
      }
    }
  }
}

/// Everything of a layer after a change, `units` being where its units come from.
template <class Law, class Layer>
void check_change(const Values& before, Layer& layer, const ExpertChange& change,
                  const Sources& units) {
  Sources sources;
  for (Index e = 0; e < Law::shared; ++e) sources.push_back(e);
  for (const Index u : units) {
    for (Index i = 0; i < Law::unit; ++i) {
      sources.push_back(u == fresh_source ? u : Law::shared + u * Law::unit + i);
    }
  }
  CHECK(change.sources == sources);
  const auto experts = static_cast<Index>(sources.size());
  CHECK(layer.gate().experts() == experts);
  REQUIRE(layer.experts().size() == sources.size());
  const Values after = values_of(layer);
  check_gate<Law>(before, after, units);
  for (Index e = 0; e < experts; ++e) {
    const Index source = sources[detail::to_size(e)];
    for (const char* part : {"up.weight", "up.bias", "down.weight", "down.bias"}) {
      const auto name = [&](Index i) { return "experts." + std::to_string(i) + '.' + part; };
      INFO(name(e));
      REQUIRE(after.contains(name(e)));
      if (source != fresh_source) CHECK(same_bits(after.at(name(e)), before.at(name(source))));
    }
  }
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(p.gradient().rows() == p.value.rows());
    CHECK(p.gradient().cols() == p.value.cols());
    CHECK(p.gradient().isZero(0));
  });

  // It is the layer that would have been made with these experts.
  auto config = layer.config();
  config.gate = Law::config(experts);
  const auto fields = [](const auto& of) {
    std::vector<std::int64_t> bits;
    detail::for_each_field(of, [&](const ParameterName&, const auto& field) {
      bits.push_back(detail::field_bits(field));
    });
    return bits;
  };
  Layer made(config);
  CHECK(fields(layer.config()) == fields(made.config()));
  for_each_parameter(made, [&](const std::string& name, auto& p) { p.value = after.at(name); });
  const auto x = random_matrix(12, width, 8);
  const auto dy = random_matrix(12, width, 9);
  typename Layer::Tape tape;
  typename Layer::Tape expected;
  CHECK(same_bits(layer.evaluate(x, tape), made.evaluate(x, expected)));
  CHECK(same_bits(layer.forward(x, tape, {.step = 5}), made.forward(x, expected, {.step = 5})));
  CHECK(same_bits(layer.backward(dy, tape), made.backward(dy, expected)));
  CHECK(test::gradients_of(layer) == test::gradients_of(made));
}

}  // namespace

TEMPLATE_LIST_TEST_CASE("experts come and go: what stays keeps its bits, whatever the gate",
                        "[layer][change]", Laws) {
  using Law = TestType;
  auto layer = make_layer<Law>(4);
  using Layer = decltype(layer);
  typename Layer::Tape tape;
  const auto train = [&] {  // leaves gradients
    const auto x = random_matrix(12, width, 1);
    layer.forward(x, tape, {.step = 1});
    layer.backward(x, tape);
  };
  train();
  Values before = values_of(layer);
  check_change<Law>(before, layer, layer.remove_experts(experts_of<Law>({1})), {0, 2, 3});
  train();
  before = values_of(layer);
  check_change<Law>(before, layer, layer.copy_experts(experts_of<Law>({2, 0}), {.seed = 1}),
                    {0, 1, 2, 2, 0});
  train();
  before = values_of(layer);
  check_change<Law>(before, layer, layer.add_experts(2 * Law::unit, 11),
                    {0, 1, 2, 3, 4, fresh_source, fresh_source});
  before = values_of(layer);
  check_change<Law>(before, layer, layer.remove_experts(experts_of<Law>({6, 0, 3})), {1, 2, 4, 5});
}

TEST_CASE(
    "experts come and go: tokens that did not choose a removed expert keep y, to the last bit",
    "[layer][change]") {
  const auto check = [](auto layer) {
    const auto x = random_matrix(40, width, 8);
    typename decltype(layer)::Tape tape;
    const Matrix<double> before = layer.evaluate(x, tape);
    std::vector<Index> same;
    std::set<Index> chosen;
    for (Index t = 0; t < 40; ++t) {
      const Range slots = tape.routing().slots_of_token(t);
      bool touched = false;
      for (Index s = slots.first; s < slots.first + slots.count; ++s) {
        const Index e = tape.routing().expert[s];
        touched = touched || e == 1 || e == 6;
      }
      if (!touched) same.push_back(t);
    }
    REQUIRE(same.size() > 5);
    REQUIRE(same.size() < 35);
    layer.remove_experts({6, 1});
    const Matrix<double>& after = layer.evaluate(x, tape);
    for (const Index t : same) CHECK(same_bits(after.row(t), before.row(t)));
  };
  check(make_layer<NoisyLaw>(9));
  LayerOf<TopK> layer({.width = width,
                       .expert = {.hidden = 3},
                       .gate = {.experts = 9, .top_k = 3, .score = Score::softmax_of_chosen},
                       .seed = 3});
  test::randomize(layer, 5, 0.5);
  check(std::move(layer));
}

TEST_CASE("experts come and go: fresh ones that nobody chooses change no bit of y",
          "[layer][change]") {
  auto layer = make_layer<NoisyLaw>(4);
  auto x = random_matrix(30, width, 8);
  x.col(0).setOnes();
  const Matrix<double> before = layer.evaluate(x);
  layer.add_experts(3, 7);
  for_each_parameter(layer, [](const std::string& name, auto& p) {
    if (name == "gate.weight") p.value.row(0).tail(3).setConstant(-1e3);
  });
  CHECK(same_bits(layer.evaluate(x), before));
  // They are drawn by the seed, and differ from each other.
  auto values = values_of(layer);
  CHECK(!same_bits(values["experts.4.up.weight"], values["experts.5.up.weight"]));
  auto twin = make_layer<NoisyLaw>(4);
  twin.add_experts(3, 7);
  auto other = make_layer<NoisyLaw>(4);
  other.add_experts(3, 8);
  CHECK(same_bits(values["experts.6.up.weight"], values_of(twin)["experts.6.up.weight"]));
  CHECK(!same_bits(values["experts.6.up.weight"], values_of(other)["experts.6.up.weight"]));
}

TEST_CASE(
    "experts come and go: the network of a copy gives the same, of a noisy one about the same",
    "[layer][change]") {
  LayerOf<Noisy> layer(
      {.width = 64, .expert = {.hidden = 50}, .gate = {.experts = 1, .top_k = 1}, .seed = 3});
  test::randomize(layer, 4, 0.5);
  const auto x = random_matrix(30, 64, 8);
  const Matrix<double> before = layer.evaluate(x);
  layer.copy_experts({0}, {.seed = 1});
  CHECK(same_bits(layer.evaluate(x), before));  // whichever is chosen, with weight 1
  const Values exact = values_of(layer);
  layer.copy_experts({1}, {.noise_stddev = 0.25, .seed = 9});
  auto noisy = values_of(layer);
  for (const char* part : {"up.weight", "down.weight"}) {
    const auto of = [&](const Values& values, const char* e) {
      return values.at(std::string("experts.") + e + '.' + part);
    };
    CHECK(same_bits(of(noisy, "1"), of(exact, "1")));
    const Matrix<double> noise = of(noisy, "2") - of(noisy, "1");
    CHECK(std::abs(std::sqrt(noise.squaredNorm() / static_cast<double>(noise.size())) - 0.25) <
          0.02);
  }
  const Matrix<double>& gate = noisy["gate.weight"];
  CHECK(same_bits(gate.leftCols(2), exact.at("gate.weight")));
  const double noise = (gate.col(2) - gate.col(1)).norm() / 8;
  CHECK(noise > 0.15);
  CHECK(noise < 0.35);
}

TEST_CASE("experts come and go: fresh columns are as a gate starts with", "[layer][change]") {
  const auto fresh_of = [](auto layer, const char* name) -> Matrix<double> {
    layer.add_experts(40, 7);
    return values_of(layer).at(std::string("gate.") + name).rightCols(40);
  };
  CHECK(fresh_of(make_layer<NoisyLaw>(4), "weight").isZero(0));
  CHECK(fresh_of(make_layer<NoisyLaw>(4), "noise_weight").isZero(0));
  CHECK(fresh_of(make_layer<change::TopKLaw>(4), "bias").isZero(0));
  CHECK(fresh_of(make_layer<change::TopKLaw>(4), "selection_bias").isZero(0));
  const Matrix<double> normal = fresh_of(make_layer<change::TopKLaw>(4), "weight");
  CHECK(std::abs(normal.norm() / std::sqrt(5.0 * 40) - 0.02) < 0.003);
  CHECK((fresh_of(make_layer<change::BalancedLaw>(4), "threshold").array() == 1.0 / 44).all());
  for (const Matrix<double>& uniform :
       {fresh_of(make_layer<change::BalancedLaw>(4), "weight"),
        fresh_of(make_layer<change::ExpertChoiceLaw>(4), "weight")}) {
    CHECK(uniform.cwiseAbs().maxCoeff() <= 1 / std::sqrt(5.0));
    CHECK(std::abs(uniform.norm() / std::sqrt(5.0 * 40) - 1 / std::sqrt(15.0)) < 0.03);
    CHECK(!same_bits(uniform.col(0), uniform.col(1)));
  }
}

TEST_CASE("experts come and go: frozen parts stay frozen", "[layer][change]") {
  auto layer = make_layer<NoisyLaw>(4);
  for_each_parameter(layer, [](const std::string& name, auto& p) {
    if (name == "gate.weight" || name.starts_with("experts.2.")) p.trained = false;
  });
  layer.remove_experts({0});
  layer.copy_experts({1}, {.seed = 1});
  layer.add_experts(1, 2);
  for_each_parameter(layer, [](const std::string& name, auto& p) {
    INFO(name);
    const bool frozen =
        name == "gate.weight" || name.starts_with("experts.1.") || name.starts_with("experts.3.");
    CHECK(p.trained == !frozen);
  });
}

TEST_CASE("experts come and go: an expert that was replaced is part of the layer",
          "[layer][change]") {
  auto layer = make_layer<NoisyLaw>(4);
  layer.remove_experts({3});
  layer.replace_expert(1, Expert<FeedForward, double>({.width = width, .hidden = 7}, 5));
  std::set<std::uint64_t> structures;
  for_each_parameter(layer, [&](const std::string&, auto& p) { structures.insert(p.structure); });
  CHECK(structures.size() == 1);
}
