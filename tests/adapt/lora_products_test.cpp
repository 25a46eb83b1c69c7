#include <string>

#include "../naive_layer.hpp"
#include "moe/adapt/lora.hpp"

using namespace moe;
using namespace moe::test;

namespace {

using Plain = MoELayer<Expert<FeedForward>>;
using Adapted = MoELayer<Lora<FeedForward>>;

constexpr double factor = 2;  // alpha / rank
constexpr LoraConfig lora{.rank = 4, .alpha = 8};

Plain plain_layer(Precision products) {
  return Plain({.width = 16,
                .expert = {.hidden = 24, .activation = Activation::silu, .products = products},
                .gate = {.experts = 3, .top_k = 2},
                .seed = 1});
}

/// With random numbers in the adapters, whose term is then about as large as that of the weights, and the
/// experts trained whole.
Adapted adapted_layer(Precision products) {
  auto adapted = adapt(plain_layer(products), lora, Seed{2});
  std::uint64_t seed = 3;
  for_each_parameter(adapted, [&](const std::string& name, Parameter<float>& parameter) {
    if (!name.starts_with("experts.")) return;
    parameter.trained = true;
    if (name.find("lora_") == name.npos) return;
    fill_normal(parameter.value, 0.3f, derive_seed(seed++, 0));
  });
  return adapted;
}

/// y, dx, and the gradients by name.
template <class Layer>
Named pass(Layer& layer, const Matrix<float>& x) {
  typename Layer::Tape tape;
  zero_gradients(layer);
  const Matrix<float> y = layer.forward(x, tape, {.step = 0});
  const Matrix<float> dx = layer.backward(x, tape);
  Named result = gradients_of(layer);
  result["y"] = y.cast<double>();
  result["dx"] = dx.cast<double>();
  return result;
}

}  // namespace

TEST_CASE("lora: the products of an adapted layer are in bfloat16 where the layer's are",
          "[adapt]") {
  auto layer = plain_layer(Precision::bfloat16);
  auto full = plain_layer(Precision::full);
  auto adapted = adapt(layer, lora, Seed{2});
  for_each_parameter(adapted, [](const std::string& name, Parameter<float>& parameter) {
    if (name.starts_with("experts.")) parameter.trained = true;
  });
  const auto x = random_matrix<float>(40, 16, 2);
  const Named expected = pass(layer, x);
  const Named actual = pass(adapted, x);
  const Named unrounded = pass(full, x);
  // An adapter adds nothing at its start.
  CHECK(actual.at("y") == expected.at("y"));
  CHECK(unrounded.at("y") != expected.at("y"));
  for (const std::string name : {"dx", "experts.0.up.weight", "experts.1.down.weight"}) {
    INFO(name);
    CHECK(relative_error(actual.at(name), expected.at(name)) < 1e-6);
    CHECK(relative_error(unrounded.at(name), expected.at(name)) > 1e-4);
  }
}

// With G the gradient of W + f·A·B, that of W is G, of A f·G·Bᵀ and of B f·Aᵀ·G.
TEST_CASE(
    "lora: an adapted layer with products in bfloat16 is its merged layer but for the rounding",
    "[adapt]") {
  auto adapted = adapted_layer(Precision::bfloat16);
  auto unrounded = adapted_layer(Precision::full);
  auto whole = merged(unrounded);
  const auto x = random_matrix<float>(40, 16, 2);
  const Named values = values_of(adapted);
  const Named actual = pass(adapted, x);
  const Named expected = pass(whole, x);
  const auto check = [](const Matrix<double>& rounded, const Matrix<double>& exact) {
    const double error = relative_error(rounded, exact);
    CHECK(error < 0.01);
    CHECK(error > 1e-4);
  };
  for (const std::string name : {"y", "dx"}) {
    INFO(name);
    check(actual.at(name), expected.at(name));
  }
  for (const std::string expert : {"0", "1", "2"}) {
    for (const std::string map : {"up", "down"}) {
      const std::string prefix = "experts." + expert + '.' + map + '.';
      INFO(prefix);
      const Matrix<double>& g = expected.at(prefix + "weight");
      const Matrix<double>& a = values.at(prefix + "lora_A.weight");
      const Matrix<double>& b = values.at(prefix + "lora_B.weight");
      check(actual.at(prefix + "weight"), g);
      check(actual.at(prefix + "lora_A.weight"), factor * g * b.transpose());
      check(actual.at(prefix + "lora_B.weight"), factor * a.transpose() * g);
    }
  }
}

TEST_CASE("lora: the low-rank products of a layer with products in bfloat16 are in float",
          "[adapt]") {
  const auto without_weights = [](Precision products) {
    auto adapted = adapted_layer(products);
    for_each_parameter(adapted, [](const std::string& name, Parameter<float>& parameter) {
      if (!name.starts_with("experts.") || name.find("lora_") != name.npos) return;
      parameter.value.setZero();
      parameter.trained = false;
    });
    return adapted;
  };
  auto rounded = without_weights(Precision::bfloat16);
  auto full = without_weights(Precision::full);
  const auto x = random_matrix<float>(40, 16, 2);
  const Named actual = pass(rounded, x);
  for (const auto& [name, expected] : pass(full, x)) {
    INFO(name);
    CHECK(relative_error(actual.at(name), expected) < 1e-6);
  }
  CHECK(actual.at("y").cwiseAbs().maxCoeff() > 0.1);
}
