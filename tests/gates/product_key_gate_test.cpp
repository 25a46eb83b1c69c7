#include "moe/gates/product_key_gate.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "law_runs.hpp"
#include "naive_scores.hpp"
#include "token_choice_checks.hpp"

using namespace moe;
using detail::to_size;
using namespace moe::test;
using Config = ProductKeyGate<double>::Config;

namespace {

/// The gate a number at a time, with the scores of all E experts.
struct Naive {
  Matrix<double> weight;  ///< T x E, 0 where not chosen
  Vector<double> importance, load;
  double loss = 0;

  Naive(ProductKeyGate<double>& gate, std::uint64_t seed, const Matrix<double>& x,
        const Pass& key) {
    const Config c = gate.config();
    const Named p = values_of(gate);
    const auto row = [&](const std::string& name, std::uint64_t stream, Index t) {
      return NaiveScores(p.at(name + ".weight"), p.at(name + ".noise_weight"),
                         derive_seed(seed, stream), c.noise, c.noise_floor, x, t, key);
    };
    const Index experts = c.row_keys * c.column_keys;
    const Index row_choices = std::min(c.top_k, c.row_keys);
    const Index column_choices = std::min(c.top_k, c.column_keys);
    weight.setZero(x.rows(), experts);
    load.setZero(experts);
    Vector<double> row_load = Vector<double>::Zero(c.row_keys);
    Vector<double> column_load = Vector<double>::Zero(c.column_keys);
    for (Index t = 0; t < x.rows(); ++t) {
      const NaiveScores u = row("rows", 0, t);
      const NaiveScores v = row("columns", 1, t);
      std::vector<std::pair<double, Index>> h;
      for (Index i = 0; i < c.row_keys; ++i) {
        for (Index j = 0; j < c.column_keys; ++j) {
          h.emplace_back(u.h[to_size(i)] + v.h[to_size(j)], i * c.column_keys + j);
        }
      }
      std::sort(h.begin(), h.end(), std::greater<>());
      double total = 0;
      for (Index k = 0; k < c.top_k; ++k) total += std::exp(h[to_size(k)].first);
      for (Index k = 0; k < c.top_k; ++k) {
        const auto& [score, expert] = h[to_size(k)];
        weight(t, expert) = std::exp(score) / total;
        load[expert] += 1;
      }
      for (Index i = 0; i < c.row_keys; ++i) row_load[i] += u.probability(row_choices, i);
      for (Index j = 0; j < c.column_keys; ++j) {
        column_load[j] += v.probability(column_choices, j);
      }
    }
    importance = weight.colwise().sum().transpose();
    const double load_cv =
        c.noise ? (1 + naive_cv_squared(row_load)) * (1 + naive_cv_squared(column_load)) - 1
                : naive_cv_squared(load);
    loss = c.importance_weight * naive_cv_squared(importance) + c.load_weight * load_cv;
  }
};

/// The K best pairs of keys, by all of them: the larger h, then the larger u, then the larger v, of equal
/// keys the lower; NaN counts as -infinity.
Indices best_pairs(const std::vector<double>& u, const std::vector<double>& v, Index top_k) {
  const auto key = [](double score) {
    return std::isnan(score) ? -std::numeric_limits<double>::infinity() : score;
  };
  const auto ranks = [&](const std::vector<double>& scores) {
    std::vector<std::size_t> order(scores.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t i, std::size_t j) { return key(scores[i]) > key(scores[j]); });
    std::vector<std::size_t> rank(scores.size());
    for (std::size_t r = 0; r < order.size(); ++r) rank[order[r]] = r;
    return rank;
  };
  const auto row_rank = ranks(u);
  const auto column_rank = ranks(v);
  std::vector<std::tuple<double, std::size_t, std::size_t, Index>> pairs;
  for (std::size_t i = 0; i < u.size(); ++i) {
    for (std::size_t j = 0; j < v.size(); ++j) {
      pairs.emplace_back(-key(u[i] + v[j]), row_rank[i], column_rank[j],
                         static_cast<Index>(i * v.size() + j));
    }
  }
  std::sort(pairs.begin(), pairs.end());
  Indices experts;
  for (Index k = 0; k < top_k; ++k) experts.push_back(std::get<3>(pairs[to_size(k)]));
  std::sort(experts.begin(), experts.end());
  return experts;
}

/// Shapes in which the choice takes all keys of a kind, or all experts, or one.
template <Index rows, Index columns, Index top_k_, bool noise = true>
struct Shape : ProductKeyLaw<double> {
  static Config config() {
    return {.width = 5,
            .row_keys = rows,
            .column_keys = columns,
            .top_k = top_k_,
            .noise = noise,
            .importance_weight = 0.7,
            .load_weight = 1.3};
  }
};

}  // namespace

TEST_CASE("product keys: what the formulas say of all experts", "[routing][gate]") {
  std::uint64_t seed = 1;
  for (const bool noise : {true, false}) {
    for (const Index rows : {1, 2, 5, 17}) {
      for (const Index columns : {1, 3, 8, 19}) {
        for (const Index top_k : {1, 2, 3, 7, 9, 16, 40}) {
          if (top_k > rows * columns) continue;
          for (const Index tokens : {1, 23}) {
            INFO("a " << rows << ", b " << columns << ", K " << top_k << ", " << tokens
                      << " tokens, noise " << noise);
            ProductKeyGate<double> gate({.width = 3,
                                         .row_keys = rows,
                                         .column_keys = columns,
                                         .top_k = top_k,
                                         .noise = noise,
                                         .noise_floor = 0.05,
                                         .importance_weight = 0.7,
                                         .load_weight = 1.3},
                                        ++seed);
            randomize(gate, seed);
            const Matrix<double> x = random_matrix(tokens, 3, seed);
            const Pass key{.step = (std::uint64_t{1} << 33) + 2, .first_token = 9};
            ProductKeyGate<double>::Tape tape;
            const Routing<double>& routing = gate.forward(x, tape, key);
            const Naive naive(gate, seed, x, key);
            REQUIRE(routing.slots() == tokens * top_k);
            CHECK(relative_error(dense_weights(routing), naive.weight) < 1e-13);
            CHECK(relative_error(tape.balance.importance, naive.importance) < 1e-13);
            CHECK(relative_error(tape.balance.load, naive.load) < 1e-12);
            CHECK(std::abs(tape.balance.loss - naive.loss) < 1e-12 * std::max(1.0, naive.loss));
          }
        }
      }
    }
  }
}

TEMPLATE_TEST_CASE("product keys: a token of two by two keys worked by hand", "[routing][gate]",
                   float, double) {
  using S = TestType;
  ProductKeyGate<S> gate({.width = 1,
                          .row_keys = 2,
                          .column_keys = 2,
                          .top_k = 2,
                          .noise = false,
                          .importance_weight = 0,
                          .load_weight = 1},
                         0);
  // e^h = 6, 3, 2 and 1 for (0, 0), (0, 1), (1, 0) and (1, 1).
  parameter(gate, "rows.weight").value << static_cast<S>(std::log(3.0)), 0;
  parameter(gate, "columns.weight").value << static_cast<S>(std::log(2.0)), 0;
  typename ProductKeyGate<S>::Tape tape;
  const Routing<S>& routing = gate.forward(Matrix<S>{{1}}, tape, {.step = 0});
  const double tolerance = sizeof(S) == 4 ? 1e-6 : 1e-9;
  const auto near = [&](double value) { return Catch::Matchers::WithinAbs(value, tolerance); };
  CHECK(routing.expert == Indices{0, 1});
  CHECK_THAT(static_cast<double>(routing.weight[to_size(0)]), near(2.0 / 3));
  CHECK_THAT(static_cast<double>(routing.weight[to_size(1)]), near(1.0 / 3));
  // Loads 1, 1, 0 and 0 have a CV² of 1.
  CHECK_THAT(static_cast<double>(tape.balance.loss), near(1));
  // Of dL/dG = (1, 0), dh = (2/3·(1 − 2/3), 1/3·(0 − 2/3)); the row key is that of both.
  const Matrix<S> dx = gate_dx(gate, Matrix<S>{{1}}, std::vector<S>{1, 0}, tape);
  const auto check = [&](const char* name, double first) {
    const Matrix<S>& gradient = parameter(gate, name).gradient();
    CHECK_THAT(static_cast<double>(gradient(0, 0)), near(first));
    CHECK_THAT(static_cast<double>(gradient(0, 1)), near(-first));
  };
  check("columns.weight", 2.0 / 9);
  CHECK_THAT(static_cast<double>(parameter(gate, "rows.weight").gradient()(0, 0)), near(0));
  CHECK(parameter(gate, "rows.weight").gradient()(0, 1) == 0);
  CHECK_THAT(static_cast<double>(dx(0, 0)), near(2.0 / 9 * std::log(2.0)));
}

TEMPLATE_TEST_CASE("product keys: gradients agree with differences in every shape",
                   "[routing][gate]", (Shape<2, 4, 3>), (Shape<4, 2, 3>), (Shape<2, 2, 4>),
                   (Shape<1, 6, 2>), (Shape<6, 1, 2>), (Shape<3, 3, 1>), (Shape<3, 4, 2, false>)) {
  check_gradients<TestType>({.step = 3, .first_token = 5});
}

TEST_CASE("product keys: ties go to the better row key, then to the better column key",
          "[routing][gate]") {
  ProductKeyGate<double> gate(
      {.width = 1, .row_keys = 4, .column_keys = 5, .top_k = 3, .noise = false}, 0);
  const auto chosen = [&] {
    ProductKeyGate<double>::Tape tape;
    const auto& expert = gate.evaluate(Matrix<double>{{1}}, tape).expert;
    return Indices(expert.begin(), expert.end());
  };
  CHECK(chosen() == Indices{0, 1, 2});
  // Row key 2 is ahead of all and column keys 1 and 4 ahead of the others: 11 and 14 have 2; 10, 12
  // and 13, and the pairs of 1 and 4 with the other rows, have 1, of which row 2 has the better u.
  parameter(gate, "rows.weight").value << 0, 0, 1, 0;
  parameter(gate, "columns.weight").value << 0, 1, 0, 0, 1;
  CHECK(chosen() == Indices{10, 11, 14});
}

TEST_CASE("product keys: the pairs are the best of all, with ties, NaN and infinities",
          "[routing][gate]") {
  const double infinity = std::numeric_limits<double>::infinity();
  const double values[] = {-1, 0, 0, 1, 1, 2, std::nan(""), infinity, -infinity};
  std::uint32_t dice = 0;
  const auto draw = [&](Index count, std::uint32_t kinds) {
    std::vector<double> scores;
    for (Index i = 0; i < count; ++i)
      scores.push_back(values[philox({++dice, 0, 0, 0}, 3)[0] % kinds]);
    return scores;
  };
  for (int round = 0; round < 300; ++round) {
    // In half of the rounds numbers alone.
    const std::uint32_t kinds = round % 2 == 0 ? 6 : 9;
    const std::vector<double> u = draw(1 + round % 7, kinds);
    const std::vector<double> v = draw(1 + round % 5, kinds);
    const auto experts = static_cast<Index>(u.size() * v.size());
    const Index top_k = 1 + round % experts;
    ProductKeyGate<double> gate({.width = 1,
                                 .row_keys = static_cast<Index>(u.size()),
                                 .column_keys = static_cast<Index>(v.size()),
                                 .top_k = top_k,
                                 .noise = false},
                                0);
    std::copy(u.begin(), u.end(), parameter(gate, "rows.weight").value.data());
    std::copy(v.begin(), v.end(), parameter(gate, "columns.weight").value.data());
    ProductKeyGate<double>::Tape tape;
    const auto& chosen = gate.evaluate(Matrix<double>{{1}}, tape).expert;
    INFO("round " << round);
    CHECK(Indices(chosen.begin(), chosen.end()) == best_pairs(u, v, top_k));
  }
}

TEST_CASE("product keys: the same bits on any number of threads", "[routing][gate]") {
  const Matrix<float> x = random_matrix<float>(3000, 6, 1);
  ProductKeyGate<float> gate({.width = 6, .row_keys = 40, .column_keys = 50, .top_k = 16}, 2);
  randomize(gate, 3);
  struct Result {
    Routing<float> routing;
    Matrix<float> dx;
    Named gradients;
  };
  ProductKeyGate<float>::Tape tape;  // that of all passes, so its scratch grows
  const auto pass = [&](int threads) {
    const Threads scope(threads);
    auto copy = gate;
    copy.forward(x, tape, {.step = 1});
    const std::vector<float> dweight(tape.routing.weight.begin(), tape.routing.weight.end());
    Matrix<float> dx = gate_dx(copy, x, std::span<const float>(dweight), tape);
    return Result{tape.routing, std::move(dx), gradients_of(copy)};
  };
  const Result expected = pass(1);
  for (const int threads : {3, 2, 8}) {
    INFO(threads << " threads");
    const Result actual = pass(threads);
    CHECK(same_routing(actual.routing, expected.routing));
    CHECK(same_bits(actual.dx, expected.dx));
    CHECK(same_bits(actual.gradients, expected.gradients));
  }
}

TEST_CASE("product keys: a gate that has collapsed shows it", "[routing][gate]") {
  // All candidates take part, so the load of the keys says nothing.
  ProductKeyGate<double> gate({.width = 1, .row_keys = 2, .column_keys = 2, .top_k = 2}, 3);
  parameter(gate, "rows.weight").value << 50, -50;
  ProductKeyGate<double>::Tape tape;
  gate.forward(Matrix<double>::Constant(10, 1, 1), tape, {.step = 0});
  CHECK(tape.balance.losses.load == 0);
  CHECK(tape.balance.unused_experts() == 2);
  CHECK(tape.balance.cv_load() == 1);
  CHECK(tape.balance.max_over_mean_load() == 2);
}

TEST_CASE(
    "product keys: importance sees pairs that are few where both kinds of keys are in balance",
    "[routing][gate]") {
  ProductKeyGate<double> gate({.width = 2,
                               .row_keys = 2,
                               .column_keys = 2,
                               .top_k = 1,
                               .importance_weight = 1,
                               .load_weight = 1},
                              3);
  parameter(gate, "rows.weight").value << 50, 0, 0, 50;
  parameter(gate, "columns.weight").value << 50, 0, 0, 50;
  for (const char* name : {"rows.noise_weight", "columns.noise_weight"}) {
    parameter(gate, name).value.setConstant(-40);  // so that the noise is that of its floor
  }
  ProductKeyGate<double>::Tape tape;
  gate.forward(Matrix<double>{{1, 0}, {0, 1}}, tape, {.step = 0});
  CHECK(tape.routing.expert == Indices{0, 3});
  CHECK(tape.balance.losses.load == 0);
  CHECK(tape.balance.load == Vector<double>{{1, 0, 0, 1}});
  CHECK(tape.balance.losses.importance == 1);  // of 1, 0, 0 and 1
}

TEST_CASE("product keys: in evaluation there is no noise and the load is the count",
          "[routing][gate]") {
  const auto make = [](bool noise) {
    ProductKeyGate<double> gate(
        {.width = 3, .row_keys = 3, .column_keys = 4, .top_k = 3, .noise = noise}, 1);
    randomize(gate, 1);
    return gate;
  };
  const ProductKeyGate<double> gate = make(true);
  ProductKeyGate<double>::Tape tape;
  ProductKeyGate<double>::Tape clean;
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
}

TEST_CASE("product keys: training starts in balance", "[routing][gate]") {
  const ProductKeyGate<float> gate({.width = 3, .row_keys = 4, .column_keys = 4, .top_k = 2}, 0);
  ProductKeyGate<float>::Tape tape;
  gate.forward(random_matrix<float>(4000, 3, 1), tape, {.step = 0});
  CHECK(tape.balance.unused_experts() == 0);
  CHECK(tape.balance.cv_importance() < 0.1f);
  CHECK(tape.balance.cv_load() < 0.1f);
}

TEST_CASE("product keys: one token and a million experts", "[routing][gate]") {
  ProductKeyGate<double> gate({.width = 2, .row_keys = 1024, .column_keys = 1024, .top_k = 12}, 1);
  randomize(gate, 1);
  ProductKeyGate<double>::Tape tape;
  const Routing<double>& routing = gate.forward(random_matrix(1, 2, 3), tape, {.step = 0});
  CHECK(gate.experts() == 1048576);
  CHECK(parameter_count(gate) == 4 * 2 * 1024);
  const auto scores = [](const Matrix<double>& noisy) {
    return std::vector<double>(noisy.data(), noisy.data() + noisy.size());
  };
  CHECK(Indices(routing.expert.begin(), routing.expert.end()) ==
        best_pairs(scores(tape.rows.noisy), scores(tape.columns.noisy), 12));
  CHECK(tape.balance.unused_experts() == 1048576 - 12);
}

TEST_CASE("product keys: row keys that come and go change how many take part in a choice",
          "[routing][gate]") {
  // Of K = 3 there are as many row keys among the largest as there are row keys.
  const Config config{.width = 3, .row_keys = 2, .column_keys = 3, .top_k = 3};
  ProductKeyGate<double> gate(config, 5);
  randomize(gate, 2);
  gate.change_experts(ExpertSources("test", {0, 1, 2, 3, 4, 5, 0, 1, 2, -1, -1, -1}, 6), 1, 0.1);
  Config larger = config;
  larger.row_keys = 4;
  ProductKeyGate<double> expected(larger, 5);
  const Named values = values_of(gate);
  for_each_parameter(expected, [&](const std::string& name, Parameter<double>& p) {
    REQUIRE(p.value.cols() == values.at(name).cols());
    p.value = values.at(name);
  });
  ProductKeyGate<double>::Tape tape;
  ProductKeyGate<double>::Tape made;
  const Matrix<double> x = random_matrix(20, 3, 4);
  gate.forward(x, tape, {.step = 2});
  expected.forward(x, made, {.step = 2});
  CHECK(same_routing(tape.routing, made.routing));
  CHECK(same_balance(tape.balance, made.balance));

  CHECK_THROWS_AS(gate.change_experts(ExpertSources("test", {0, 1, 2, 3}, 12), 1, 0),
                  std::invalid_argument);
  gate.change_experts(ExpertSources("test", {3, 4, 5}, 12), 1, 0);
  CHECK(gate.experts() == 3);
  CHECK(gate.forward(x, tape, {.step = 2}).slots() == 60);
}

TEST_CASE("product keys: parameters have their names and shapes and start at zero",
          "[routing][gate]") {
  const ProductKeyGate<float> gate({.width = 3, .row_keys = 2, .column_keys = 5, .top_k = 2}, 0);
  std::vector<std::string> names;
  for_each_parameter(gate, [&](const std::string& name, const Parameter<float>& p) {
    names.push_back(name);
    CHECK(p.value.rows() == 3);
    CHECK(p.value.cols() == (name.starts_with("rows") ? 2 : 5));
    CHECK(p.value.cwiseAbs().maxCoeff() == 0);
  });
  CHECK(names == std::vector<std::string>{"rows.weight", "rows.noise_weight", "columns.weight",
                                          "columns.noise_weight"});
}

TEST_CASE("product keys: a bad configuration is refused with its field and numbers",
          "[routing][gate]") {
  const auto refuse = [](auto&& spoil, const std::string& message) {
    Config config{.width = 4, .row_keys = 3, .column_keys = 6, .top_k = 2};
    spoil(config);
    CHECK_THROWS_AS(ProductKeyGate<double>(config, 0), std::invalid_argument);
    CHECK_THROWS_WITH(ProductKeyGate<double>(config, 0), "moe: ProductKeyGate::Config." + message);
  };
  refuse([](Config& c) { c.width = 0; }, "width = 0, must be at least 1");
  refuse([](Config& c) { c.row_keys = 0; }, "row_keys = 0, must be at least 1");
  refuse([](Config& c) { c.column_keys = -1; }, "column_keys = -1, must be at least 1");
  refuse([](Config& c) { c.top_k = 0; },
         "top_k = 0, must be from 1 to row_keys * column_keys = 18");
  refuse([](Config& c) { c.top_k = 19; },
         "top_k = 19, must be from 1 to row_keys * column_keys = 18");
  refuse([](Config& c) { c.row_keys = Index{1} << 40, c.column_keys = Index{1} << 40; },
         "row_keys = 1099511627776 times column_keys = 1099511627776 are too many experts");
  refuse([](Config& c) { c.noise_floor = 0; }, "noise_floor = 0, must be finite and above 0");
  refuse([](Config& c) { c.importance_weight = -0.1; },
         "importance_weight = -0.1, must be finite and at least 0");
  refuse([](Config& c) { c.load_weight = std::numeric_limits<double>::infinity(); },
         "load_weight = inf, must be finite and at least 0");
}

TEST_CASE("product keys: the tape of a gate of another shape is refused", "[routing][gate]") {
  check_foreign_tape<ProductKeyGate<double>>(
      {.width = 3, .row_keys = 3, .column_keys = 5, .top_k = 2},
      {{.width = 3, .row_keys = 5, .column_keys = 3, .top_k = 2},
       {.width = 3, .row_keys = 3, .column_keys = 6, .top_k = 2},
       {.width = 3, .row_keys = 4, .column_keys = 5, .top_k = 2},
       {.width = 3, .row_keys = 3, .column_keys = 5, .top_k = 1}},
      "moe: ProductKeyGate::backward: the tape is another gate's, of 3 x 5 keys and 20 slots of 10 "
      "tokens");
}
