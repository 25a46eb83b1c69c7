#include "moe/experts/feed_forward.hpp"

#include <map>
#include <string>

#include "../naive_layer.hpp"
#include "passes.hpp"

using namespace moe;
using namespace moe::test;

namespace {

template <class Scalar>
test::Passes<Scalar> pass(FeedForward<Scalar>& network, const Matrix<Scalar>& x,
                          const Matrix<Scalar>& dy, const Matrix<Scalar>& weight) {
  test::Passes<Scalar> passes(network, GatheredRows<Scalar>(x));
  passes.forward(network);
  passes.backward(network, dy, weight);
  return passes;
}

template <class Scalar>
Matrix<Scalar> evaluate(const FeedForward<Scalar>& network, const Matrix<Scalar>& x) {
  return test::Passes<Scalar>(network, GatheredRows<Scalar>(x)).evaluate(network);
}

/// Plain and gated, with and without biases, limits that are often reached, offsets, and weights on
/// the input.
template <class Scalar>
std::vector<typename FeedForward<Scalar>::Config> forms(Index width, Index hidden,
                                                        Activation activation) {
  std::vector<typename FeedForward<Scalar>::Config> all;
  for (const bool gated : {false, true}) {
    for (const bool bias : {false, true}) {
      for (const double limit : {0.0, 0.5}) {
        for (const bool weighted_input : {false, true}) {
          all.push_back({.width = width,
                         .hidden = hidden,
                         .activation = activation,
                         .gated = gated,
                         .bias = bias,
                         .limit = limit,
                         .linear_offset = gated && bias ? 1.0 : 0.0,
                         .weighted_input = weighted_input});
        }
      }
    }
  }
  return all;
}

/// What a network of the form has saved of x, turned into its pre-activations.
Matrix<double> pre_activations(const FeedForward<double>& network, const Matrix<double>& saved,
                               const Matrix<double>& weight) {
  if (!network.config().weighted_input) return saved;
  Matrix<double> pre = weight.row(0).transpose().asDiagonal() * saved;
  for_each_parameter(network, [&](const std::string& name, const Parameter<double>& p) {
    const bool is_second = network.config().gated && name == "up.bias";
    if (name == "gate.bias" || name == "up.bias") {
      pre.middleCols(is_second ? network.config().hidden : 0, p.size()).rowwise() += p.value.row(0);
    }
  });
  return pre;
}

/// Whether no pre-activation (n x H, gated 2·H) is near a kink, which a step of differences would cross.
bool is_smooth(const FeedForward<double>::Config& config, const Matrix<double>& pre) {
  const double reach = 2e-3 * pre.cwiseAbs().maxCoeff();
  const auto first = pre.leftCols(config.hidden).array();
  const auto second = pre.rightCols(pre.cols() - config.hidden).array();
  if (has_kink(config.activation) && first.abs().minCoeff() <= reach) return false;
  if (config.limit == 0) return true;
  return (first - config.limit).abs().minCoeff() > reach &&
         (second.size() == 0 || (second.abs() - config.limit).abs().minCoeff() > reach);
}

void check_gradients(const FeedForward<double>::Config& config, Index n, double weights,
                     double inputs) {
  INFO("D " << config.width << ", H " << config.hidden << ", activation "
            << static_cast<int>(config.activation) << ", gated " << config.gated << ", bias "
            << config.bias << ", limit " << config.limit << ", offset " << config.linear_offset
            << ", weighted input " << config.weighted_input << ", n " << n << ", weights times "
            << weights << ", x times " << inputs);
  FeedForward<double> network(config, 0);
  FeedForward<double>::Config saving_config = config;
  saving_config.recompute = false;
  FeedForward<double> saving(saving_config, 0);
  Matrix<double> x;
  const Matrix<double> dy = random_matrix(n, config.width, 41);
  Matrix<double> weight = random_matrix(1, n, 42);
  // The first point whose pre-activations are all out of reach of a kink.
  bool smooth = false;
  for (std::uint64_t seed = 1; !smooth && seed < 50; ++seed) {
    test::randomize(network, seed, weights);
    test::randomize(saving, seed, weights);
    zero_gradients(network);
    x = random_matrix(n, config.width, seed, inputs);
    test::Passes<double> passes(saving, GatheredRows<double>(x));
    passes.forward(saving);
    smooth = is_smooth(config, pre_activations(saving, passes.saved, weight));
  }
  REQUIRE(smooth);
  const test::Passes<double> result = pass(network, x, dy, weight);

  const auto loss = [&] {
    test::Passes<double> passes(network, GatheredRows<double>(x));
    return passes.forward(network, weight, false).cwiseProduct(dy).sum();
  };
  // Steps in proportion to what they change: 1e-4 of it, or less where functions are steep.
  const double relative_step = weights * inputs > 5 ? 2e-6 : 1e-4;
  for_each_parameter(network, [&](const std::string& name, Parameter<double>& parameter) {
    INFO("parameter " << name);
    CHECK(relative_error(
              parameter.gradient(),
              test::difference_gradient(parameter.value, loss, relative_step * weights)) < 1e-7);
  });
  CHECK(relative_error(result.dx, test::difference_gradient(x, loss, relative_step * inputs)) <
        1e-7);
  CHECK(relative_error(result.dweight, test::difference_gradient(weight, loss)) < 1e-7);
}

}  // namespace

TEST_CASE("feed forward: gradients are derivatives for every activation and form", "[experts]") {
  for (const Activation activation : test::all_activations()) {
    for (auto config : forms<double>(5, 7, activation)) {
      for (const bool recompute : {false, true}) {
        config.recompute = recompute;
        check_gradients(config, 4, 1, 1);
      }
    }
  }
}

TEST_CASE("feed forward: gradients are derivatives at every scale", "[experts]") {
  for (const Activation activation : {Activation::relu, Activation::gelu, Activation::silu}) {
    for (const bool gated : {false, true}) {
      for (const double weights : {1e-2, 1.0, 10.0}) {
        for (const double inputs : {1e-2, 1.0, 10.0}) {
          check_gradients({.width = 3, .hidden = 4, .activation = activation, .gated = gated}, 3,
                          weights, inputs);
        }
      }
    }
  }
}

TEST_CASE(
    "feed forward: a weight's gradient is output times dy, or x times dx, over several panels of H",
    "[experts]") {
  for (const Index hidden : {40, 70, 300}) {
    for (const auto& config : forms<double>(3, hidden, Activation::relu)) {
      INFO("H " << hidden << ", gated " << config.gated << ", limit " << config.limit
                << ", weighted input " << config.weighted_input);
      FeedForward<double> network(config, 1);
      const Matrix<double> x = random_matrix(6, 3, 2);
      const Matrix<double> dy = random_matrix(6, 3, 3);
      const test::Passes<double> passes = pass(network, x, dy, Matrix<double>::Ones(1, 6).eval());
      const Matrix<double> y = evaluate(network, x);
      for (Index i = 0; i < 6; ++i) {
        const double expected =
            config.weighted_input ? x.row(i).dot(passes.dx.row(i)) : y.row(i).dot(dy.row(i));
        CHECK_THAT(passes.dweight(0, i), Catch::Matchers::WithinAbs(expected, 1e-12));
      }
    }
  }
}

TEST_CASE("feed forward: gradients are derivatives at every size", "[experts]") {
  for (const bool gated : {false, true}) {
    for (const Index width : {1, 9}) {
      for (const Index hidden : {1, 17}) {
        for (const Index n : {1, 6}) {
          check_gradients(
              {.width = width, .hidden = hidden, .activation = Activation::silu, .gated = gated}, n,
              0.5, 1);
        }
      }
    }
  }
}

TEST_CASE("feed forward: a small network worked by hand", "[experts]") {
  // x = (1, 2), W_1 = (1 -1; 1 1), b_1 = (0, -2): pre = (3, -1), ReLU gives a = (3, 0).
  // W_2 = (2 0; 5 7), b_2 = (1, -1): y = (6, 0) + (1, -1) = (7, -1).
  FeedForward<double> network({.width = 2, .hidden = 2}, 0);
  std::vector<Matrix<double>> values(4);
  values[0] = Matrix<double>{{1, -1}, {1, 1}};
  values[1] = Matrix<double>{{0, -2}};
  values[2] = Matrix<double>{{2, 0}, {5, 7}};
  values[3] = Matrix<double>{{1, -1}};
  std::size_t next = 0;
  for_each_parameter(network, [&](const ParameterName&, Parameter<double>& parameter) {
    parameter.value = values[next++];
  });
  const Matrix<double> x{{1, 2}};
  // dy = (1, 10), weight 0.5: u = dy·W_2ᵀ = (2, 75); dweight = ⟨u, a⟩ + ⟨b_2, dy⟩ = 6 - 9 = -3,
  // which is ⟨y, dy⟩. dpre = 0.5·u ⊙ (1, 0) = (1, 0); dx = dpre·W_1ᵀ = (1, 1).
  const test::Passes<double> r =
      pass<double>(network, x, Matrix<double>{{1, 10}}, Matrix<double>{{0.5}});
  CHECK(same_bits(r.saved, Matrix<double>{{3, -1}}));
  CHECK(same_bits(r.y, Matrix<double>{{7, -1}}));
  CHECK(same_bits(evaluate(network, x), r.y));
  CHECK(r.dweight(0, 0) == -3);
  CHECK(r.dx == Matrix<double>{{1, 1}});
  const test::Named gradients = test::gradients_of(network);
  CHECK(gradients.at("up.weight") == Matrix<double>{{1, 0}, {2, 0}});
  CHECK(gradients.at("up.bias") == Matrix<double>{{1, 0}});
  CHECK(gradients.at("down.weight") == Matrix<double>{{1.5, 15}, {0, 0}});
  CHECK(gradients.at("down.bias") == Matrix<double>{{0.5, 5}});
}

TEST_CASE("feed forward: a small gated network worked by hand", "[experts]") {
  // x = (1, 2): x·W_1 = 3 by W_1 = (1; 1), x·W_3 = -2 by W_3 = (0; -1); a = 3·(-2) = -6 with
  // the identity; y = a·W_2 = (-6, -12) by W_2 = (1 2).
  FeedForward<double> network(
      {.width = 2, .hidden = 1, .activation = Activation::identity, .gated = true}, 0);
  const std::map<std::string, Matrix<double>> values{{"gate.weight", Matrix<double>{{1}, {1}}},
                                                     {"up.weight", Matrix<double>{{0}, {-1}}},
                                                     {"down.weight", Matrix<double>{{1, 2}}}};
  for_each_parameter(network, [&](const std::string& name, Parameter<double>& parameter) {
    parameter.value = values.at(name);
  });
  const Matrix<double> x{{1, 2}};
  // dy = (1, 1), weight 2: u = 3, dweight = -18; d(x·W_1) = 2·3·(-2) = -12, d(x·W_3) = 2·3·3 = 18;
  // dx = -12·(1, 1) + 18·(0, -1) = (-12, -30).
  const test::Passes<double> r =
      pass<double>(network, x, Matrix<double>{{1, 1}}, Matrix<double>{{2}});
  CHECK(r.saved == Matrix<double>{{3, -2}});
  CHECK(r.y == Matrix<double>{{-6, -12}});
  CHECK(r.dweight(0, 0) == -18);
  CHECK(r.dx == Matrix<double>{{-12, -30}});
  const test::Named gradients = test::gradients_of(network);
  CHECK(gradients.at("gate.weight") == Matrix<double>{{-12}, {-24}});
  CHECK(gradients.at("up.weight") == Matrix<double>{{18}, {36}});
  CHECK(gradients.at("down.weight") == Matrix<double>{{-12, -12}});
}

TEST_CASE("feed forward: parameters have their names and shapes in order", "[experts]") {
  const auto shapes = [](const FeedForward<float>& network) {
    std::vector<std::string> list;
    for_each_parameter(network, [&](const std::string& name, const Parameter<float>& parameter) {
      list.push_back(name + " " + std::to_string(parameter.value.rows()) + "x" +
                     std::to_string(parameter.value.cols()));
      CHECK(parameter.gradient().rows() == parameter.value.rows());
      CHECK(parameter.gradient().cols() == parameter.value.cols());
      CHECK(parameter.gradient().cwiseAbs().sum() == 0);
    });
    return list;
  };
  CHECK(
      shapes(FeedForward<float>({.width = 3, .hidden = 5}, 0)) ==
      std::vector<std::string>{"up.weight 3x5", "up.bias 1x5", "down.weight 5x3", "down.bias 1x3"});
  CHECK(shapes(FeedForward<float>({.width = 3, .hidden = 5, .gated = true}, 0)) ==
        std::vector<std::string>{"gate.weight 3x5", "up.weight 3x5", "down.weight 5x3"});
  CHECK(shapes(FeedForward<float>({.width = 3, .hidden = 5, .bias = false}, 0)) ==
        std::vector<std::string>{"up.weight 3x5", "down.weight 5x3"});
  CHECK(shapes(FeedForward<float>({.width = 3, .hidden = 5, .gated = true, .bias = true}, 0)) ==
        std::vector<std::string>{"gate.weight 3x5", "gate.bias 1x5", "up.weight 3x5", "up.bias 1x5",
                                 "down.weight 5x3", "down.bias 1x3"});
  CHECK(FeedForward<float>({.width = 3, .hidden = 5}, 0).tape_width() == 5);
  CHECK(FeedForward<float>({.width = 3, .hidden = 5, .gated = true}, 0).tape_width() == 10);
}

TEMPLATE_TEST_CASE("feed forward: weights start uniform within one over the root of the inputs",
                   "[experts]", float, double) {
  for (const bool gated : {false, true}) {
    const FeedForward<TestType> network({.width = 64, .hidden = 100, .gated = gated, .bias = true},
                                        7);
    std::vector<Matrix<double>> seen;
    for_each_parameter(network, [&](const std::string& name, const Parameter<TestType>& p) {
      INFO(name);
      const double bound = 1 / std::sqrt(name.starts_with("down") ? 100.0 : 64.0);
      const Matrix<double> value = p.value.template cast<double>();
      CHECK(value.cwiseAbs().maxCoeff() <= bound * (1 + 1e-6));
      CHECK(value.maxCoeff() > 0.9 * bound);
      CHECK(value.minCoeff() < -0.9 * bound);
      // A uniform deviate in ±b has variance b²/3.
      CHECK_THAT(value.squaredNorm() / static_cast<double>(value.size()) * 3 / (bound * bound),
                 Catch::Matchers::WithinAbs(1, p.size() > 1000 ? 0.05 : 0.35));
      for (const Matrix<double>& other : seen) CHECK(other(0, 0) * value(0, 0) != 0);
      for (const Matrix<double>& other : seen) {
        CHECK(std::abs(other(0, 0) / other.cwiseAbs().maxCoeff() -
                       value(0, 0) / value.cwiseAbs().maxCoeff()) > 1e-4);
      }
      seen.push_back(value);
    });
  }
}

TEST_CASE("feed forward: the seed decides the start", "[experts]") {
  const auto start = [](std::uint64_t seed) {
    return test::values_of(FeedForward<float>({.width = 3, .hidden = 5}, seed));
  };
  CHECK(start(1) == start(1));
  CHECK(start(1) != start(2));
}

TEST_CASE("feed forward: zeros have the shapes of a fresh network", "[experts]") {
  for (const bool gated : {false, true}) {
    for (const bool bias : {false, true}) {
      const FeedForwardConfig config{.width = 5, .hidden = 3, .gated = gated, .bias = bias};
      const FeedForward<double> fresh(config, 1);
      auto zeros = FeedForward<double>::zeros(config);
      CHECK(zeros.config().hidden == 3);
      const test::Named of_fresh = test::values_of(fresh);
      const test::Named of_zeros = test::values_of(zeros);
      REQUIRE(of_zeros.size() == of_fresh.size());
      for (const auto& [name, value] : of_fresh) {
        INFO(name);
        const Matrix<double>& zero = of_zeros.at(name);
        CHECK(value.cwiseAbs().maxCoeff() > 0);
        CHECK((zero.rows() == value.rows() && zero.cols() == value.cols()));
        CHECK(zero.isZero(0));
      }
    }
  }
  CHECK_THROWS_WITH(FeedForward<double>::zeros({.width = 5, .hidden = 0}),
                    "moe: FeedForward::Config.hidden = 0, must be at least 1");
}

TEMPLATE_TEST_CASE("feed forward: evaluate gives the bits of forward and a row those of the batch",
                   "[experts]", float, double) {
  for (const auto& config : forms<TestType>(19, 37, Activation::gelu)) {
    FeedForward<TestType> network(config, 3);
    const Matrix<TestType> x = random_matrix<TestType>(expert_block_rows, 19, 5);
    const Matrix<TestType> weight = random_matrix<TestType>(1, expert_block_rows, 6);
    const test::Passes<TestType> whole = pass(network, x, x, weight);
    CHECK(same_bits(evaluate(network, x), whole.y));
    for (const Index row : {0, 1, 77, 127}) {
      const test::Passes<TestType> one =
          pass<TestType>(network, x.row(row), x.row(row), weight.middleCols(row, 1));
      CHECK(same_bits(one.y, whole.y.row(row)));
      CHECK(same_bits(one.saved, whole.saved.row(row)));
      CHECK(same_bits(one.dx, whole.dx.row(row)));
      CHECK(same_bits(one.dweight, whole.dweight.middleCols(row, 1)));
    }
  }
}

TEMPLATE_TEST_CASE(
    "feed forward: computing the pre-activations again gives the same bits and keeps "
    "nothing",
    "[experts]", float, double) {
  for (auto config : forms<TestType>(19, 210, Activation::gelu)) {
    for (const Index rows : {3, 70}) {
      config.recompute = false;
      FeedForward<TestType> keeping(config, 3);
      config.recompute = true;
      FeedForward<TestType> recomputing(config, 3);
      CHECK(recomputing.tape_width() == 0);
      const Matrix<TestType> x = random_matrix<TestType>(rows, 19, 5);
      const Matrix<TestType> dy = random_matrix<TestType>(rows, 19, 6);
      const Matrix<TestType> weight = random_matrix<TestType>(1, rows, 7);
      const test::Passes<TestType> one = pass(keeping, x, dy, weight);
      const test::Passes<TestType> other = pass(recomputing, x, dy, weight);
      CHECK(same_bits(one.y, other.y));
      CHECK(same_bits(one.dx, other.dx));
      CHECK(same_bits(one.dweight, other.dweight));
      const auto gradients = test::gradients_of(keeping);
      for (const auto& [name, gradient] : test::gradients_of(recomputing)) {
        INFO(name);
        CHECK(same_bits(gradient, gradients.at(name)));
      }
    }
  }
}

TEMPLATE_TEST_CASE("feed forward: the halves give the same bits in any split", "[experts]", float,
                   double) {
  const Index panel = detail::panel_columns<TestType>;
  const Index rows = 45;
  const Index width = 3 * detail::tile_columns<TestType> + 2;
  for (const auto& config : forms<TestType>(width, 2 * panel + 5, Activation::silu)) {
    FeedForward<TestType> network(config, 3);
    const Matrix<TestType> x = random_matrix<TestType>(rows, width, 5);
    const Matrix<TestType> dy = random_matrix<TestType>(rows, width, 6);
    const Matrix<TestType> weight = random_matrix<TestType>(1, rows, 7);
    const test::Passes<TestType> whole = pass(network, x, dy, weight);
    const test::Named expected = test::gradients_of(network);

    zero_gradients(network);
    std::vector<Index> token(detail::to_size(rows));
    for (Index i = 0; i < rows; ++i) token[detail::to_size(i)] = i;
    Matrix<TestType> kept(rows, network.tape_width());
    Matrix<TestType> scratch(rows, network.scratch_width());
    Matrix<TestType> dx = Matrix<TestType>::Zero(rows, width);
    Matrix<TestType> dweight(1, rows);
    const ExpertBlock<TestType> block{GatheredRows<TestType>(x), token.data(), weight.data(),
                                      view(kept), view(scratch)};
    const std::vector<Range> halves{{17, rows - 17}, {0, 17}};
    const std::vector<Range> columns{{panel, panel + 5}, {0, panel}};
    for (const Range part : halves) {
      for (const Range column : columns) network.hidden(block.slice(part), column, true);
    }
    for (const Range part : halves) {
      for (const Range column : columns) network.hidden_backward(block.slice(part), dy, column);
    }
    const Index cut = width + 3;
    network.add_gradients(block, dy, {cut, network.gradient_rows() - cut});
    network.add_gradients(block, dy, {0, cut});
    const Index tile = detail::tile_columns<TestType>;
    for (const Range column : {Range{tile, width - tile}, Range{0, tile}}) {
      for (const Range part : halves) {
        network.output_backward(block.slice(part), column, view(dx));
      }
    }
    network.weight_gradients(block, dy, dweight.data());
    CHECK(same_bits(kept, whole.saved));
    CHECK(same_bits(dx, whole.dx));
    CHECK(same_bits(dweight, whole.dweight));
    for (const auto& [name, gradient] : test::gradients_of(network)) {
      INFO(name);
      CHECK(same_bits(gradient, expected.at(name)));
    }
  }
}

TEST_CASE("feed forward: a bad configuration is refused with its field and number", "[experts]") {
  CHECK_THROWS_AS(FeedForward<float>({.width = 0, .hidden = 1}, 0), std::invalid_argument);
  CHECK_THROWS_WITH(FeedForward<float>({.width = 0, .hidden = 1}, 0),
                    "moe: FeedForward::Config.width = 0, must be at least 1");
  CHECK_THROWS_WITH(FeedForward<float>({.width = -2, .hidden = 1}, 0),
                    "moe: FeedForward::Config.width = -2, must be at least 1");
  CHECK_THROWS_WITH(FeedForward<double>({.width = 1, .hidden = 0}, 0),
                    "moe: FeedForward::Config.hidden = 0, must be at least 1");
  CHECK_THROWS_WITH(FeedForward<double>({.width = 1, .hidden = -1}, 0),
                    "moe: FeedForward::Config.hidden = -1, must be at least 1");
  CHECK_NOTHROW(FeedForward<float>({.width = 1, .hidden = 1}, 0));
  const auto refuse = [](auto&& change, const std::string& message) {
    FeedForward<float>::Config config{.width = 1, .hidden = 1, .gated = true};
    change(config);
    CHECK_THROWS_WITH(FeedForward<float>(config, 0), "moe: FeedForward::Config." + message);
  };
  using Config = FeedForward<float>::Config;
  const std::string limit = ", must be 0, or finite and above 0 as a Scalar";
  refuse([](Config& c) { c.limit = -1; }, "limit = -1" + limit);
  refuse([](Config& c) { c.limit = std::nan(""); }, "limit = nan" + limit);
  refuse([](Config& c) { c.limit = 1e300; }, "limit = 1e+300" + limit);   // infinite in float
  refuse([](Config& c) { c.limit = 1e-300; }, "limit = 1e-300" + limit);  // 0 in float
  refuse([](Config& c) { c.linear_offset = std::numeric_limits<double>::infinity(); },
         "linear_offset = inf, must be finite as a Scalar");
  refuse(
      [](Config& c) {
        c.gated = false;
        c.linear_offset = 1;
      },
      "linear_offset = 1, must be 0 without gated");
  refuse([](Config& c) { c.activation = static_cast<Activation>(99); },
         "activation = 99, must be one of the 9 activations");
}

TEST_CASE("feed forward: a weight on the input is a weight on x, 0 included", "[experts]") {
  for (const Index hidden : {5, 150}) {
    for (const auto& config : forms<double>(3, hidden, Activation::silu)) {
      if (!config.weighted_input) continue;
      auto plain_config = config;
      plain_config.weighted_input = false;
      FeedForward<double> network(config, 2);
      FeedForward<double> plain(plain_config, 2);
      const Matrix<double> x = random_matrix(40, 3, 1);
      const Matrix<double> dy = random_matrix(40, 3, 3);
      Matrix<double> weight = random_matrix(1, 40, 4);
      weight(0, 7) = 0;
      const Matrix<double> weighted = weight.row(0).asDiagonal() * x;
      test::Passes<double> passes(network, GatheredRows<double>(x));
      const Matrix<double> y = passes.forward(network, weight);
      passes.backward(network, dy, weight);
      const test::Passes<double> expected =
          pass(plain, weighted, dy, Matrix<double>::Ones(1, 40).eval());
      CHECK(relative_error(y, expected.y) < 1e-13);
      CHECK(relative_error(passes.dx, weight.row(0).asDiagonal() * expected.dx) < 1e-13);
      CHECK(relative_error(passes.dweight.transpose(),
                           x.cwiseProduct(expected.dx).rowwise().sum()) < 1e-12);
      const test::Named gradients = test::gradients_of(network);
      for (const auto& [name, gradient] : test::gradients_of(plain)) {
        INFO(name << ", H " << hidden);
        CHECK(relative_error(gradients.at(name), gradient) < 1e-12);
      }
    }
  }
}

TEST_CASE("feed forward: a small network with weights on its input worked by hand", "[experts]") {
  // x = (2), weight 3, W_1 = (5), b_1 = (-1), W_2 = (7), b_2 = (4): pre = 3·10 - 1 = 29, the identity,
  // y = 203 + 4. dy = 1: u = 7, dw = 7·10, dx = 3·7·5, dW_1 = 3·7·2, db_1 = 7, dW_2 = 29, db_2 = 1.
  FeedForward<double> network(
      {.width = 1, .hidden = 1, .activation = Activation::identity, .weighted_input = true}, 0);
  std::map<std::string, double> values{
      {"up.weight", 5}, {"up.bias", -1}, {"down.weight", 7}, {"down.bias", 4}};
  for_each_parameter(network, [&](const std::string& name, Parameter<double>& p) {
    p.value(0, 0) = values.at(name);
  });
  const Matrix<double> x{{2}};
  const Matrix<double> weight{{3}};
  test::Passes<double> r(network, GatheredRows<double>(x));
  CHECK(r.forward(network, weight)(0, 0) == 207);
  CHECK(r.saved(0, 0) == 10);
  r.backward(network, Matrix<double>{{1}}, weight);
  CHECK(r.dweight(0, 0) == 70);
  CHECK(r.dx(0, 0) == 105);
  const test::Named gradients = test::gradients_of(network);
  CHECK(gradients.at("up.weight")(0, 0) == 42);
  CHECK(gradients.at("up.bias")(0, 0) == 7);
  CHECK(gradients.at("down.weight")(0, 0) == 29);
  CHECK(gradients.at("down.bias")(0, 0) == 1);
}

TEST_CASE("feed forward: beyond a limit there is no gradient, at it there is", "[experts]") {
  // W_1 = (1), W_3 = (1), W_2 = (1): y = min(x, 2)·(clamp(x, -2, 2) + 1).
  FeedForward<double> network({.width = 1,
                               .hidden = 1,
                               .activation = Activation::identity,
                               .gated = true,
                               .limit = 2,
                               .linear_offset = 1},
                              0);
  for_each_parameter(network,
                     [](const ParameterName&, Parameter<double>& p) { p.value.setOnes(); });
  const Matrix<double> x{{1}, {2}, {3}, {-2}, {-3}};
  const Matrix<double> ones = Matrix<double>::Ones(5, 1);
  const test::Passes<double> r = pass<double>(network, x, ones, ones.transpose());
  CHECK(r.y == Matrix<double>{{2}, {6}, {6}, {2}, {3}});
  // dy/dx of x² + x is 2·x + 1; above 2 nothing is left, below -2 that of -x.
  CHECK(r.dx == Matrix<double>{{3}, {5}, {0}, {-3}, {-1}});
  const test::Named gradients = test::gradients_of(network);
  CHECK(gradients.at("gate.weight")(0, 0) == 1 * 2 + 2 * 3 - 2 * -1 - 3 * -1);
  CHECK(gradients.at("up.weight")(0, 0) == 1 * 1 + 2 * 2 - 2 * -2);
  CHECK(gradients.at("down.weight")(0, 0) == 2 + 6 + 6 + 2 + 3);
}

TEST_CASE("feed forward: a limit keeps NaN", "[experts]") {
  for (const auto& config : forms<double>(3, 9, Activation::silu)) {
    const FeedForward<double> network(config, 0);
    Matrix<double> x = random_matrix(2, 3, 1);
    x(0, 1) = std::nan("");
    const Matrix<double> y = evaluate(network, x);
    CHECK(y.row(0).hasNaN());
    CHECK(y.row(1).allFinite());
  }
}
