#include "moe/gates/hierarchical_gate.hpp"

#include <set>

#include "moe/optim/sgd.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using detail::to_size;
using namespace moe::test;
using Config = HierarchicalGate<double>::Config;

TEST_CASE("hierarchical gate: every slot is in one expert's list with its weight",
          "[routing][gate]") {
  std::uint32_t draws = 0;
  const auto random = [&](Index most) {
    return 1 + static_cast<Index>(philox({draws++, 0, 0, 0}, 5)[0]) % most;
  };
  for (int round = 0; round < 60; ++round) {
    const Index groups = random(20);
    const Index members = random(9);
    const Index top_k_groups = random(groups);
    const Index top_k = random(members);
    const Index tokens = random(40) - 1;
    HierarchicalGate<float> gate({.width = 5,
                                  .groups = groups,
                                  .group_experts = members,
                                  .top_k_groups = top_k_groups,
                                  .top_k = top_k},
                                 7);
    test::randomize(gate, static_cast<std::uint64_t>(round));
    HierarchicalGate<float>::Tape tape;
    gate.forward(random_matrix<float>(tokens, 5, static_cast<std::uint64_t>(round)), tape,
                 {.step = 0});
    const Routing<float>& routing = tape.routing;
    Dispatch<float> dispatch;
    sort_by_expert(routing, dispatch);
    REQUIRE(routing.experts == groups * members);
    REQUIRE(routing.slots() == tokens * top_k_groups * top_k);
    std::vector<int> seen(routing.expert.size(), 0);
    Index last = 0;
    for (Index e = 0; e < routing.experts; ++e) {
      const Index first = dispatch.offsets[e];
      REQUIRE(first >= last);
      last = first;
      REQUIRE(dispatch.slots_of(e) == tape.balance.tokens_per_expert[to_size(e)]);
      for (Index row = first; row < first + dispatch.slots_of(e); ++row) {
        const auto slot = to_size(dispatch.sorted_slot[row]);
        ++seen[slot];
        REQUIRE(routing.expert[slot] == e);
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    CHECK(routing.weight == tape.routing.weight);
    for (Index t = 0; t < tokens; ++t) {
      float sum = 0;
      std::set<Index> chosen;
      for (Index s = routing.token_offsets[to_size(t)]; s < routing.token_offsets[to_size(t) + 1];
           ++s) {
        sum += routing.weight[to_size(s)];
        chosen.insert(routing.expert[to_size(s)] / members);
      }
      CHECK(std::abs(sum - 1) < 1e-5f);
      CHECK(static_cast<Index>(chosen.size()) == top_k_groups);
    }
  }
}

TEMPLATE_TEST_CASE("hierarchical gate: a token's routing depends on no other token",
                   "[routing][gate]", float, double) {
  using S = TestType;
  HierarchicalGate<S> gate(
      {.width = 6, .groups = 4, .group_experts = 11, .top_k_groups = 2, .top_k = 3}, 3);
  test::randomize(gate, 2);
  const Matrix<S> x = random_matrix<S>(150, 6, 1);
  typename HierarchicalGate<S>::Tape all;
  typename HierarchicalGate<S>::Tape one;
  gate.forward(x, all, {.step = 4});
  for (const Index t : {0, 1, 77, 149}) {
    gate.forward(x.middleRows(t, 1), one,
                 {.step = 4, .first_token = static_cast<std::uint32_t>(t)});
    for (Index s = 0; s < 6; ++s) {
      CHECK(one.routing.expert[to_size(s)] == all.routing.expert[to_size(6 * t + s)]);
      CHECK(one.routing.weight[to_size(s)] == all.routing.weight[to_size(6 * t + s)]);
    }
  }
  // Another step is another noise, and each group has its own.
  gate.forward(x, one, {.step = 5});
  CHECK_FALSE(same_bits(one.primary.noise, all.primary.noise));
  std::set<S> distinct(all.secondary.noise.data(),
                       all.secondary.noise.data() + all.secondary.noise.size());
  CHECK(static_cast<Index>(distinct.size()) > all.secondary.noise.size() * 999 / 1000);
}

TEMPLATE_TEST_CASE("hierarchical gate: same bits on any number of threads", "[routing][gate]",
                   float, double) {
  using S = TestType;
  for (const Index groups : {1, 3, 40}) {
    const auto pass = [&](int count) {
      const test::Threads threads(count);
      HierarchicalGate<S> gate({.width = 40,
                                .groups = groups,
                                .group_experts = 65,
                                .top_k_groups = std::min<Index>(2, groups),
                                .top_k = 2},
                               3);
      test::randomize(gate, 2, 0.2);
      // Most tokens go to one group, which then splits its own work.
      parameter(gate, "primary.weight").value(0, 0) = 3;
      Matrix<S> x = random_matrix<S>(300, 40, 1);
      x.col(0).setOnes();
      typename HierarchicalGate<S>::Tape tape;
      gate.forward(x, tape, {.step = 4});
      const std::vector<S> dweight(to_size(tape.routing.slots()), S(0.5));
      const Matrix<S> dx = test::gate_dx<HierarchicalGate<S>>(gate, x, dweight, tape);
      test::Named all = test::gradients_of(gate);
      all["dx"] = dx.template cast<double>();
      all["load"] = tape.balance.load.template cast<double>();
      all["loss"] = Matrix<double>::Constant(1, 1, static_cast<double>(tape.balance.loss));
      all["weight"] = Matrix<double>(1, tape.routing.slots());
      for (Index s = 0; s < tape.routing.slots(); ++s) {
        all["weight"](0, s) = static_cast<double>(tape.routing.weight[to_size(s)]);
      }
      return all;
    };
    const test::Named expected = pass(1);
    for (const int threads : {2, 3, 8}) {
      INFO(groups << " groups, " << threads << " threads");
      for (const auto& [name, matrix] : pass(threads)) {
        INFO(name);
        CHECK(same_bits(matrix, expected.at(name)));
      }
    }
  }
}

TEST_CASE("hierarchical gate: one token and 131,072 experts", "[routing][gate]") {
  HierarchicalGate<float> gate(
      {.width = 2, .groups = 512, .group_experts = 256, .top_k_groups = 2, .top_k = 2}, 1);
  test::randomize(gate, 1);
  HierarchicalGate<float>::Tape tape;
  const Routing<float>& routing = gate.forward(random_matrix<float>(1, 2, 3), tape, {.step = 0});
  CHECK(gate.experts() == 131072);
  REQUIRE(routing.slots() == 4);
  CHECK(tape.secondary.clean.rows() == 2);  // of 512 groups
  CHECK(tape.balance.unused_experts() == 131068);
  test::gate_dx(gate, random_matrix<float>(1, 2, 3), std::vector<float>{1, 0, 0, -1}, tape);
  Index moved = 0;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    const bool zero = (p.gradient().array() == 0).all();
    const auto is_of = [&](Index i) {
      const std::string group = "secondary." + std::to_string(i);
      return name == group + ".weight" || name == group + ".noise_weight";
    };
    const bool sent = name.starts_with("primary") || is_of(tape.primary.routing.expert[0]) ||
                      is_of(tape.primary.routing.expert[1]);
    if (zero == sent) ++moved;
  });
  CHECK(moved == 0);
}

TEST_CASE("hierarchical gate: groups without tokens, and more experts than tokens",
          "[routing][gate]") {
  HierarchicalGate<double> gate(
      {.width = 2, .groups = 3, .group_experts = 4, .top_k_groups = 1, .top_k = 1}, 1);
  test::randomize(gate, 1);
  parameter(gate, "primary.weight").value << 30, -30, -30, 0, 0, 0;
  Matrix<double> x = random_matrix(3, 2, 3);
  x.col(0).setOnes();
  HierarchicalGate<double>::Tape tape;
  gate.forward(x, tape, {.step = 0});
  CHECK(tape.groups.slots_of(0) == 3);
  CHECK((tape.balance.load.tail(8).array() == 0).all());
  CHECK(std::abs(tape.balance.load.head(4).sum() - 3 * tape.secondary.load.head(4).sum() / 3) <
        1e-12);
  test::gate_dx(gate, x, std::vector<double>(3, 1.0), tape);
  CHECK((parameter(gate, "secondary.1.weight").gradient().array() == 0).all());
  CHECK((parameter(gate, "secondary.0.weight").gradient().array() != 0).any());
}

TEST_CASE("hierarchical gate: in evaluation there is no noise and the load is the count",
          "[routing][gate]") {
  const auto make = [](bool noise) {
    HierarchicalGate<double> gate({.width = 3,
                                   .groups = 3,
                                   .group_experts = 4,
                                   .top_k_groups = 2,
                                   .top_k = 2,
                                   .noise = noise},
                                  1);
    test::randomize(gate, 1);
    return gate;
  };
  const HierarchicalGate<double> gate = make(true);
  HierarchicalGate<double>::Tape tape;
  HierarchicalGate<double>::Tape clean;
  const Matrix<double> x = random_matrix(30, 3, 2);
  gate.forward(x, tape, {.step = 0});  // what it leaves must not matter
  const Routing<double>& routing = gate.evaluate(x, tape);
  make(false).forward(x, clean, {.step = 0});
  CHECK(routing.expert == clean.routing.expert);
  CHECK(routing.weight == clean.routing.weight);
  CHECK(same_bits(tape.balance.load, clean.balance.load));
  CHECK(tape.balance.loss == clean.balance.loss);
  for (Index e = 0; e < 12; ++e) {
    const auto count = std::count(routing.expert.begin(), routing.expert.end(), e);
    CHECK(tape.balance.load[e] == static_cast<double>(count));
  }
  CHECK(gate.evaluate(x).weight == routing.weight);
}

TEST_CASE("hierarchical gate: training starts in balance", "[routing][gate]") {
  const HierarchicalGate<float> gate(
      {.width = 3, .groups = 4, .group_experts = 4, .top_k_groups = 2, .top_k = 2}, 0);
  HierarchicalGate<float>::Tape tape;
  gate.forward(random_matrix<float>(4000, 3, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_importance() < 0.1f);
  CHECK(tape.balance.cv_load() < 0.1f);
}

TEST_CASE("hierarchical gate: parameters have their names and shapes and start at zero",
          "[routing][gate]") {
  const HierarchicalGate<float> gate(
      {.width = 3, .groups = 2, .group_experts = 5, .top_k_groups = 1, .top_k = 2}, 0);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.rows() == 3);
    CHECK(p.value.cols() == (name.starts_with("primary") ? 2 : 5));
    CHECK(p.value.cwiseAbs().maxCoeff() == 0);
    CHECK(p.gradient().cwiseAbs().maxCoeff() == 0);
  });
  CHECK(names == std::vector<std::string>{"primary.weight", "primary.noise_weight",
                                          "secondary.0.weight", "secondary.0.noise_weight",
                                          "secondary.1.weight", "secondary.1.noise_weight"});
}

TEST_CASE("hierarchical gate: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .groups = 3, .group_experts = 6, .top_k_groups = 2, .top_k = 2};
    spoil(config);
    CHECK_THROWS_AS(HierarchicalGate<double>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(HierarchicalGate<double>(config, 0),
                      "moe: HierarchicalGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.groups = 0; }, "groups = 0, must be at least 1");
  refuse([](Config& c) { c.group_experts = 0; }, "group_experts = 0, must be at least 1");
  refuse([](Config& c) { c.top_k_groups = 0; }, "top_k_groups = 0, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k_groups = 4; }, "top_k_groups = 4, must be from 1 to groups = 3");
  refuse([](Config& c) { c.top_k = 0; }, "top_k = 0, must be from 1 to group_experts = 6");
  refuse([](Config& c) { c.top_k = 7; }, "top_k = 7, must be from 1 to group_experts = 6");
  refuse([](Config& c) { c.groups = c.group_experts = Index{1} << 40; },
         "groups = 1099511627776 times group_experts = 1099511627776 are too many experts");
  refuse([](Config& c) { c.noise_floor = 0; }, "noise_floor = 0, must be finite and above 0");
  refuse([](Config& c) { c.noise_floor = std::nan(""); },
         "noise_floor = nan, must be finite and above 0");
  refuse([](Config& c) { c.importance_weight = -0.1; },
         "importance_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.load_weight = std::numeric_limits<double>::infinity(); },
         "load_weight = inf, must be finite and at least 0");
}

TEST_CASE("hierarchical gate: the tape of a gate of another shape is refused", "[routing][gate]") {
  check_foreign_tape<HierarchicalGate<double>>(
      {.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 2, .top_k = 2},
      {{.width = 3, .groups = 5, .group_experts = 3, .top_k_groups = 2, .top_k = 2},
       {.width = 3, .groups = 3, .group_experts = 6, .top_k_groups = 2, .top_k = 2},
       {.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 1, .top_k = 2},
       {.width = 3, .groups = 3, .group_experts = 5, .top_k_groups = 1, .top_k = 4}},
      "moe: HierarchicalGate::backward: the tape is another gate's, of 3 groups of 5 experts");
}

TEMPLATE_TEST_CASE("hierarchical gate: lazy updates pass by groups without tokens",
                   "[routing][gate]", float, double) {
  using S = TestType;
  for (const bool noise : {true, false}) {
    const auto train = [&](Updates updates) {
      HierarchicalGate<S> gate({.width = 4,
                                .groups = 5,
                                .group_experts = 6,
                                .top_k_groups = 2,
                                .top_k = 2,
                                .noise = noise},
                               1);
      test::randomize(gate, 1);
      typename HierarchicalGate<S>::Tape tape;
      SGD<S> optimizer({.updates = updates});
      for (std::uint64_t step = 0; step < 6; ++step) {
        zero_gradients(gate, updates);
        for (int pass = 0; pass < 2; ++pass) {
          gate.forward(random_matrix<S>(2, 4, 2 * step), tape, {.step = step});
          test::gate_dx(gate, random_matrix<S>(2, 4, 2 * step), std::vector<S>(8, S(0.5)), tape);
        }
        optimizer.update(gate, 0.1);
      }
      return gate;
    };
    HierarchicalGate<S> dense_gate = train(Updates::dense);
    HierarchicalGate<S> lazy_gate = train(Updates::lazy);
    const test::Named expected = test::values_of(dense_gate);
    for (const auto& [name, value] : test::values_of(lazy_gate)) {
      INFO(name);
      CHECK(same_bits(value, expected.at(name)));
    }
  }

  // Without noise the noise's weights of a group in use are in use too: decay moves them.
  HierarchicalGate<S> clean(
      {.width = 1, .groups = 1, .group_experts = 2, .top_k_groups = 1, .top_k = 1, .noise = false},
      0);
  parameter(clean, "secondary.0.noise_weight").value << 2, 4;
  typename HierarchicalGate<S>::Tape clean_tape;
  SGD<S> decay({.weight_decay = 0.5, .updates = Updates::lazy});
  zero_gradients(clean, Updates::lazy);
  clean.forward(Matrix<S>{{1}}, clean_tape, {.step = 0});
  test::gate_dx(clean, Matrix<S>{{1}}, std::vector<S>(1, S(1)), clean_tape);
  decay.update(clean, 0.5);
  CHECK(parameter(clean, "secondary.0.noise_weight").value == Matrix<S>{{S(1.5), S(3)}});

  // What is idle is neither moved by decay nor even zeroed.
  HierarchicalGate<S> gate(
      {.width = 1, .groups = 3, .group_experts = 4, .top_k_groups = 1, .top_k = 2}, 1);
  test::randomize(gate, 1);
  parameter(gate, "primary.weight").value << 30, 0, -30;
  typename HierarchicalGate<S>::Tape tape;
  SGD<S> optimizer({.weight_decay = 0.5, .updates = Updates::lazy});
  const test::Named before = test::values_of(gate);
  for (const S to : {S(1), S(-1)}) {
    zero_gradients(gate, Updates::lazy);
    const Matrix<S> x{{to}};
    gate.forward(x, tape, {.step = 0});
    test::gate_dx(gate, x, std::vector<S>(2, S(1)), tape);
    optimizer.update(gate, 0.1);
  }
  const test::Named after = test::values_of(gate);
  CHECK(same_bits(after.at("secondary.1.weight"), before.at("secondary.1.weight")));
  CHECK_FALSE(same_bits(after.at("secondary.0.weight"), before.at("secondary.0.weight")));
  CHECK_FALSE(same_bits(after.at("secondary.2.weight"), before.at("secondary.2.weight")));
  // The first step's gradient stands for zero, and its memory is not written to until it is read.
  Index cleared = 0;
  detail::walk_parameters(gate, [&](const ParameterName&, const Parameter<S>& p) {
    if (p.stored.state != detail::GradientState::stale) return;
    ++cleared;
    CHECK((p.stored.memory.array() != 0).any());
    CHECK((p.gradient().array() == 0).all());
  });
  CHECK(cleared == 2);
  CHECK((parameter(gate, "secondary.0.weight").gradient().array() == 0).all());
}
