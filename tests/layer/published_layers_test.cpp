#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../naive_layer.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"

/// \file
/// Whole layers of published models whose gates and experts say together what they are, a scalar at a
/// time from their published code.

using namespace moe;
using namespace moe::test;

namespace {

using Row = std::vector<double>;
using Layer = MoELayer<Expert<FeedForward, double>, SharedExpertGate<TopKGate<double>>>;

std::size_t at(Index i) { return static_cast<std::size_t>(i); }

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

Row row_of(const Matrix<double>& x, Index t) {
  return {x.row(t).data(), x.row(t).data() + x.cols()};
}
/// x·W.
Row times(const Row& x, const Matrix<double>& w) {
  Row y(at(w.cols()), 0.0);
  for (Index i = 0; i < w.rows(); ++i) {
    for (Index j = 0; j < w.cols(); ++j) y[at(j)] += x[at(i)] * w(i, j);
  }
  return y;
}
Row scaled(double factor, Row x) {
  for (double& v : x) v *= factor;
  return x;
}
void add(const Row& x, Row& to) {
  for (std::size_t i = 0; i < x.size(); ++i) to[i] += x[i];
}

/// A SwiGLU without biases, of expert e.
Row swiglu(const Named& w, Index e, const Row& x) {
  const std::string expert = "experts." + std::to_string(e) + ".";
  const Row gate = times(x, w.at(expert + "gate.weight"));
  Row hidden = times(x, w.at(expert + "up.weight"));
  for (std::size_t j = 0; j < hidden.size(); ++j) hidden[j] *= silu(gate[j]);
  return times(hidden, w.at(expert + "down.weight"));
}

/// One of width n·H, of which experts 0, 1, ..., n - 1 have the columns.
Row wide_swiglu(const Named& w, Index n, const Row& x) {
  Row y(x.size(), 0.0);
  for (Index e = 0; e < n; ++e) add(swiglu(w, e, x), y);
  return y;
}
Row softmax(Row c) {
  double sum = 0;
  for (double& v : c) sum += v = std::exp(v);
  return scaled(1 / sum, c);
}

/// The experts of the k largest logits.
std::vector<Index> top(const Row& logits, Index k) {
  std::vector<Index> order(logits.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<Index>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return logits[at(a)] > logits[at(b)]; });
  order.resize(at(k));
  return order;
}

/// A layer against f(w, x), the y of one token by the layer's parameters w, in training and served, and
/// its gradients against differences.
template <class AnyLayer, class F>
void check_published(const typename AnyLayer::Config& config, const F& f) {
  AnyLayer layer(config);
  randomize(layer, 5, 0.6);
  Matrix<double> x = random_matrix(8, config.width, 6);
  const Named w = values_of(layer);
  typename AnyLayer::Tape tape;
  const Matrix<double> y = layer.forward(x, tape, {.step = 0});
  const Matrix<double> served = layer.evaluate(x);
  for (Index t = 0; t < x.rows(); ++t) {
    const Row expected = f(w, row_of(x, t));
    for (Index d = 0; d < x.cols(); ++d) {
      CHECK_THAT(y(t, d), Catch::Matchers::WithinAbs(expected[at(d)], 1e-13));
    }
  }
  CHECK(same_bits(served, y));
  const Threads threads(1);
  const Matrix<double> r = random_matrix(8, config.width, 7);
  const Matrix<double> dx = layer.backward(r, tape);
  const auto loss = [&] {
    typename AnyLayer::Tape fresh;
    return layer.forward(x, fresh, {.step = 0}).cwiseProduct(r).sum();
  };
  check_scaled_gradients(layer, dx, x, loss, 0.6, 1, 1);
}

}  // namespace

TEST_CASE("published layers: Llama 4", "[layer]") {
  check_published<Layer>(
      {.width = 4,
       .expert =
           {.hidden = 3, .activation = Activation::silu, .gated = true, .weighted_input = true},
       .gate = {.shared = 1, .routed = {.experts = 5, .top_k = 1, .score = Score::sigmoid}},
       .seed = 1},
      [](const Named& w, const Row& x) {
        const Row logits = times(x, w.at("gate.routed.weight"));
        const Index e = top(logits, 1)[0];
        Row y = swiglu(w, 0, x);
        add(swiglu(w, 1 + e, scaled(sigmoid(logits[at(e)]), x)), y);
        return y;
      });
}

TEST_CASE("published layers: DeepSeek-V3 and GLM-4-MoE, whose shared expert is n times as wide",
          "[layer]") {
  for (const Index n : {1, 2}) {
    check_published<Layer>({.width = 4,
                            .expert = {.hidden = 2, .activation = Activation::silu, .gated = true},
                            .gate = {.shared = n,
                                     .routed = {.experts = 5,
                                                .top_k = 2,
                                                .score = Score::sigmoid,
                                                .renormalise = true,
                                                .renormalise_epsilon = 1e-20,
                                                .scale = 2.5,
                                                .selection_bias = true}},
                            .seed = 1},
                           [&](const Named& w, const Row& x) {
                             Row s = times(x, w.at("gate.routed.weight"));
                             for (double& v : s) v = sigmoid(v);
                             Row choice = s;
                             add(row_of(w.at("gate.routed.selection_bias"), 0), choice);
                             const auto chosen = top(choice, 2);
                             const double sum = s[at(chosen[0])] + s[at(chosen[1])];
                             Row y = wide_swiglu(w, n, x);
                             for (const Index e : chosen) {
                               add(scaled(2.5 * s[at(e)] / sum, swiglu(w, n + e, x)), y);
                             }
                             return y;
                           });
  }
}

TEST_CASE("published layers: Qwen2-MoE and Qwen3-Next, whose shared expert is 3 times as wide",
          "[layer]") {
  for (const bool renormalise : {false, true}) {
    check_published<Layer>(
        {.width = 4,
         .expert = {.hidden = 2, .activation = Activation::silu, .gated = true},
         .gate = {.shared = 3,
                  .gated = true,
                  .tied = true,
                  .routed = {.experts = 5, .top_k = 2, .renormalise = renormalise}},
         .seed = 1},
        [&](const Named& w, const Row& x) {
          const double gate = sigmoid(times(x, w.at("gate.shared_weight"))[0]);
          Row y = scaled(gate, wide_swiglu(w, 3, x));
          const Row p = softmax(times(x, w.at("gate.routed.weight")));
          const auto chosen = top(p, 2);
          const double sum = renormalise ? p[at(chosen[0])] + p[at(chosen[1])] : 1;
          for (const Index e : chosen) add(scaled(p[at(e)] / sum, swiglu(w, 3 + e, x)), y);
          return y;
        });
  }
}

TEST_CASE("published layers: Cohere2-MoE, the average of shared and routed experts", "[layer]") {
  check_published<Layer>(
      {.width = 4,
       .expert = {.hidden = 2, .activation = Activation::silu, .gated = true},
       .gate =
           {.shared = 2,
            .scale = 0.5,
            .routed = {.experts = 5, .top_k = 2, .score = Score::softmax_of_chosen, .scale = 0.5}},
       .seed = 1},
      [](const Named& w, const Row& x) {
        Row y = wide_swiglu(w, 2, x);
        const Row c = times(x, w.at("gate.routed.weight"));
        const auto chosen = top(c, 2);
        const Row weight = softmax({c[at(chosen[0])], c[at(chosen[1])]});
        for (std::size_t k = 0; k < 2; ++k) {
          add(scaled(weight[k], swiglu(w, 2 + chosen[k], x)), y);
        }
        return scaled(0.5, y);
      });
}

TEST_CASE("published layers: LongCat-Flash, with experts that compute nothing", "[layer]") {
  using Plain = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  Index identities = 0;
  check_published<Plain>({.width = 4,
                          .expert = {.hidden = 3, .activation = Activation::silu, .gated = true},
                          .gate = {.experts = 8, .top_k = 4, .scale = 6, .selection_bias = true},
                          .identity_experts = 4,
                          .seed = 1},
                         [&](const Named& w, const Row& x) {
                           const Row p = softmax(times(x, w.at("gate.weight")));
                           Row choice = p;
                           add(row_of(w.at("gate.selection_bias"), 0), choice);
                           Row y(x.size(), 0.0);
                           for (const Index e : top(choice, 4)) {
                             identities += e >= 4;
                             add(scaled(6 * p[at(e)], e < 4 ? swiglu(w, e, x) : x), y);
                           }
                           return y;
                         });
  CHECK(identities > 5);
}
