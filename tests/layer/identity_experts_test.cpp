#include "moe/layer/identity_experts.hpp"

#include <limits>
#include <vector>

#include "change_experts.hpp"
#include "layers.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// 3 networks and 4 experts that are the identity.
template <class Scalar>
Layer<Scalar> identity_layer(Activation output = Activation::identity) {
  Layer<Scalar> layer({.width = 70,
                       .expert = {.hidden = 40, .activation = Activation::gelu},
                       .gate = {.experts = 7, .top_k = 4},
                       .identity_experts = 4,
                       .output = output,
                       .seed = 5});
  randomize(layer, 7, 0.3);
  return layer;
}

}  // namespace

TEST_CASE("identity experts: two tokens worked by hand", "[layer]") {
  Routing<double> routing;
  routing.experts = 4;  // of which 2 and 3 are the identity
  routing.token_offsets = {0, 3, 4};
  routing.expert = {0, 2, 3, 2};
  routing.weight = {5, 0.5, 0.25, 2};
  Dispatch<double> dispatch;
  sort_by_expert(routing, dispatch);
  const Matrix<double> x{{4, 8}, {1, 3}};
  Matrix<double> sum{{1, 1}, {1, 1}};
  detail::add_identity_experts<double>(dispatch, 2, x, sum);
  CHECK(sum == Matrix<double>{{4, 7}, {3, 7}});
  IndexedVector<double> dweight(4, -1.0);
  detail::identity_weight_gradients<double>(dispatch, 2, x, Matrix<double>{{1, 1}, {2, 0}},
                                            dweight);
  // By expert: 0 of token 0; 2 of tokens 0 and 1; 3 of token 0.
  CHECK(dweight == IndexedVector<double>{-1, 12, 2, 12});
}

TEST_CASE("identity experts: gradients are derivatives, behind an activation too", "[layer]") {
  for (const Activation output : {Activation::identity, Activation::tanh}) {
    Layer<double> layer({.width = 3,
                         .expert = {.hidden = 4, .activation = Activation::gelu},
                         .gate = {.experts = 5, .top_k = 3, .noise = false},
                         .identity_experts = 2,
                         .output = output,
                         .seed = 6});
    randomize(layer, 3, 0.7);
    Matrix<double> x = random_matrix(5, 3, 2);
    Layer<double>::Tape tape;
    layer.forward(x, tape, {.step = 0});
    REQUIRE(choice_margin(tape.gate.clean, 3) > 2e-3);
    CHECK(tape.dispatch.slots_of(3) + tape.dispatch.slots_of(4) > 3);
    check_against_differences(layer, x, {.step = 0}, random_matrix(5, 3, 8), 0.7, 1);
  }
}

TEMPLATE_TEST_CASE("identity experts: the same bits on any number of threads, alone and in a batch",
                   "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer = identity_layer<S>(Activation::sigmoid);
  const Matrix<S> x = random_matrix<S>(300, 70, 1);
  const Matrix<S> r = random_matrix<S>(300, 70, 2);
  const auto run = [&](int count) {
    const Threads threads(count);
    return std::pair{Everything<S>(layer, x, r), layer.evaluate(x)};
  };
  const auto one = run(1);
  for (const int count : {2, 3, 8}) {
    const auto several = run(count);
    CHECK(several.first.same_as(one.first));
    CHECK(same_bits(several.second, one.second));
  }
  for (const Index t : {0, 17, 299}) {
    CHECK(same_bits(layer.evaluate(x.row(t)), one.second.row(t)));
  }
}

TEST_CASE("identity experts: have no parameters, and padding is not read", "[layer]") {
  Layer<double> layer = identity_layer<double>();
  CHECK(layer.experts().size() == 3);
  for_each_parameter(layer, [](const std::string& name, const Parameter<double>&) {
    CHECK_FALSE(name.starts_with("experts.3"));
  });
  Matrix<double> x = random_matrix(4, 70, 1);
  const Matrix<double> clean = x;
  x.row(2).setConstant(std::numeric_limits<double>::quiet_NaN());
  const std::vector<std::uint8_t> valid{1, 1, 0, 1};
  Layer<double>::Tape tape;
  const Matrix<double> y = layer.forward(x, tape, {.step = 0, .valid = valid});
  CHECK(y.row(2).isZero(0));
  const Matrix<double> dx = layer.backward(random_matrix(4, 70, 2), tape);
  CHECK(dx.allFinite());
  CHECK(dx.row(2).isZero(0));
  CHECK(y.allFinite());
}

TEST_CASE("identity experts: stay behind networks that come and go", "[layer][change]") {
  using test::change::TopK;
  MoELayer<Expert<FeedForward, double>, TopK> layer(
      {.width = 5,
       .expert = {.hidden = 7},
       .gate = {.experts = 5, .top_k = 2, .bias = true, .score = Score::sigmoid},
       .identity_experts = 2,
       .seed = 3});
  randomize(layer, 4, 0.5);
  const Matrix<double> x = random_matrix(30, 5, 8);
  const Named before = values_of(layer);
  decltype(layer)::Tape old;
  layer.forward(x, old, {.step = 0});
  layer.add_experts(1, 7);
  CHECK(layer.gate().experts() == 6);
  CHECK(layer.experts().size() == 4);
  Named now = values_of(layer);
  CHECK(same_bits(now.at("gate.weight").leftCols(3), before.at("gate.weight").leftCols(3)));
  CHECK(same_bits(now.at("gate.weight").rightCols(2), before.at("gate.weight").rightCols(2)));
  CHECK(same_bits(now.at("gate.bias").rightCols(2), before.at("gate.bias").rightCols(2)));
  CHECK_THROWS_AS(layer.backward(x, old), std::invalid_argument);
  layer.remove_experts({3});
  now = values_of(layer);
  CHECK(test::change::same_values(now, before));
  CHECK_THROWS_WITH(layer.remove_experts({3}),
                    "moe: MoELayer::remove_experts: expert = 3, must be at least 0 and below 3");
  CHECK_THROWS_WITH(layer.copy_experts({4}, {.seed = 1}),
                    "moe: MoELayer::copy_experts: expert = 4, must be at least 0 and below 3");
  layer.copy_experts({1}, {.seed = 1});
  now = values_of(layer);
  CHECK(same_bits(now.at("gate.weight").col(3), before.at("gate.weight").col(1)));
  CHECK(same_bits(now.at("gate.weight").rightCols(2), before.at("gate.weight").rightCols(2)));
  CHECK_THROWS_WITH(
      layer.replace_expert(4, layer.experts()[0]),
      "moe: MoELayer::replace_expert: expert = 4, must be one of this process and below 4");
}

TEST_CASE("identity experts: the tape of a layer with another number of them is refused",
          "[layer]") {
  const auto make = [](Index identity_experts) {
    return Layer<double>({.width = 3,
                          .expert = {.hidden = 4},
                          .gate = {.experts = 5, .top_k = 2},
                          .identity_experts = identity_experts,
                          .seed = 6});
  };
  Layer<double> one = make(1);
  Layer<double> two = make(2);
  const Matrix<double> x = random_matrix(6, 3, 1);
  Layer<double>::Tape tape;
  one.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(
      two.backward(x, tape),
      "moe: MoELayer::backward: the tape is another layer's, of 4 experts that are not the"
      " identity");
  CHECK_NOTHROW(one.backward(x, tape));
}
