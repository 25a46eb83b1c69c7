#include "moe/gates/shared_expert_gate.hpp"

#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// A gate that drops: token t has t mod 3 slots, the experts t mod 2 and the next one, with the
/// weights x·W. Its balance loss is the sum of its weights.
template <class Scalar_>
struct Dropping {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
    int fault = 0;  ///< 1 to 4: a routing that contradicts itself
  };
  using Tape = GateTape<Scalar>;
  explicit Dropping(const Config& c, std::uint64_t seed) : config(c), W(c.width, 3) {
    fill_normal(W.value, Scalar{1}, seed);
  }
  Index experts() const { return 3; }
  void forward(const MatrixRef<Scalar>& x, Tape& tape, const Pass&) const {
    evaluate(x, tape);
    tape.trained = true;
  }
  void evaluate(const MatrixRef<Scalar>& x, Tape& tape, const EvaluationPass& = {}) const {
    Routing<Scalar>& routing = tape.routing;
    routing.experts = 3;
    routing.token_offsets.assign(1, 0);
    routing.expert.clear();
    routing.weight.clear();
    for (Index t = 0; t < x.rows(); ++t) {
      for (Index k = 0; k < t % 3; ++k) {
        routing.expert.push_back(t % 2 + k);
        Scalar sum{0};
        for (Index d = 0; d < x.cols(); ++d) sum += x(t, d) * W.value(d, t % 2 + k);
        routing.weight.push_back(sum);
      }
      routing.token_offsets.push_back(routing.slots());
    }
    detail::BatchSum sum(nullptr);
    detail::measure_balance(routing, routing.expert, sum, tape.balance);
    tape.balance.loss = tape.balance.importance.sum();
    if (config.fault == 1) routing.token_offsets.back() += 1;
    if (config.fault == 2) std::swap(routing.token_offsets[1], routing.token_offsets[3]);
    if (config.fault == 3) routing.weight.pop_back();
    if (config.fault == 4) routing.token_offsets.pop_back();
  }
  void backward(const MatrixRef<Scalar>& x, std::span<const Scalar> dweight, Tape& tape,
                Matrix<Scalar>& dx) {
    test::for_each_slot(tape.routing, [&](Index t, Index e, std::size_t s) {
      for (Index d = 0; d < x.cols(); ++d) {
        W.gradient()(d, e) += (dweight[s] + 1) * x(t, d);
        dx(t, d) += (dweight[s] + 1) * W.value(d, e);
      }
    });
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("W", self.W);
  }
  Config config;
  Parameter<Scalar> W;
};

template <class Scalar>
using Noisy = SharedExpertGate<NoisyTopKGate<Scalar>>;
template <class Scalar>
using Holed = SharedExpertGate<Dropping<Scalar>>;

static_assert(Gate<Dropping<float>>);
static_assert(Gate<Noisy<float>>);
static_assert(Gate<Noisy<double>>);
static_assert(Gate<Holed<double>>);
static_assert(Gate<SharedExpertGate<BalancedGate<float>>>);
static_assert(Gate<SharedExpertGate<Noisy<float>>>);

/// A layer's y must be the sum of the routed layer's and of the shared networks', w being the weight
/// of token t with shared expert i.
template <class RoutedGate, class Weight>
void check_sum(const typename SharedExpertGate<RoutedGate>::Config& gate, const Weight& w) {
  using Network = Expert<FeedForward, double>;
  using Layer = MoELayer<Network, SharedExpertGate<RoutedGate>>;
  const Matrix<double> x = random_matrix(23, 4, 1);
  Layer layer({.width = 4, .expert = {.hidden = 3}, .gate = gate, .seed = 5});
  test::randomize(layer, 1);
  auto routed_config = gate.routed;
  routed_config.width = 4;
  MoELayer<Network, RoutedGate> routed(
      {.width = 4, .expert = {.hidden = 3}, .gate = routed_config, .seed = 5});
  const test::Named values = test::values_of(layer);
  for_each_parameter(routed, [&](const std::string& name, Parameter<double>& p) {
    if (name.starts_with("gate.")) {
      p.value = values.at("gate.routed." + name.substr(5));
    } else {  // "experts.3.up.weight" has the values of "experts.5.up.weight" for 2 shared ones
      const std::size_t dot = name.find('.', 8);
      const Index e = std::stol(name.substr(8, dot - 8)) + gate.shared;
      p.value = values.at("experts." + std::to_string(e) + name.substr(dot));
    }
  });
  typename Layer::Tape tape;
  typename MoELayer<Network, RoutedGate>::Tape routed_tape;
  for (const bool training : {true, false}) {
    const Matrix<double> y =
        training ? layer.forward(x, tape, {.step = 3}) : layer.evaluate(x, tape);
    Matrix<double> expected =
        training ? routed.forward(x, routed_tape, {.step = 3}) : routed.evaluate(x, routed_tape);
    for (Index i = 0; i < gate.shared; ++i) {
      const std::string prefix = "experts." + std::to_string(i) + ".";
      Matrix<double> hidden = x * values.at(prefix + "up.weight");
      hidden.rowwise() += values.at(prefix + "up.bias").row(0);
      hidden = hidden.cwiseMax(0);
      Matrix<double> out = hidden * values.at(prefix + "down.weight");
      out.rowwise() += values.at(prefix + "down.bias").row(0);
      for (Index t = 0; t < x.rows(); ++t) {
        expected.row(t) += w(values, x.row(t), i) * out.row(t);
      }
    }
    CHECK(relative_error(y, expected) < 1e-13);
    CHECK(tape.balance().loss == routed_tape.balance().loss);
    CHECK(same_bits(tape.balance().load, routed_tape.balance().load));
    CHECK(same_bits(tape.balance().importance, routed_tape.balance().importance));
    CHECK(tape.balance().tokens_per_expert == routed_tape.balance().tokens_per_expert);
  }
}

const auto one = [](const test::Named&, const auto&, Index) { return 1.0; };
const auto gated = [](const test::Named& values, const auto& x, Index i) {
  const double score = x.row(0).dot(values.at("gate.shared_weight").col(i));
  return 1 / (1 + std::exp(-score));
};

const auto tied = [](const test::Named& values, const auto& x, Index) {
  return gated(values, x, 0);
};

}  // namespace

TEST_CASE("shared expert gate: a layer is the sum of the shared networks and the routed layer",
          "[routing][gate]") {
  for (const Index shared : {1, 3}) {
    check_sum<NoisyTopKGate<double>>({.shared = shared, .routed = {.experts = 5, .top_k = 2}}, one);
    check_sum<NoisyTopKGate<double>>(
        {.shared = shared, .gated = true, .routed = {.experts = 5, .top_k = 2}}, gated);
    check_sum<Dropping<double>>({.shared = shared}, one);
    check_sum<Dropping<double>>({.shared = shared, .gated = true}, gated);
    check_sum<Dropping<double>>({.shared = shared, .gated = true, .tied = true}, tied);
    check_sum<Dropping<double>>({.shared = shared, .scale = 0.25},
                                [](const test::Named&, const auto&, Index) { return 0.25; });
    check_sum<NoisyTopKGate<double>>(
        {.shared = shared,
         .gated = true,
         .tied = true,
         .scale = 1.5,
         .routed = {.experts = 5, .top_k = 2}},
        [](const test::Named& values, const auto& x, Index i) { return 1.5 * tied(values, x, i); });
  }
}

TEST_CASE("shared expert gate: without shared experts a layer has the bits of the wrapped gate's",
          "[routing][gate]") {
  using Network = Expert<FeedForward, double>;
  using Layer = MoELayer<Network, SharedExpertGate<TopKGate<double>>>;
  using Plain = MoELayer<Network, TopKGate<double>>;
  const TopKConfig routed{.experts = 4,
                          .top_k = 2,
                          .renormalise = true,
                          .jitter = 0.1,
                          .capacity_factor = 0.75,
                          .switch_loss_weight = 0.3};
  Layer layer({.width = 4,
               .expert = {.hidden = 3},
               .gate = {.shared = 0, .scale = 0.5, .routed = routed},
               .seed = 5});
  Plain plain({.width = 4, .expert = {.hidden = 3}, .gate = routed, .seed = 5});
  CHECK(layer.gate().experts() == 4);
  CHECK(layer.gate().shared_experts() == 0);
  // Both draw the same initial numbers, under names that differ in "routed." only.
  for (const auto& [name, value] : values_of(plain)) {
    const bool of_gate = name.starts_with("gate.");
    CHECK(values_of(layer).at(of_gate ? "gate.routed." + name.substr(5) : name) == value);
  }
  const Matrix<double> x = random_matrix(23, 4, 1);
  const Matrix<double> dy = random_matrix(23, 4, 2);
  std::vector<std::uint8_t> valid(23, 1);
  valid[3] = valid[22] = 0;
  Layer::Tape tape;
  Plain::Tape plain_tape;
  CHECK(same_bits(layer.evaluate(x), plain.evaluate(x)));
  CHECK(same_bits(layer.forward(x, tape, {.step = 3, .valid = valid}),
                  plain.forward(x, plain_tape, {.step = 3, .valid = valid})));
  CHECK(tape.routing().slots() < 42);
  CHECK(tape.balance().loss == plain_tape.balance().loss);
  CHECK(same_bits(layer.backward(dy, tape), plain.backward(dy, plain_tape)));
  CHECK(same_bits(parameter(layer, "gate.routed.weight").gradient(),
                  parameter(plain, "gate.weight").gradient()));
  CHECK(same_bits(parameter(layer, "experts.2.up.weight").gradient(),
                  parameter(plain, "experts.2.up.weight").gradient()));
}

TEMPLATE_TEST_CASE("shared expert gate: shared slots come first, routed ones are shifted",
                   "[routing][gate]", float, double) {
  using S = TestType;
  Holed<S> gate({.width = 1, .shared = 2, .gated = true}, 0);
  parameter(gate, "routed.W").value = Matrix<S>{{3, 5, 7}};
  const S ln3 = std::log(S{3});
  parameter(gate, "shared_weight").value = Matrix<S>{{ln3, -ln3}};
  // x = 1 for tokens with 0, 1, 2, 0 slots of the wrapped gate; sigmoid(±ln 3) = 3/4 and 1/4.
  typename Holed<S>::Tape tape;
  const Routing<S>& routing = gate.forward(Matrix<S>::Ones(4, 1), tape, {.step = 0});
  CHECK(gate.experts() == 5);
  CHECK(routing.experts == 5);
  CHECK(routing.token_offsets == Indices{0, 2, 5, 9, 11});
  CHECK(routing.expert == Indices{0, 1, 0, 1, 3, 0, 1, 2, 3, 0, 1});
  const std::vector<double> weights = {.75, .25, .75, .25, 5, .75, .25, 3, 5, .75, .25};
  for (std::size_t s = 0; s < weights.size(); ++s) {
    CHECK_THAT(static_cast<double>(routing.weight[s]),
               Catch::Matchers::WithinAbs(weights[s], 1e-6));
  }
  CHECK(tape.balance.load == Vector<S>{{1, 2, 0}});

  // dweight = 0, 1, ..., 10. By x·W_shared: the shared ones' 0, 2, 5, 9 and 1, 3, 6, 10, times 3/16.
  // The wrapped gate gets 4, 7 and 8, and adds 1: experts 0, 1 have 8 and 5 + 9.
  std::vector<S> dweight;
  for (int s = 0; s < 11; ++s) dweight.push_back(static_cast<S>(s));
  const Matrix<S>& dx = test::gate_dx(gate, Matrix<S>::Ones(4, 1), dweight, tape);
  CHECK(relative_error(parameter(gate, "shared_weight").gradient(), Matrix<S>{{3, S(3.75)}}) <
        1e-6);
  CHECK(relative_error(parameter(gate, "routed.W").gradient(), Matrix<S>{{8, 14, 0}}) < 1e-6);
  const S q = ln3 * S{3} / S{16};
  CHECK(relative_error(dx, Matrix<S>{{-q}, {5 * 5 - q}, {3 * 8 + 5 * 9 - q}, {-q}}) < 1e-6);
}

TEST_CASE("shared expert gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const double weights : {1e-2, 1.0, 10.0}) {
    for (const double inputs : {1e-2, 1.0, 10.0}) {
      for (const int kind : {0, 1, 2}) {
        INFO("weights times " << weights << ", x times " << inputs << ", kind " << kind);
        Holed<double> gate(
            {.width = 3, .shared = 2, .gated = kind > 0, .tied = kind > 1, .scale = 1.7}, 1);
        test::randomize(gate, 4, weights);
        Matrix<double> x = random_matrix(7, 3, 2, inputs);
        const Matrix<double> r = random_matrix(7, 5, 3);
        Holed<double>::Tape tape;
        gate.forward(x, tape, {.step = 0});
        const Matrix<double> dx = test::gate_dx(gate, x, test::dweight_of(tape.routing, r), tape);
        const auto loss = [&] { return test::loss_of(gate, x, r); };
        test::check_scaled_gradients(gate, dx, x, loss, weights, inputs,
                                     weights * inputs > 5 ? 0.02 : 1);
      }
    }
  }
}

TEST_CASE("shared expert gate: gradients of a layer are derivatives", "[routing][gate]") {
  for (const bool is_gated : {false, true}) {
    using Layer = MoELayer<Expert<FeedForward, double>, Noisy<double>>;
    test::check_layer_gradients<Layer>(
        {.width = 3,
         .expert = {.hidden = 3, .activation = Activation::gelu},
         .gate = {.shared = 2, .gated = is_gated, .routed = {.experts = 4, .top_k = 2}},
         .seed = 4},
        5, [](const Noisy<double>&, const Layer::Tape& tape) {
          return test::choice_margin(tape.gate.routed.noisy, 2) > 1e-2;
        });
    using HoledLayer = MoELayer<Expert<FeedForward, double>, Holed<double>>;
    test::check_layer_gradients<HoledLayer>(
        {.width = 3,
         .expert = {.hidden = 3, .activation = Activation::gelu},
         .gate = {.shared = 1, .gated = is_gated},
         .seed = 4},
        7, [](const auto&, const auto&) { return true; });
  }
}

TEST_CASE("shared expert gate: two shared experts are one of twice the width", "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, Holed<double>>;
  Layer narrow({.width = 3, .expert = {.hidden = 2}, .gate = {.shared = 2}, .seed = 0});
  Layer wide({.width = 3, .expert = {.hidden = 4}, .gate = {.shared = 1}, .seed = 0});
  test::randomize(narrow, 1);
  const auto of = [](Layer& layer, const char* name) -> Matrix<double>& {
    return parameter(layer, name).value;
  };
  const Index experts = 3;  // of the wrapped gate, all silent
  for_each_parameter(narrow, [&](const std::string& name, Parameter<double>& p) {
    for (Index e = 2; e < 2 + experts; ++e) {
      if (name.starts_with("experts." + std::to_string(e))) p.value.setZero();
    }
  });
  for_each_parameter(wide, [](const std::string&, Parameter<double>& p) { p.value.setZero(); });
  of(wide, "experts.0.up.weight") << of(narrow, "experts.0.up.weight"),
      of(narrow, "experts.1.up.weight");
  of(wide, "experts.0.up.bias") << of(narrow, "experts.0.up.bias"), of(narrow, "experts.1.up.bias");
  of(wide, "experts.0.down.weight") << of(narrow, "experts.0.down.weight"),
      of(narrow, "experts.1.down.weight");
  of(wide, "experts.0.down.bias") =
      of(narrow, "experts.0.down.bias") + of(narrow, "experts.1.down.bias");
  const Matrix<double> x = random_matrix(9, 3, 2);
  CHECK(relative_error(narrow.evaluate(x), wide.evaluate(x)) < 1e-14);
}

TEST_CASE("shared expert gate: tied weights worked by hand", "[routing][gate]") {
  // x = 1, W_shared = ln 3: sigmoid 3/4, times 2. The gradient w.r.t. x·W_shared is the sum of dweight
  // over the two shared slots, (1 + 10), times 2·3/16.
  Holed<double> gate({.width = 1, .shared = 2, .gated = true, .tied = true, .scale = 2}, 0);
  parameter(gate, "shared_weight").value = Matrix<double>{{std::log(3.0)}};
  Holed<double>::Tape tape;
  const Routing<double>& routing = gate.forward(Matrix<double>::Ones(1, 1), tape, {.step = 0});
  CHECK(routing.expert == Indices{0, 1});
  for (const double w : routing.weight) CHECK_THAT(w, Catch::Matchers::WithinAbs(1.5, 1e-15));
  const std::vector<double> dweight{1, 10};
  test::gate_dx(gate, Matrix<double>::Ones(1, 1), dweight, tape);
  CHECK_THAT(parameter(gate, "shared_weight").gradient()(0, 0),
             Catch::Matchers::WithinAbs(11 * 2 * 3.0 / 16, 1e-14));
}

TEST_CASE("shared expert gate: any shape makes a routing", "[routing][gate]") {
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    const auto draw = [&](std::uint64_t what, Index count) {
      return static_cast<Index>(derive_seed(seed, what) % static_cast<std::uint64_t>(count)) + 1;
    };
    const Index tokens = draw(0, 40) - 1;
    const Index shared = draw(1, 4);
    const Index experts = draw(2, 9);
    const Index top_k = draw(3, experts);
    const Matrix<double> x = random_matrix(tokens, 3, seed);
    Noisy<double> noisy({.width = 3,
                         .shared = shared,
                         .gated = seed % 2 == 0,
                         .routed = {.experts = experts, .top_k = top_k}},
                        seed);
    Noisy<double>::Tape tape;
    noisy.forward(x, tape, {.step = 0});
    test::check_routing(tape.routing, tokens, shared + experts);
    CHECK(tape.routing.slots() == tokens * (shared + top_k));
    const Matrix<double> G = test::dense_weights(tape.routing);
    CHECK(same_bits(G.rightCols(experts), test::dense_weights(tape.routed.routing)));
    CHECK((G.leftCols(shared).array() == (seed % 2 == 0 ? 0.5 : 1.0)).all());  // W_shared = 0
    const std::vector<double> ones(detail::to_size(tape.routing.slots()), 1.0);
    CHECK(test::gate_dx(noisy, x, ones, tape).allFinite());

    Holed<double> holed({.width = 3, .shared = shared}, seed);
    const Routing<double> routing = holed.evaluate(x);
    test::check_routing(routing, tokens, shared + 3);
  }
}

TEST_CASE("shared expert gate: shapes at the ends", "[routing][gate]") {
  // One routed expert; 131,072 of them and one token; gates within gates.
  Noisy<float> single({.width = 2, .routed = {.experts = 1, .top_k = 1}}, 0);
  CHECK(single.evaluate(random_matrix<float>(1, 2, 1)).expert == Indices{0, 1});
  Noisy<float> many({.width = 2, .gated = true, .routed = {.experts = 131072, .top_k = 3}}, 0);
  Noisy<float>::Tape tape;
  many.forward(random_matrix<float>(1, 2, 1), tape, {.step = 0});
  test::check_routing(tape.routing, 1, 131073);
  const std::vector<float> ones(4, 1.0f);
  CHECK(test::gate_dx(many, random_matrix<float>(1, 2, 1), ones, tape).allFinite());
  SharedExpertGate<Noisy<float>> twice(
      {.width = 2, .shared = 2, .routed = {.shared = 1, .routed = {.experts = 3, .top_k = 3}}}, 0);
  CHECK(twice.evaluate(random_matrix<float>(1, 2, 1)).expert == Indices{0, 1, 2, 3, 4, 5});
  CHECK(parameter_count(twice) == 12);
}

TEST_CASE("shared expert gate: a wrapped gate adds to dx once each time", "[routing][gate]") {
  Holed<double> gate({.width = 3}, 1);
  Holed<double>::Tape tape;
  const Matrix<double> x = random_matrix(6, 3, 2);
  gate.forward(x, tape, {.step = 0});
  const std::vector<double> dweight(12, 0.5);
  const Matrix<double> dx = test::gate_dx(gate, x, dweight, tape);
  CHECK(dx.cwiseAbs().maxCoeff() > 0);
  CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), dx));
  CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), dx));
}

TEST_CASE("shared expert gate: parameters have their names, shapes and start", "[routing][gate]") {
  for (const bool is_gated : {false, true}) {
    Noisy<float> gate(
        {.width = 3, .shared = 2, .gated = is_gated, .routed = {.experts = 5, .top_k = 2}}, 0);
    std::vector<std::string> names;
    for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
      names.push_back(name);
      CHECK(p.value.rows() == 3);
      CHECK(p.value.cols() == (name == "shared_weight" ? 2 : 5));
      CHECK(p.value.cwiseAbs().maxCoeff() == 0);
    });
    std::vector<std::string> expected = {"routed.weight", "routed.noise_weight"};
    if (is_gated) expected.emplace_back("shared_weight");
    CHECK(names == expected);
  }
}

TEST_CASE("shared expert gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  using Config = Noisy<float>::Config;
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .routed = {.experts = 6, .top_k = 2}};
    spoil(config);
    CHECK_THROWS_AS(Noisy<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(Noisy<float>(config, 0), "moe: " + message);
  };
  refuse([](Config& c) { c.width = 0; }, "SharedExpertGate::Config.width = 0, must be at least 1");
  refuse([](Config& c) { c.shared = -1; },
         "SharedExpertGate::Config.shared = -1, must be at least 0");
  const auto none = [](bool is_tied) {
    return [is_tied](Config& c) { c.shared = 0, c.gated = true, c.tied = is_tied; };
  };
  const std::string nothing_to_weigh =
      "SharedExpertGate::Config.gated = true, must be false with shared = 0";
  refuse(none(false), nothing_to_weigh);
  refuse(none(true), nothing_to_weigh);
  refuse([](Config& c) { c.routed.width = 5; },
         "SharedExpertGate::Config.routed.width = 5, must be 0 or Config.width = 4");
  refuse([](Config& c) { c.routed.top_k = 7; },
         "NoisyTopKGate::Config.top_k = 7, must be from 1 to experts = 6");
  refuse([](Config& c) { c.tied = true; },
         "SharedExpertGate::Config.tied = true, must be false without gated");
  const std::string scale = ", must be finite and above 0 as a Scalar";
  refuse([](Config& c) { c.scale = 0; }, "SharedExpertGate::Config.scale = 0" + scale);
  refuse([](Config& c) { c.scale = std::nan(""); }, "SharedExpertGate::Config.scale = nan" + scale);
  refuse([](Config& c) { c.scale = 1e-300; }, "SharedExpertGate::Config.scale = 1e-300" + scale);
}

TEST_CASE("shared expert gate: the tape of a gate of another shape is refused", "[routing][gate]") {
  Noisy<double> gate({.width = 3, .routed = {.experts = 5, .top_k = 2}}, 1);
  Noisy<double>::Tape tape;
  const Matrix<double> x = random_matrix(6, 3, 2);
  gate.forward(x, tape, {.step = 0});
  const std::vector<double> dweight(18, 0.5);
  const std::string foreign =
      "moe: SharedExpertGate::backward: the tape is another gate's, of 6 experts";
  Noisy<double> few({.width = 3, .routed = {.experts = 4, .top_k = 2}}, 0);
  CHECK_THROWS_WITH(test::gate_dx(few, x, dweight, tape), foreign);
  Noisy<double> plus({.width = 3, .shared = 2, .routed = {.experts = 4, .top_k = 2}}, 0);
  CHECK_THROWS_WITH(test::gate_dx(plus, x, dweight, tape), foreign);
  Noisy<double> weighted({.width = 3, .gated = true, .routed = {.experts = 5, .top_k = 2}}, 0);
  CHECK_THROWS_WITH(test::gate_dx(weighted, x, dweight, tape), foreign);
  const std::string foreign_tied =
      "moe: SharedExpertGate::backward: the tape is another gate's, of 7 experts";
  Noisy<double> two({.width = 3, .shared = 2, .gated = true, .routed = {.experts = 5, .top_k = 2}},
                    0);
  Noisy<double>::Tape of_two;
  two.forward(x, of_two, {.step = 0});
  Noisy<double> tied_two(
      {.width = 3, .shared = 2, .gated = true, .tied = true, .routed = {.experts = 5, .top_k = 2}},
      0);
  CHECK_THROWS_WITH(test::gate_dx(tied_two, x, std::vector<double>(24, 0.5), of_two), foreign_tied);
  Noisy<double> busy({.width = 3, .routed = {.experts = 5, .top_k = 1}},
                     0);  // the inner one's check
  CHECK_THROWS_AS(test::gate_dx(busy, x, dweight, tape), std::invalid_argument);
}

TEST_CASE("shared expert gate: a wrapped gate that contradicts itself is found out",
          "[routing][gate]") {
  const Matrix<double> x = random_matrix(6, 3, 2);
  for (int fault = 0; fault <= 4; ++fault) {
    Holed<double> gate({.width = 3, .routed = {.fault = fault}}, 1);
    Holed<double>::Tape tape;
    if (fault == 0) {
      CHECK_NOTHROW(gate.forward(x, tape, {.step = 0}));
    } else {
      CHECK_THROWS_AS(gate.forward(x, tape, {.step = 0}), std::invalid_argument);
      CHECK_THROWS_AS(gate.evaluate(x, tape), std::invalid_argument);
      CHECK_FALSE(tape.trained);
    }
  }
}

TEST_CASE("shared expert gate: rows that the wrapped gate refuses leave the tape as good as before",
          "[gate]") {
  SharedExpertGate<TopKGate<double>> gate(
      {.width = 3,
       .routed = {.experts = 4, .top_k = 2, .sequence_loss_weight = 0.1, .sequences = 2}},
      1);
  SharedExpertGate<TopKGate<double>>::Tape tape;
  const Matrix<double> x = random_matrix(6, 3, 1);
  gate.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(gate.forward(random_matrix(5, 3, 1), tape, {.step = 0}),
                    "moe: TopKGate: the batch has 5 rows, not a multiple of Config.sequences = 2");
  const std::vector<double> dweight(tape.routing.weight.size(), 1.0);
  CHECK_NOTHROW(test::gate_dx(gate, x, dweight, tape));
}
