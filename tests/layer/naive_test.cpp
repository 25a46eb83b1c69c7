#include <algorithm>
#include <set>
#include <vector>

#include "layers.hpp"

using namespace moe;
using namespace moe::test;
template <class Scalar>
using Config = test::LayerConfig<Scalar>;
using Indices = std::vector<Index>;

namespace {

/// The fast layer against the naive one: results, figures, choice, gradients, evaluation.
template <class Scalar>
void check_against_naive(const Config<Scalar>& config, Index tokens, double deviation = 0.5) {
  INFO("T " << tokens << ", D " << config.width << ", H " << config.expert.hidden << ", E "
            << config.gate.experts << ", K " << config.gate.top_k << ", gated "
            << config.expert.gated);
  const Threads threads(1);
  Layer<Scalar> layer(config);
  const Pass key{.step = (std::uint64_t{7} << 32) + 11, .first_token = 9};
  Matrix<Scalar> x;
  NaiveLayer::Result expected;
  NaiveLayer::Result served;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 100; ++seed) {
    test::randomize(layer, seed, deviation);
    x = random_matrix<Scalar>(tokens, config.width, seed);
    const NaiveLayer naive(layer);
    expected = naive.forward(x.template cast<double>(), key);
    served = naive.evaluate(x.template cast<double>());
    const double margin = sizeof(Scalar) == sizeof(float) ? 2e-6 : 1e-12;
    clear = test::choice_margin(expected.h, config.gate.top_k) > margin &&
            test::choice_margin(served.h, config.gate.top_k) > margin;
  }
  REQUIRE(clear);
  const double tolerance = 5 * test::tolerance<Scalar>;
  const auto check_pass = [&](const Matrix<Scalar>& y, const auto& tape,
                              const NaiveLayer::Result& pass) {
    CHECK(relative_error(y.template cast<double>().eval(), pass.y) < tolerance);
    CHECK(relative_error(tape.balance().importance.template cast<double>().eval(),
                         pass.importance) < tolerance);
    CHECK(relative_error(tape.balance().load.template cast<double>().eval(), pass.load) <
          tolerance);
    CHECK_THAT(static_cast<double>(tape.balance().loss),
               Catch::Matchers::WithinAbs(pass.loss, tolerance * (1 + pass.loss)));
    Indices choice;
    double weight_error = 0;
    Indices count(detail::to_size(config.gate.experts), 0);
    for (std::size_t t = 0; t < pass.choice.size(); ++t) {
      for (const Index e : pass.choice[t]) {
        weight_error = std::max(
            weight_error, std::abs(pass.weight(static_cast<Index>(t), e) -
                                   static_cast<double>(tape.routing().weight[choice.size()])));
        choice.push_back(e);
        ++count[detail::to_size(e)];
      }
    }
    CHECK(tape.routing().expert == choice);
    CHECK(weight_error < tolerance);
    CHECK(tape.balance().tokens_per_expert == count);
  };

  typename Layer<Scalar>::Tape tape;
  layer.forward(x, tape, key);
  check_pass(tape.y, tape, expected);
  const Matrix<Scalar> r = random_matrix<Scalar>(tokens, config.width, 8);
  const Matrix<Scalar>& dx = layer.backward(r, tape);
  const NaiveLayer naive(layer);
  Named gradients = naive.zero_gradients();
  const Matrix<double> naive_dx = naive.backward(expected, r.template cast<double>(), gradients);
  // The gate's gradients are small differences of larger terms.
  CHECK(relative_error(dx.template cast<double>().eval(), naive_dx) < 20 * tolerance);
  CHECK(gradient_error(test::gradients_of(layer), gradients) < 20 * tolerance);

  typename Layer<Scalar>::Tape serving;
  layer.evaluate(x, serving);
  check_pass(serving.y, serving, served);
  CHECK(same_bits(layer.evaluate(x), serving.y));
}

}  // namespace

TEMPLATE_TEST_CASE("layer: equals the naive layer at every shape", "[layer]", float, double) {
  for (const Index tokens : {1, 2, 17}) {
    for (const Index experts : {1, 2, 5, 16, 19}) {
      for (const Index top_k : std::set<Index>{1, std::min<Index>(3, experts), experts}) {
        check_against_naive<TestType>(
            {.width = 1 + (tokens + experts) % 7,
             .expert = {.hidden = 1 + (tokens * experts) % 19,
                        .activation = Activation::gelu,
                        .gated = (tokens + top_k) % 2 == 1},
             .gate = {.experts = experts, .top_k = top_k},
             .output = top_k % 2 == 0 ? Activation::sigmoid : Activation::identity,
             .seed = 12},
            tokens);
      }
    }
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer where blocks and tiles end", "[layer]", float,
                   double) {
  for (const Index tokens : {63, 64, 65, 129}) {
    check_against_naive<TestType>({.width = 50,
                                   .expert = {.hidden = 33, .activation = Activation::silu},
                                   .gate = {.experts = 3, .top_k = 2},
                                   .seed = 5},
                                  tokens, 0.2);
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer where the tape's rows are spread", "[layer]",
                   float, double) {
  for (const bool gated : {false, true}) {
    const auto kept = static_cast<Index>(1024 / sizeof(TestType));
    REQUIRE(detail::padded_stride<TestType>(kept) > kept);
    check_against_naive<TestType>({.width = 6,
                                   .expert = {.hidden = gated ? kept / 2 : kept, .gated = gated},
                                   .gate = {.experts = 3, .top_k = 2},
                                   .seed = 5},
                                  70, 0.1);
  }
}

TEMPLATE_TEST_CASE("layer: equals the naive layer without noise", "[layer]", float, double) {
  Config<TestType> config{.width = 6,
                          .expert = {.hidden = 5},
                          .gate = {.experts = 7, .top_k = 3, .noise = false},
                          .seed = 5};
  check_against_naive<TestType>(config, 20);
}
