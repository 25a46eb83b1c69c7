#include "../naive_layer.hpp"
#include "gates.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "top_k.hpp"

using namespace moe;
using namespace moe::test;
using Config = TopKConfig;

TEST_CASE("top-k gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .experts = 6, .top_k = 2, .groups = 3, .top_k_groups = 2};
    CHECK_NOTHROW(TopKGate<float>(config, 0));
    spoil(config);
    CHECK_THROWS_AS(TopKGate<float>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(TopKGate<float>(config, 0), "moe: TopKGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.experts = 0; }, "experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to experts = 6");
  refuse([](Config& c) { c.top_k = 5; }, "top_k = 5, but top_k_groups = 2 hold 4 experts");
  refuse([](Config& c) { c.score = static_cast<Score>(4); },
         "score = 4, must be one of the 4 scores");
  refuse([](Config& c) { c.scale = 0; }, "scale = 0, must be finite and above 0");
  refuse([](Config& c) { c.scale = std::nan(""); }, "scale = nan, must be finite and above 0");
  for (const double scale : {1e300, 1e-300}) {  // infinite or zero in float
    refuse([=](Config& c) { c.scale = scale; },
           scale > 1 ? "scale = 1e+300, must be finite and above 0 as a Scalar"
                     : "scale = 1e-300, must be finite and above 0 as a Scalar");
    CHECK_NOTHROW(
        TopKGate<double>(Config{.width = 4, .experts = 6, .top_k = 2, .scale = scale}, 0));
  }
  refuse([](Config& c) { c.groups = 0; }, "groups = 0, must be at least 1 and divide experts = 6");
  refuse([](Config& c) { c.groups = 4; }, "groups = 4, must be at least 1 and divide experts = 6");
  refuse([](Config& c) { c.top_k_groups = 0; }, "top_k_groups = 0, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k_groups = 4; }, "top_k_groups = 4, must be from 1 to groups = 3");
  refuse([](Config& c) { c.group_score = static_cast<GroupScore>(-1); },
         "group_score = -1, must be one of the 2 scores of groups");
  refuse([](Config& c) { c.jitter = 1; }, "jitter = 1, must be in [0, 1)");
  refuse([](Config& c) { c.jitter = -0.1; }, "jitter = -0.1, must be in [0, 1)");
  refuse([](Config& c) { c.jitter = std::nan(""); }, "jitter = nan, must be in [0, 1)");
  refuse(
      [](Config& c) {
        c.random_second = true;
        c.top_k = 3;
      },
      "random_second with top_k = 3, must be 2");
  refuse(
      [](Config& c) {
        c.drawn_second = true;
        c.top_k = 1;
      },
      "drawn_second with top_k = 1, must be 2");
  refuse([](Config& c) { c.drawn_second = c.selection_bias = true; },
         "drawn_second with selection_bias, which would have no part in the draw");
  refuse([](Config& c) { c.capacity = -1; }, "capacity = -1, must be at least 0");
  refuse([](Config& c) { c.evaluation_capacity = -1; },
         "evaluation_capacity = -1, must be at least 0");
  refuse(
      [](Config& c) {
        c.capacity = 3;
        c.capacity_factor = 1.5;
      },
      "capacity = 3, but capacity_factor = 1.5; one of them must be 0");
  refuse(
      [](Config& c) {
        c.evaluation_capacity = 3;
        c.evaluation_capacity_factor = 2;
      },
      "evaluation_capacity = 3, but evaluation_capacity_factor = 2; one of them must be 0");
  refuse([](Config& c) { c.place_order = static_cast<PlaceOrder>(4); },
         "place_order = 4, must be one of the 4 orders");
  refuse([](Config& c) { c.switch_count = static_cast<SwitchCount>(3); },
         "switch_count = 3, must be one of the 3 counts");
  for (const double norm : {0.5, std::nan(""), std::numeric_limits<double>::infinity()}) {
    refuse([=](Config& c) { c.renormalise_norm = norm; }, "renormalise_norm = " +
                                                              std::string(norm < 1   ? "0.5"
                                                                          : norm > 1 ? "inf"
                                                                                     : "nan") +
                                                              ", must be finite and at least 1");
  }
  const std::string plain_norm =
      "renormalise_norm = 2, must be 1 without renormalise, and with softmax_of_chosen";
  refuse([](Config& c) { c.renormalise_norm = 2; }, plain_norm);
  refuse(
      [](Config& c) {
        c.score = Score::softmax_of_chosen;
        c.renormalise = true;
        c.renormalise_norm = 2;
      },
      plain_norm);
  refuse([](Config& c) { c.renormalise_after_drops = true; },
         "renormalise_after_drops = true, must be false without renormalise or softmax_of_chosen");
  refuse([](Config& c) { c.sequences = 0; }, "sequences = 0, must be at least 1");
  refuse([](Config& c) { c.row_order = static_cast<RowOrder>(2); },
         "row_order = 2, must be one of the 2 orders");
  const std::pair<const char*, double Config::*> weights[] = {
      {"renormalise_epsilon", &Config::renormalise_epsilon},
      {"bias_rate", &Config::bias_rate},
      {"capacity_factor", &Config::capacity_factor},
      {"evaluation_capacity_factor", &Config::evaluation_capacity_factor},
      {"switch_loss_weight", &Config::switch_loss_weight},
      {"sequence_loss_weight", &Config::sequence_loss_weight},
      {"z_loss_weight", &Config::z_loss_weight},
      {"init_stddev", &Config::init_stddev}};
  for (const auto& [name, field] : weights) {
    const auto member = field;
    refuse([&](Config& c) { c.*member = -0.5; },
           std::string(name) + " = -0.5, must be finite and at least 0");
    refuse([&](Config& c) { c.*member = std::nan(""); },
           std::string(name) + " = nan, must be finite and at least 0");
    refuse([&](Config& c) { c.*member = std::numeric_limits<double>::infinity(); },
           std::string(name) + " = inf, must be finite and at least 0");
  }
}

TEST_CASE("top-k gate: the tape of a gate of another shape or with other losses is refused",
          "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  TopKTape<double> tape;
  const Matrix<double> x = random_matrix(6, 5, 2);
  gate.forward(x, tape, {.step = 0});
  const std::vector<double> dweight(tape.routing.weight.size(), 0.5);
  const auto refuse = [&](auto&& change) {
    Config config = everything();
    change(config);
    TopKGate<double> other(config, 1);
    CHECK_THROWS_AS(test::gate_dx(other, x, dweight, tape), std::invalid_argument);
    CHECK(test::has_zero_gradients(other));
  };
  refuse([](Config& c) { c.width = 4; });
  refuse([](Config& c) { c.experts = 24; });
  refuse([](Config& c) {
    c.top_k = 1;
    c.random_second = false;
  });
  refuse([](Config& c) { c.jitter = 0; });  // the tape's W_g met another x
  Config plain = everything();
  plain.jitter = plain.switch_loss_weight = plain.sequence_loss_weight = 0;
  TopKGate<double> other(plain, 1);
  TopKTape<double> others;
  other.forward(random_matrix(6, 5, 2), others, {.step = 0});
  CHECK_THROWS_AS(test::gate_dx(gate, x, std::vector<double>(others.routing.weight.size()), others),
                  std::invalid_argument);
}

TEST_CASE("top-k gate: rows that are no whole sequences are refused where each has a capacity",
          "[routing][gate]") {
  const TopKGate<double> gate({.width = 5,
                               .experts = 3,
                               .top_k = 1,
                               .capacity = 2,
                               .evaluation_capacity = 2,
                               .sequences = 2},
                              1);
  TopKTape<double> tape;
  const std::string message =
      "moe: TopKGate: the batch has 7 rows, not a multiple of Config.sequences = 2";
  CHECK_THROWS_WITH(gate.forward(random_matrix(7, 5, 2), tape, {.step = 0}), message);
  CHECK_THROWS_WITH(gate.evaluate(random_matrix(7, 5, 2), tape), message);
  CHECK_NOTHROW(gate.evaluate(random_matrix(0, 5, 2), tape));

  // The number in the pass goes before that in Config.
  const std::string of_pass =
      "moe: TopKGate: the batch has 6 rows, not a multiple of Pass.sequences = 4";
  const Matrix<double> x = random_matrix(6, 5, 2);
  CHECK_THROWS_WITH(gate.forward(x, tape, {.step = 0, .sequences = 4}), of_pass);
  CHECK_THROWS_WITH(gate.evaluate(x, tape, {.sequences = 4}), of_pass);
  CHECK_NOTHROW(gate.forward(random_matrix(7, 5, 2), tape, {.step = 0, .sequences = 7}));
  CHECK_NOTHROW(gate.evaluate(random_matrix(7, 5, 2), tape, {.sequences = 7}));
}

TEST_CASE("top-k gate: a number of sequences below 0, or that would overflow, is refused",
          "[routing][gate]") {
  const TopKGate<double> gate(everything(), 1);
  TopKTape<double> tape;
  const Matrix<double> x = random_matrix(6, 5, 2);
  const std::string message = "moe: TopKGate: Pass.sequences = -1, must be from 0 to 2147483648";
  CHECK_THROWS_WITH(gate.forward(x, tape, {.step = 0, .sequences = -1}), message);
  CHECK_THROWS_WITH(gate.evaluate(x, tape, {.sequences = -1}), message);
  CHECK_THROWS_WITH(gate.evaluate(Matrix<double>(0, 5), tape, {.sequences = Index{1} << 40}),
                    "moe: TopKGate: Pass.sequences = 1099511627776, must be from 0 to 2147483648");
}

TEST_CASE("top-k gate: rows that are no whole sequences are refused, and served without their loss",
          "[routing][gate]") {
  const TopKGate<double> gate(everything(), 1);
  TopKTape<double> tape;
  CHECK_THROWS_WITH(gate.forward(random_matrix(7, 5, 2), tape, {.step = 0}),
                    "moe: TopKGate: the batch has 7 rows, not a multiple of Config.sequences = 2");
  CHECK_NOTHROW(gate.evaluate(random_matrix(7, 5, 2), tape));
  CHECK(tape.balance.losses.sequence == 0);
  CHECK(tape.balance.losses.switch_loss > 0);
  gate.evaluate(random_matrix(6, 5, 2), tape, {.sequences = 4});
  CHECK(tape.balance.losses.sequence == 0);
  gate.evaluate(random_matrix(7, 5, 2), tape, {.sequences = 7});
  CHECK(tape.balance.losses.sequence > 0);
}

TEST_CASE("top-k gate: a batch that evaluate() refuses leaves the tape as it was",
          "[routing][gate]") {
  const TopKConfig config{
      .width = 5, .experts = 3, .top_k = 1, .evaluation_capacity = 2, .sequences = 2};
  const Matrix<double> x = random_matrix(6, 5, 2);
  const auto check = [&](auto gate) {
    typename decltype(gate)::Tape tape;
    gate.forward(x, tape, {.step = 0});
    const std::vector<double> dweight(tape.routing.weight.size(), 0.5);
    const Matrix<double> expected = test::gate_dx(gate, x, dweight, tape);
    CHECK_THROWS_WITH(gate.evaluate(random_matrix(7, 5, 3), tape),
                      Catch::Matchers::Contains("not a multiple of Config.sequences = 2"));
    REQUIRE(tape.trained);
    REQUIRE(tape.tokens.rows == 6);
    CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), expected));
  };
  check(TopKGate<double>(config, 1));
  check(SharedExpertGate<TopKGate<double>>({.width = 5, .routed = config}, 1));
}
