#include "moe/gates/top_k_gate.hpp"

#include <set>

#include "../allocation.hpp"
#include "../naive_layer.hpp"
#include "../routing/shared_batch.hpp"
#include "token_choice_checks.hpp"
#include "top_k.hpp"

using namespace moe;
using namespace moe::test;

TEMPLATE_TEST_CASE(
    "top-k gate: the same bits on any number of threads, over more experts than a block",
    "[routing][gate]", float, double) {
  for (const Score score : all_scores) {
    TopKConfig config = everything(score);
    config.experts = 1200;
    test::check_threads<TopKGate<TestType>>(config, 300);
  }
}

TEST_CASE("top-k gate: jitter and second choices replay by their key", "[routing][gate]") {
  const Matrix<double> x = random_matrix(40, 5, 1);
  const auto run = [&](std::uint64_t seed, const Pass& key, const Matrix<double>& rows) {
    TopKGate<double> gate({.width = 5,
                           .experts = 6,
                           .top_k = 2,
                           .renormalise = true,
                           .jitter = 0.25,
                           .random_second = true},
                          seed);
    fill_normal(parameter(gate, "weight").value, 0.8, 1);
    TopKTape<double> tape;
    gate.forward(rows, tape, key);
    return tape;
  };
  const auto first = run(1, {.step = 4}, x);
  CHECK(first.jitter.minCoeff() >= 0.75);
  CHECK(first.jitter.maxCoeff() < 1.25);
  CHECK(first.jitter.minCoeff() < 0.8);
  CHECK(first.jitter.maxCoeff() > 1.2);
  const std::set<double> distinct(first.jitter.data(), first.jitter.data() + 200);
  CHECK(distinct.size() == 200);
  CHECK(std::count(first.choices.keeps.begin(), first.choices.keeps.end(), 0) > 5);

  const auto again = run(1, {.step = 4}, x);
  CHECK(same_bits(again.jitter, first.jitter));
  CHECK(again.choices.keeps == first.choices.keeps);
  const auto part = run(1, {.step = 4, .first_token = 10}, x.bottomRows(30));
  CHECK(same_bits(part.jitter, first.jitter.bottomRows(30)));
  CHECK(std::equal(part.choices.keeps.begin(), part.choices.keeps.end(),
                   first.choices.keeps.begin() + 20));
  for (const auto& other : {run(1, {.step = 5}, x), run(2, {.step = 4}, x)}) {
    CHECK_FALSE(same_bits(other.jitter, first.jitter));
    CHECK(other.choices.keeps != first.choices.keeps);
  }
}

TEST_CASE("top-k gate: a second choice is kept as often as twice its weight", "[routing][gate]") {
  TopKGate<double> gate(
      {.width = 1, .experts = 3, .top_k = 2, .renormalise = true, .random_second = true}, 3);
  parameter(gate, "weight").value << std::log(4.0), 0, -9;  // weights 4/5 and 1/5
  TopKTape<double> tape;
  gate.forward(Matrix<double>::Ones(20000, 1), tape, {.step = 0});
  Index kept = 0;
  for (Index t = 0; t < 20000; ++t) {
    CHECK(tape.choices.keeps[detail::to_size(2 * t)] == 1);
    kept += tape.choices.keeps[detail::to_size(2 * t + 1)];
  }
  CHECK(std::abs(static_cast<double>(kept) / 20000 - 0.4) < 0.014);  // four deviations
  gate.evaluate(Matrix<double>::Ones(20, 1), tape);
  CHECK(tape.routing.slots() == 40);
}

TEST_CASE("top-k gate: a second choice is drawn as often as the softmax of the others says",
          "[routing][gate]") {
  TopKGate<double> gate({.width = 1, .experts = 4, .top_k = 2, .drawn_second = true}, 3);
  parameter(gate, "weight").value << 0, std::log(8.0), std::log(2.0), 0;  // 1 : 8 : 2 : 1
  TopKTape<double> tape;
  const Matrix<double> ones = Matrix<double>::Ones(20000, 1);
  const auto& routing = gate.forward(ones, tape, {.step = 0});
  double drawn[4] = {};
  for (Index t = 0; t < 20000; ++t) {
    CHECK(tape.choices.expert[2 * t] == 1);
    drawn[tape.choices.expert[2 * t + 1]] += 1.0 / 20000;
  }
  const double expected[] = {0.25, 0, 0.5, 0.25};
  for (std::size_t e = 0; e < 4; ++e) CHECK(std::abs(drawn[e] - expected[e]) < 0.014);
  // The weights are those of the softmax over all, whatever was drawn.
  const double of_expert[] = {1 / 12.0, 8 / 12.0, 2 / 12.0, 1 / 12.0};
  for (std::size_t s = 0; s < 40; ++s) {
    CHECK_THAT(routing.weight[s], Catch::Matchers::WithinRel(of_expert[routing.expert[s]], 1e-12));
  }
  // By row, step and seed; evaluation takes the two largest.
  TopKTape<double> other;
  gate.forward(ones.topRows(9000), other, {.step = 0, .first_token = 11000});
  CHECK(std::equal(other.choices.expert.begin(), other.choices.expert.end(),
                   tape.choices.expert.begin() + 22000));
  gate.forward(ones, other, {.step = 1});
  CHECK(other.choices.expert != tape.choices.expert);
  gate.evaluate(ones, other);
  for (Index t = 0; t < 20000; ++t) CHECK(other.choices.expert[2 * t + 1] == 2);
}

TEST_CASE("top-k gate: a second choice drawn with given noise, worked by hand", "[routing][gate]") {
  // Logits 3, 1, 0.5, 0 and Gumbel deviates 9, 0, 1, 2: without expert 0 the largest sum is 2 of expert 3.
  TopKConfig config{
      .width = 1, .experts = 4, .top_k = 2, .renormalise = true, .drawn_second = true};
  TopKTape<double> tape;
  const auto chosen = [&](const std::vector<double>& noise, double x = 1) {
    TopKGate<double> gate(config, 0);
    CHECK(gate.noise_columns() == static_cast<Index>(noise.size()));
    parameter(gate, "weight").value << 3, 1, 0.5, 0;
    gate.forward(Matrix<double>::Constant(1, 1, x), tape, {.step = 0, .noise = noise});
    return Indices(tape.choices.expert.begin(), tape.choices.expert.end());
  };
  CHECK(chosen({9, 0, 1, 2}) == Indices{0, 3});
  CHECK_THAT(tape.choices.weight[0], Catch::Matchers::WithinRel(1 / (1 + std::exp(-3.0)), 1e-14));
  CHECK_THAT(tape.choices.weight[1], Catch::Matchers::WithinRel(1 / (1 + std::exp(3.0)), 1e-14));
  CHECK(chosen({0, 0, 0.5, 0}) == Indices{0, 1});  // a tie goes to the lower expert
  CHECK(chosen({9, 0, 1, 2}, std::nan("")) == Indices{0, 1});
  // Groups {0, 1} and {2, 3}: an expert outside of the chosen group is not drawn.
  config.groups = 2;
  CHECK(chosen({9, 0, 1, 2}) == Indices{0, 1});
  // Between the deviates of the jitter and the number that decides whether the choice stays.
  config.groups = 1;
  config.jitter = 0.1;
  config.random_second = true;
  CHECK(chosen({0, 9, 0, 1, 2, 0}) == Indices{0, 3});
  CHECK(tape.choices.keeps[1] == 1);
  CHECK(chosen({0, 9, 0, 1, 2, 0.999}) == Indices{0, 3});
  CHECK(tape.choices.keeps[1] == 0);
}

TEST_CASE("top-k gate: a capacity in tokens of a sequence, in training and in evaluation",
          "[routing][gate]") {
  // Rows of two sequences, of which all tokens choose expert 0.
  TopKConfig config{.width = 1,
                    .experts = 2,
                    .top_k = 1,
                    .capacity = 1,
                    .evaluation_capacity = 2,
                    .sequences = 2,
                    .row_order = RowOrder::sequence_major};
  TopKGate<double> gate(config, 0);
  parameter(gate, "weight").value << 1, 0;
  const Matrix<double> x = Matrix<double>::Ones(6, 1);
  TopKTape<double> tape;
  CHECK(gate.forward(x, tape, {.step = 0}).token_offsets == Indices{0, 1, 1, 1, 2, 2, 2});
  CHECK(gate.evaluate(x, tape).token_offsets == Indices{0, 1, 2, 2, 3, 4, 4});
  CHECK(tape.balance.load[0] == 6);
  CHECK(tape.balance.tokens_per_expert[0] == 4);
  config.row_order = RowOrder::time_major;
  config.capacity = 0;
  TopKGate<double> by_time(config, 0);
  parameter(by_time, "weight").value << 1, 0;
  CHECK(by_time.forward(x, tape, {.step = 0}).slots() == 6);
  CHECK(by_time.evaluate(x, tape).token_offsets == Indices{0, 1, 2, 3, 4, 4, 4});
}

TEST_CASE("top-k gate: a pass says how many sequences its batch has", "[routing][gate]") {
  TopKConfig config{.width = 1,
                    .experts = 2,
                    .top_k = 1,
                    .capacity = 1,
                    .evaluation_capacity = 2,
                    .row_order = RowOrder::sequence_major};
  TopKGate<double> gate(config, 0);
  parameter(gate, "weight").value << 1, 0;
  const Matrix<double> x = Matrix<double>::Ones(6, 1);
  TopKTape<double> tape;
  CHECK(gate.forward(x, tape, {.step = 0}).token_offsets == Indices{0, 1, 1, 1, 1, 1, 1});
  CHECK(gate.forward(x, tape, {.step = 0, .sequences = 2}).token_offsets ==
        Indices{0, 1, 1, 1, 2, 2, 2});
  CHECK(gate.forward(x, tape, {.step = 0, .sequences = 3}).token_offsets ==
        Indices{0, 1, 1, 2, 2, 3, 3});
  CHECK(gate.evaluate(x, tape, {.sequences = 2}).token_offsets == Indices{0, 1, 2, 2, 3, 4, 4});
  CHECK(gate.evaluate(x, tape).token_offsets == Indices{0, 1, 2, 2, 2, 2, 2});
  config.row_order = RowOrder::time_major;
  TopKGate<double> by_time(config, 0);
  parameter(by_time, "weight").value << 1, 0;
  CHECK(by_time.forward(x, tape, {.step = 0, .sequences = 3}).token_offsets ==
        Indices{0, 1, 2, 3, 3, 3, 3});
  // One sequence is a number too.
  config.sequences = 2;
  TopKGate<double> of_two(config, 0);
  parameter(of_two, "weight").value << 1, 0;
  CHECK(of_two.forward(x, tape, {.step = 0}).slots() == 2);
  CHECK(of_two.forward(x, tape, {.step = 0, .sequences = 1}).slots() == 1);
}

TEST_CASE("top-k gate: the number of sequences in a pass does what that in Config does",
          "[routing][gate]") {
  TopKConfig config = everything();
  config.capacity_factor = 0;
  config.capacity = 1;
  config.evaluation_capacity = 2;
  config.sequences = 3;
  const Matrix<double> x = random_matrix(12, 5, 2);
  TopKGate<double> expected(config, 1);
  TopKTape<double> expected_tape;
  expected.forward(x, expected_tape, {.step = 4});
  const std::vector<double> dweight(expected_tape.routing.weight.size(), 0.5);
  const Matrix<double> dx = test::gate_dx(expected, x, dweight, expected_tape);
  for (const Index other : {1, 2}) {
    config.sequences = other;
    TopKGate<double> gate(config, 1);
    TopKTape<double> tape;
    gate.forward(x, tape, {.step = 4, .sequences = 3});
    CHECK(tape.routing.expert == expected_tape.routing.expert);
    CHECK(tape.routing.token_offsets == expected_tape.routing.token_offsets);
    CHECK(tape.balance.losses.sequence == expected_tape.balance.losses.sequence);
    CHECK(same_bits(test::gate_dx(gate, x, dweight, tape), dx));
    CHECK(
        same_bits(parameter(gate, "weight").gradient(), parameter(expected, "weight").gradient()));
    // What the other number gives is something else.
    TopKTape<double> otherwise;
    gate.forward(x, otherwise, {.step = 4});
    CHECK(otherwise.balance.losses.sequence != tape.balance.losses.sequence);
    CHECK(otherwise.routing.slots() != tape.routing.slots());

    TopKTape<double> served;
    expected.evaluate(x, served);
    gate.evaluate(x, tape, {.sequences = 3});
    CHECK(tape.routing.token_offsets == served.routing.token_offsets);
    CHECK(tape.balance.losses.sequence == served.balance.losses.sequence);
  }
}

TEST_CASE("top-k gate: evaluation sees training without jitter, drops and capacity",
          "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  TopKConfig plain_config = everything();
  plain_config.jitter = 0;
  plain_config.random_second = false;
  plain_config.capacity_factor = 0;
  TopKGate<double> plain(plain_config, 1);
  const Matrix<double> x = random_matrix(30, 5, 2);
  TopKTape<double> served;
  TopKTape<double> trained;
  gate.evaluate(x, served);
  plain.forward(x, trained, {.step = 0});
  CHECK(served.routing.expert == trained.routing.expert);
  CHECK(served.routing.weight == trained.routing.weight);
  CHECK(served.balance.loss == trained.balance.loss);
  CHECK(served.routing.slots() == 60);
  CHECK(gate.evaluate(x).weight == served.routing.weight);

  plain_config.evaluation_capacity_factor = 0.5;
  const TopKGate<double> limited(plain_config, 1);
  limited.evaluate(x, served);
  for (const Index tokens : served.balance.tokens_per_expert) CHECK(tokens <= 3);  // 0.5·60/12
  limited.forward(x, trained, {.step = 0});
  CHECK(trained.routing.slots() == 60);
}

TEST_CASE("top-k gate: load counts what was chosen, tokens what was kept", "[routing][gate]") {
  TopKGate<double> gate(everything(), 1);
  TopKTape<double> tape;
  const Routing<double>& routing = gate.forward(random_matrix(60, 5, 2), tape, {.step = 0});
  CHECK(tape.balance.load.sum() == 120);
  Index kept = 0;
  for (Index e = 0; e < 12; ++e) {
    const auto chosen = std::count(tape.choices.expert.begin(), tape.choices.expert.end(), e);
    const auto slots = std::count(routing.expert.begin(), routing.expert.end(), e);
    CHECK(tape.balance.load[e] == static_cast<double>(chosen));
    CHECK(tape.balance.tokens_per_expert[detail::to_size(e)] == slots);
    CHECK(slots <= 10);  // 1·120/12
    kept += slots;
  }
  CHECK(kept == routing.slots());
  CHECK(kept < 120);
}

TEMPLATE_TEST_CASE("top-k gate: ties go to the lower expert and group", "[routing][gate]", float,
                   double) {
  for (const Score score : all_scores) {
    TopKGate<TestType> gate({.width = 2,
                             .experts = 6,
                             .top_k = 2,
                             .score = score,
                             .groups = 3,
                             .top_k_groups = 2,
                             .init_stddev = 0},
                            0);
    CHECK(gate.evaluate(random_matrix<TestType>(2, 2, 1)).expert == Indices{0, 1, 0, 1});
  }
}

TEST_CASE("top-k gate: W_g starts with small deviates of the seed", "[routing][gate]") {
  TopKGate<float> gate({.width = 100, .experts = 50, .top_k = 2}, 1);
  TopKGate<float> other({.width = 100, .experts = 50, .top_k = 2}, 2);
  const Matrix<float>& w = parameter(gate, "weight").value;
  CHECK(std::abs(w.mean()) < 0.002f);
  CHECK(std::abs(std::sqrt(w.squaredNorm() / 5000) - 0.02f) < 0.001f);
  CHECK_FALSE(same_bits(w, parameter(other, "weight").value));
  TopKTape<float> tape;
  gate.forward(random_matrix<float>(4000, 100, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_load() < 0.4f);
}

TEST_CASE("top-k gate: slots are grouped, ascending and weighed as chosen", "[routing][gate]") {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    const auto words = philox({1, 2, 3, 4}, seed);
    const Index groups = 1 + words[0] % 4;
    TopKConfig config = everything(all_scores[seed / 2 % std::size(all_scores)]);
    config.groups = groups;
    config.top_k_groups = 1 + words[1] % static_cast<std::uint32_t>(groups);
    config.experts = groups * (2 + words[2] % 5);
    config.place_order = static_cast<PlaceOrder>(seed % 4);
    config.capacity_factor = seed % 2 == 0 ? 0.9 : 0;
    const Index tokens = 2 * (words[3] % 20);
    TopKGate<double> gate(config, seed);
    TopKTape<double> tape;
    gate.forward(random_matrix(tokens, 5, seed), tape, {.step = 0});
    const Routing<double>& routing = tape.routing;
    Dispatch<double> dispatch;
    sort_by_expert(routing, dispatch);
    std::vector<int> seen(routing.expert.size(), 0);
    for (Index e = 0; e < config.experts; ++e) {
      CHECK(dispatch.offsets[e] <= dispatch.offsets[e + 1]);
      for (Index row = dispatch.offsets[e]; row < dispatch.offsets[e + 1]; ++row) {
        const auto slot = detail::to_size(dispatch.sorted_slot[row]);
        CHECK(routing.expert[slot] == e);
        ++seen[slot];
      }
    }
    CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 1; }));
    std::size_t kept = 0;
    for (Index c = 0; c < tape.choices.size(); ++c) {
      const auto i = detail::to_size(c);
      if (tape.choices.keeps[i] == 0) continue;
      ++kept;
      const Index slot = tape.choices.slot[i];
      CHECK(routing.expert[detail::to_size(slot)] == tape.choices.expert[i]);
      CHECK(routing.weight[detail::to_size(slot)] == 2.5 * tape.choices.weight[i]);
      CHECK(routing.token_offsets[detail::to_size(c / 2)] <= slot);
      CHECK(slot < routing.token_offsets[detail::to_size(c / 2) + 1]);
    }
    CHECK(kept == routing.expert.size());
    for (Index t = 0; t < tokens; ++t) {
      const double sum = tape.choices.weight[detail::to_size(2 * t)] +
                         tape.choices.weight[detail::to_size(2 * t + 1)];
      CHECK_THAT(sum, Catch::Matchers::WithinAbs(1, 1e-12));
      std::set<Index> used;
      for (Index k = 0; k < 2; ++k) {
        used.insert(tape.choices.expert[detail::to_size(2 * t + k)] / (config.experts / groups));
      }
      CHECK(static_cast<Index>(used.size()) <= config.top_k_groups);
    }
  }
}

TEMPLATE_TEST_CASE("top-k gate: takes no memory after its first call",
                   "[routing][gate][allocation]", float, double) {
  using S = TestType;
  for (const int threads : {1, 3}) {
    const test::Threads fixed(threads);
    TopKGate<S> gate(everything(), 1);
    TopKTape<S> training;
    TopKTape<S> serving;
    const Matrix<S> x = random_matrix<S>(300, 5, 1);
    const Matrix<S> same = random_matrix<S>(1, 5, 1).replicate(300, 1);
    const std::vector<S> dweight(600, S{1});
    Matrix<S> dx(300, 5);
    const auto pass = [&](const Matrix<S>& rows, std::uint64_t step) {
      gate.forward(rows, training, {.step = step});
      dx.setZero();
      gate.backward(rows, std::span<const S>(dweight.data(), training.routing.weight.size()),
                    training, dx);
      gate.update_selection_bias(training);
      gate.evaluate(rows, serving);
    };
    pass(same, 0);
    CHECK(test::allocations_in([&] {
            for (std::uint64_t step = 1; step < 6; ++step) pass(step % 2 == 0 ? same : x, step);
          }) == 0);
  }
}

TEST_CASE("top-k gate: parameters have their names and shapes", "[routing][gate]") {
  const auto names_of = [](const TopKGate<float>& gate) {
    std::vector<std::string> names;
    for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
      names.push_back(name);
      CHECK(p.value.rows() == (name == "weight" ? 3 : 1));
      CHECK(p.value.cols() == 5);
      CHECK(p.trained == (name == "weight"));
    });
    return names;
  };
  CHECK(names_of(TopKGate<float>({.width = 3, .experts = 5, .top_k = 2}, 0)) ==
        std::vector<std::string>{"weight"});
  CHECK(names_of(TopKGate<float>({.width = 3, .experts = 5, .top_k = 2, .selection_bias = true},
                                 0)) == std::vector<std::string>{"weight", "selection_bias"});
}

TEST_CASE("top-k gate: a weight that is left of a softmax of the chosen is 1, whatever was dropped",
          "[routing][gate]") {
  // Both tokens choose expert 0 by a logit of 2000, beside which nothing is left of the second choice.
  // The second token finds no place there.
  TopKGate<double> gate({.width = 2,
                         .experts = 3,
                         .top_k = 2,
                         .score = Score::softmax_of_chosen,
                         .renormalise_after_drops = true,
                         .capacity_factor = 0.75,
                         .place_order = PlaceOrder::first_choices},
                        0);
  parameter(gate, "weight").value << 2000, 0, -1, 0, 0, 2;
  TopKTape<double> tape;
  const Routing<double>& routing = gate.forward(Matrix<double>{{1, 0}, {1, 1}}, tape, {.step = 0});
  CHECK(routing.token_offsets == Indices{0, 2, 3});
  CHECK(routing.expert == Indices{0, 1, 2});
  CHECK(routing.weight == std::vector<double>{1, 0, 1});
}

TEST_CASE("top-k gate: it is the shared batch's rows that must be whole sequences",
          "[routing][gate]") {
  const TopKGate<double> gate({.width = 1,
                               .experts = 2,
                               .top_k = 1,
                               .capacity = 2,
                               .evaluation_capacity = 2,
                               .sequences = 3},
                              0);
  const test::FirstProcess batch(1, 4);
  TopKTape<double> tape;
  // The rows of this process are.
  const Matrix<double> x = Matrix<double>::Ones(3, 1);
  const std::string message =
      "moe: TopKGate: the batch has 4 rows, not a multiple of Config.sequences = 3";
  CHECK_THROWS_WITH(gate.forward(x, tape, {.step = 0, .batch = &batch}), message);
  CHECK_THROWS_WITH(gate.evaluate(x, tape, {.batch = &batch}), message);
}

TEST_CASE("top-k gate: the best tokens' places are refused in a shared batch", "[routing][gate]") {
  const TopKConfig config{.width = 1,
                          .experts = 2,
                          .top_k = 1,
                          .capacity_factor = 1,
                          .place_order = PlaceOrder::best_tokens};
  const TopKGate<double> gate(config, 0);
  const std::string message =
      "moe: PlaceOrder::best_tokens: not possible in a batch that several processes share; use "
      "first_choices or largest_weight";
  CHECK_THROWS_WITH(gate.shared_calls(true, 4, 0), message);
  const test::FirstProcess batch(1, 4);
  TopKTape<double> tape;
  gate.forward(Matrix<double>::Ones(4, 1), tape, {.step = 0});
  CHECK_THROWS_WITH(gate.forward(Matrix<double>::Ones(4, 1), tape, {.step = 0, .batch = &batch}),
                    message);
  CHECK(tape.trained);  // backward() still works on the pass before
  CHECK_NOTHROW(gate.evaluate(Matrix<double>::Ones(4, 1), tape, {.batch = &batch}));  // no limit
}
