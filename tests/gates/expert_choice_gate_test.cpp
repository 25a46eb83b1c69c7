#include "moe/gates/expert_choice_gate.hpp"

#include "token_choice_checks.hpp"

using namespace moe;
using namespace moe::test;

namespace {

Index capacity(const ExpertChoiceGate<double>::Config& config, Index tokens) {
  const double share =
      config.capacity_factor * static_cast<double>(tokens) / static_cast<double>(config.experts);
  return std::min(tokens, std::max<Index>(1, static_cast<Index>(std::floor(share))));
}

void check_gradients(const ExpertChoiceGate<double>::Config& config, Index tokens, double weights,
                     double inputs) {
  INFO("T " << tokens << ", E " << config.experts << ", c " << config.capacity_factor
            << ", weights times " << weights << ", x times " << inputs);
  ExpertChoiceGate<double> gate(config, 77);
  ExpertChoiceGate<double>::Tape tape;
  Matrix<double> x;
  const double scale = weights * inputs;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 500; ++seed) {
    test::randomize(gate, seed, weights);
    x = random_matrix(tokens, config.width, seed, inputs);
    gate.forward(x, tape, {.step = 0});
    clear = config.experts == 1 ||
            test::column_margin(tape.p, capacity(config, tokens)) > 4e-3 * std::min(1.0, scale);
  }
  REQUIRE(clear);
  const Matrix<double> r = random_matrix(tokens, config.experts, 8);
  const Matrix<double> dx = test::gate_dx(gate, x, test::dweight_of(tape.routing, r), tape);

  // p on the mask; ∂p_i/∂c_k = p_i·(δ_ik − p_k).
  const Matrix<double>& w = parameter(gate, "weight").value;
  const Matrix<double> p = test::naive_softmax(test::naive_scores(x, w));
  const Matrix<double> mask = test::naive_column_mask(p, capacity(config, tokens));
  Matrix<double> naive_dx = Matrix<double>::Zero(tokens, config.width);
  Matrix<double> naive_dw = Matrix<double>::Zero(config.width, config.experts);
  for (Index t = 0; t < tokens; ++t) {
    for (Index k = 0; k < config.experts; ++k) {
      double dc = 0;
      for (Index i = 0; i < config.experts; ++i) {
        dc += mask(t, i) * r(t, i) * p(t, i) * ((i == k ? 1.0 : 0.0) - p(t, k));
      }
      for (Index d = 0; d < config.width; ++d) {
        naive_dw(d, k) += x(t, d) * dc;
        naive_dx(t, d) += w(d, k) * dc;
      }
    }
  }
  CHECK(relative_error(test::dense_weights(tape.routing), p.cwiseProduct(mask)) < 1e-12);
  const auto near = [](const Matrix<double>& a, const Matrix<double>& b) {
    return (a - b).cwiseAbs().maxCoeff() <= 1e-11 * b.cwiseAbs().maxCoeff() + 1e-13;
  };
  CHECK(near(dx, naive_dx));
  CHECK(near(parameter(gate, "weight").gradient(), naive_dw));
  const auto loss = [&] { return test::loss_of(gate, x, r); };
  test::check_scaled_gradients(gate, dx, x, loss, weights, inputs, scale > 5 ? 0.02 : 1);
}

}  // namespace

TEST_CASE("expert choice gate: gradients are derivatives for every number of experts",
          "[routing][gate]") {
  for (const Index experts : {1, 2, 3, 5, 9}) {
    for (const double factor : {0.4, 1.0, 2.5, 9.0}) {
      check_gradients({.width = 3,
                       .experts = experts,
                       .capacity_factor = std::min(factor, static_cast<double>(experts))},
                      7, 0.8, 1);
    }
  }
}

TEST_CASE("expert choice gate: gradients are derivatives at every scale", "[routing][gate]") {
  for (const double weights : {1e-2, 1.0, 10.0}) {
    for (const double inputs : {1e-2, 1.0, 10.0}) {
      if (weights * inputs > 10) continue;  // a softmax of scores of 100 has no slope
      check_gradients({.width = 3, .experts = 4, .capacity_factor = 1.5}, 6, weights, inputs);
    }
  }
}

TEMPLATE_TEST_CASE("expert choice gate: three tokens and two experts worked by hand",
                   "[routing][gate]", float, double) {
  using S = TestType;
  ExpertChoiceGate<S> gate({.width = 1, .experts = 2, .capacity_factor = 1.4}, 0);
  const S ln2 = std::log(S{2});
  parameter(gate, "weight").value = Matrix<S>{{0, ln2}};
  // c = (0, x)·ln 2: p = (1, 1)/2, (1, 2)/3, (1, 4)/5. C = ⌊1.4·3/2⌋ = 2: expert 0 takes tokens 0
  // and 1, expert 1 takes 1 and 2.
  typename ExpertChoiceGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(Matrix<S>{{0}, {1}, {2}}, tape, {.step = 0});
  CHECK(routing.token_offsets == Indices{0, 1, 3, 4});
  CHECK(routing.expert == Indices{0, 0, 1, 1});
  const std::vector<double> weights = {1.0 / 2, 1.0 / 3, 2.0 / 3, 4.0 / 5};
  for (std::size_t s = 0; s < 4; ++s) {
    CHECK_THAT(static_cast<double>(routing.weight[s]),
               Catch::Matchers::WithinAbs(weights[s], 1e-6));
  }
  CHECK(tape.balance.tokens_per_expert == Indices{2, 2});
  CHECK(tape.balance.load == Vector<S>::Constant(2, 2));
  CHECK_THAT(static_cast<double>(tape.balance.importance[1]),
             Catch::Matchers::WithinAbs(22.0 / 15, 1e-6));
  CHECK(tape.balance.loss == 0);
  // dweight = (4, 0, 9, 25): dc_1 = -4·1/4, 9·2/9, 25·4/25 = -1, 2, 4, and dc_0 = -dc_1.
  const std::vector<S> dweight = {4, 0, 9, 25};
  const Matrix<S>& dx = test::gate_dx(gate, Matrix<S>{{0}, {1}, {2}}, dweight, tape);
  CHECK(relative_error(dx, ln2 * Matrix<S>{{-1}, {2}, {4}}) < 1e-6);
  CHECK(relative_error(parameter(gate, "weight").gradient(), Matrix<S>{{-10, 10}}) < 1e-6);
}

TEST_CASE("expert choice gate: every expert gets exactly C tokens for any shape",
          "[routing][gate]") {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const auto draw = [&](std::uint64_t what, Index count) {
      return static_cast<Index>(derive_seed(seed, what) % static_cast<std::uint64_t>(count)) + 1;
    };
    const Index experts = draw(0, 20);
    const Index tokens = draw(2, 90);
    const ExpertChoiceGate<double>::Config config{
        .width = 3,
        .experts = experts,
        .capacity_factor = static_cast<double>(draw(1, 100 * experts)) / 100};
    const ExpertChoiceGate<double> gate(config, seed);
    ExpertChoiceGate<double>::Tape tape;
    const Matrix<double> x = random_matrix(tokens, 3, seed);
    gate.forward(x, tape, {.step = 0});
    test::check_routing(tape.routing, tokens, experts);
    for (const Index count : tape.balance.tokens_per_expert) {
      REQUIRE(count == capacity(config, tokens));
    }
    const Routing<double> served = gate.evaluate(x);
    CHECK(served.expert == tape.routing.expert);
    CHECK(served.weight == tape.routing.weight);
  }
}

TEST_CASE("expert choice gate: a token's experts depend on its batch", "[routing][gate]") {
  const ExpertChoiceGate<double> gate({.width = 3, .experts = 6}, 1);
  const Matrix<double> x = random_matrix(30, 3, 2);
  const Matrix<double> together = test::dense_weights(gate.evaluate(x));
  const Matrix<double> alone = test::dense_weights(gate.evaluate(x.row(4)));
  CHECK((alone.array() > 0).all());  // every expert takes its best token, the only one
  CHECK_FALSE(same_bits(together.row(4), alone));
  // Later tokens change what an earlier one gets.
  const Matrix<double> first = test::dense_weights(gate.evaluate(x.topRows(15)));
  CHECK_FALSE(same_bits(together.topRows(15), first));
}

TEST_CASE("expert choice gate: gradients of a layer are derivatives", "[routing][gate]") {
  using Layer = MoELayer<Expert<FeedForward, double>, ExpertChoiceGate<double>>;
  test::check_layer_gradients<Layer>(
      {.width = 3,
       .expert = {.hidden = 3, .activation = Activation::gelu},
       .gate = {.experts = 4, .capacity_factor = 1.5},
       .seed = 4},
      6, [](const ExpertChoiceGate<double>& gate, const Layer::Tape& tape) {
        return test::column_margin(tape.gate.p, capacity(gate.config(), 6)) > 1e-2;
      });
}

TEMPLATE_TEST_CASE("expert choice gate: ties go to the lower token", "[routing][gate]", float,
                   double) {
  ExpertChoiceGate<TestType> gate({.width = 3, .experts = 4, .capacity_factor = 2}, 0);
  parameter(gate, "weight").value.setZero();
  const Routing<TestType> routing = gate.evaluate(random_matrix<TestType>(4, 3, 1));
  CHECK(routing.token_offsets == Indices{0, 4, 8, 8, 8});
  for (const TestType weight : routing.weight) CHECK(weight == TestType{0.25});
}

TEST_CASE("expert choice gate: shapes at the ends", "[routing][gate]") {
  SECTION("one expert, fewer tokens than experts, all tokens") {
    for (const Index experts : {1, 9}) {
      for (const double factor : {0.5, static_cast<double>(experts)}) {
        for (const Index tokens : {1, 4}) {
          ExpertChoiceGate<float> gate({.width = 3, .experts = experts, .capacity_factor = factor},
                                       0);
          ExpertChoiceGate<float>::Tape tape;
          const Index slots =
              gate.forward(random_matrix<float>(tokens, 3, 1), tape, {.step = 0}).slots();
          CHECK(slots == (factor > 0.5 ? experts * tokens
                                       : experts * std::max<Index>(1, tokens / (2 * experts))));
          const std::vector<float> ones(detail::to_size(slots), 1.0f);
          CHECK(test::gate_dx(gate, random_matrix<float>(tokens, 3, 1), ones, tape).allFinite());
        }
      }
    }
  }
  SECTION("131,072 experts and one token") {
    ExpertChoiceGate<float> gate({.width = 2, .experts = 131072}, 0);
    ExpertChoiceGate<float>::Tape tape;
    CHECK(gate.forward(random_matrix<float>(1, 2, 1), tape, {.step = 0}).slots() == 131072);
    const std::vector<float> ones(131072, 1.0f);
    CHECK(test::gate_dx(gate, random_matrix<float>(1, 2, 1), ones, tape).allFinite());
  }
}

TEMPLATE_TEST_CASE("expert choice gate: a token with NaN or infinity comes last", "[routing][gate]",
                   float, double) {
  using S = TestType;
  for_each_spoilt_batch<S>([](const Matrix<S>& x, Index spoilt) {
    for (const double factor : {1.0, 4.0}) {
      ExpertChoiceGate<S> gate({.width = 3, .experts = 4, .capacity_factor = factor}, 1);
      check_spoilt_token(gate.evaluate(x), 4, spoilt, factor == 4 ? 4 : 0);
    }
  });
}

TEST_CASE("expert choice gate: its parameter has its name, shape and start", "[routing][gate]") {
  const ExpertChoiceGate<float> gate({.width = 9, .experts = 4}, 3);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.rows() == 9);
    CHECK(p.value.cols() == 4);
    CHECK(p.value.cwiseAbs().maxCoeff() <= 1.0f / 3);
    CHECK(p.value.cwiseAbs().maxCoeff() > 0.3f);
  });
  CHECK(names == std::vector<std::string>{"weight"});
}

TEST_CASE("expert choice gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  using Config = ExpertChoiceGate<float>::Config;
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .experts = 6};
    spoil(config);
    CHECK_THROWS_AS(ExpertChoiceGate<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(ExpertChoiceGate<float>(config, 0),
                      "moe: ExpertChoiceGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.experts = 0; }, "experts = 0, must be at least 1");
  const std::string range = ", must be above 0 and at most experts = 6";
  refuse([](Config& c) { c.capacity_factor = 0; }, "capacity_factor = 0" + range);
  refuse([](Config& c) { c.capacity_factor = -1; }, "capacity_factor = -1" + range);
  refuse([](Config& c) { c.capacity_factor = 6.5; }, "capacity_factor = 6.5" + range);
  refuse([](Config& c) { c.capacity_factor = std::nan(""); }, "capacity_factor = nan" + range);
  refuse([](Config& c) { c.capacity_factor = std::numeric_limits<double>::infinity(); },
         "capacity_factor = inf" + range);
}

TEST_CASE("expert choice gate: the tape of a gate of another shape is refused", "[routing][gate]") {
  check_foreign_tape<ExpertChoiceGate<double>>(
      {.width = 3, .experts = 5},
      {{.width = 3, .experts = 4}, {.width = 3, .experts = 5, .capacity_factor = 3}},
      "moe: ExpertChoiceGate::backward: the tape is another gate's, of 5 experts and 20 slots of "
      "10 tokens");
}
