#include <algorithm>
#include <set>

#include "layers.hpp"

using namespace moe;
using namespace moe::test;
template <class Scalar>
using Config = test::LayerConfig<Scalar>;

namespace {

/// Puts a layer of feed-forward experts at a point away from ties and kinks and checks it there.
void check_gradients(const Config<double>& config, Index tokens, double weights = 0.7,
                     double inputs = 1.0) {
  INFO("E " << config.gate.experts << ", K " << config.gate.top_k << ", activation "
            << static_cast<int>(config.expert.activation) << ", gated " << config.expert.gated
            << ", output " << static_cast<int>(config.output) << ", loss weights "
            << config.gate.importance_weight << " and " << config.gate.load_weight
            << ", weights times " << weights << ", x times " << inputs);
  Layer<double> layer(config);
  const Pass key{.step = 3, .first_token = 1};
  Matrix<double> x;
  Matrix<double> y;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 200; ++seed) {
    test::randomize(layer, seed, weights);
    x = random_matrix(tokens, config.width, seed, inputs);
    Layer<double>::Tape tape;
    y = layer.forward(x, tape, key);
    const auto pre = tape.experts.saved.leftCols(config.expert.hidden).cwiseAbs();
    clear = test::choice_margin(config.gate.noise ? tape.gate.noisy : tape.gate.clean,
                                config.gate.top_k) > 2e-3 &&
            (!has_kink(config.expert.activation) || pre.minCoeff() > 2e-3 * pre.maxCoeff());
  }
  REQUIRE(clear);
  const Matrix<double> r =
      random_matrix(tokens, config.width, 8) / std::max(1e-3, y.cwiseAbs().maxCoeff());
  check_against_differences(layer, x, key, r, weights, inputs, weights * inputs > 5 ? 0.02 : 1);
}

}  // namespace

TEST_CASE("layer: gradients are derivatives for every number of experts", "[layer]") {
  for (const Index experts : {1, 2, 3, 5, 12}) {
    for (const Index top_k : std::set<Index>{1, std::min<Index>(2, experts), experts}) {
      Config<double> config{.width = 3,
                            .expert = {.hidden = 4, .activation = Activation::gelu},
                            .gate = {.experts = experts, .top_k = top_k},
                            .seed = 6};
      config.gate.importance_weight = 0.7;
      config.gate.load_weight = 1.3;
      check_gradients(config, 5);
    }
  }
}

TEST_CASE("layer: gradients are derivatives for every activation and form", "[layer]") {
  for (const Activation activation : test::all_activations()) {
    for (const bool gated : {false, true}) {
      check_gradients({.width = 3,
                       .expert = {.hidden = 4, .activation = activation, .gated = gated},
                       .gate = {.experts = 4, .top_k = 2},
                       .seed = 6},
                      4);
    }
  }
}

TEST_CASE("layer: gradients are derivatives for every output activation", "[layer]") {
  for (const Activation output : test::all_activations()) {
    if (has_kink(output)) continue;  // that of ReLU is met below, away from zero
    check_gradients({.width = 3,
                     .expert = {.hidden = 4, .activation = Activation::tanh},
                     .gate = {.experts = 4, .top_k = 2},
                     .output = output,
                     .seed = 6},
                    4);
  }
}

TEST_CASE("layer: the gradient of a ReLU at the output stops where y is zero", "[layer]") {
  Layer<double> layer({.width = 3,
                       .expert = {.hidden = 4},
                       .gate = {.experts = 3, .top_k = 2},
                       .output = Activation::relu,
                       .seed = 6});
  test::randomize(layer, 3);
  Layer<double>::Tape tape;
  const Matrix<double> y = layer.forward(random_matrix(20, 3, 1), tape, {.step = 0});
  const NaiveLayer naive(layer);
  const NaiveLayer::Result pass = naive.forward(random_matrix(20, 3, 1), {.step = 0});
  CHECK(relative_error(y, pass.y) < 1e-13);
  CHECK(y.minCoeff() == 0);
  CHECK(y.maxCoeff() > 0);
  const Matrix<double> r = random_matrix(20, 3, 2);
  Named gradients = naive.zero_gradients();
  const Matrix<double> dx = naive.backward(pass, r, gradients);
  CHECK(relative_error(layer.backward(r, tape), dx) < 1e-12);
  CHECK(gradient_error(test::gradients_of(layer), gradients) < 1e-12);
}

TEST_CASE("layer: gradients are derivatives for every pair of loss weights", "[layer]") {
  for (const double importance : {0.0, 0.9}) {
    for (const double load : {0.0, 1.7}) {
      for (const Index top_k : {1, 2}) {
        Config<double> config{.width = 3,
                              .expert = {.hidden = 4, .activation = Activation::silu},
                              .gate = {.experts = 4, .top_k = top_k},
                              .seed = 6};
        config.gate.importance_weight = importance;
        config.gate.load_weight = load;
        check_gradients(config, 5);
      }
    }
  }
}

TEST_CASE("layer: gradients are derivatives at every scale", "[layer]") {
  for (const Activation activation : {Activation::relu, Activation::silu}) {
    for (const double weights : {1e-2, 1.0, 10.0}) {
      for (const double inputs : {1e-2, 1.0, 10.0}) {
        Config<double> config{.width = 2,
                              .expert = {.hidden = 3, .activation = activation},
                              .gate = {.experts = 4, .top_k = 2},
                              .seed = 6};
        config.gate.noise_floor = 0.05;
        config.gate.importance_weight = 1;
        config.gate.load_weight = 1;
        check_gradients(config, 3, weights, inputs);
      }
    }
  }
}

TEST_CASE("layer: gradients without the threshold's share would be seen to be wrong", "[layer]") {
  Config<double> config{
      .width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 2}, .seed = 6};
  config.gate.load_weight = 1;
  Layer<double> layer(config);
  test::randomize(layer, 4, 0.5);
  const Matrix<double> x = random_matrix(10, 3, 2);
  const Matrix<double> r = random_matrix(10, 3, 3);
  const Everything<double> fast(layer, x, r);
  const NaiveLayer naive(layer);
  const NaiveLayer::Result pass = naive.forward(x, {.step = 2});
  Named with = naive.zero_gradients();
  Named without = naive.zero_gradients();
  naive.backward(pass, r, with, true);
  naive.backward(pass, r, without, false);
  CHECK(gradient_error(fast.gradients, with) < 1e-12);
  for (const char* name : {"gate.weight", "gate.noise_weight"}) {
    CHECK(relative_error(fast.gradients.at(name), without.at(name)) > 1e-3);
  }
}

TEST_CASE("layer: backward adds to the gradients and can be called again", "[layer]") {
  Layer<double> layer = small_layer();
  Layer<double>::Tape tape;
  layer.forward(random_matrix(10, 3, 2), tape, {.step = 0});
  const Matrix<double> r = random_matrix(10, 3, 3);
  const Matrix<double> dx = layer.backward(r, tape);
  Named once = test::gradients_of(layer);
  CHECK(same_bits(layer.backward(r, tape), dx));
  for (auto& [name, gradient] : once) gradient *= 2;
  CHECK(gradient_error(test::gradients_of(layer), once) < 1e-13);
}
