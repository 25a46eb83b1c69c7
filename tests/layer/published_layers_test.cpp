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
