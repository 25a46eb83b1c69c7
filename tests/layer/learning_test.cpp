#include "../support.hpp"
#include "moe/layer/moe_layer.hpp"

using namespace moe;
using test::random_matrix;

namespace {

/// Adam with the usual constants, written out.
template <class Layer>
class PlainAdam {
 public:
  void update(Layer& layer, double rate) {
    ++steps_;
    std::size_t index = 0;
    for_each_parameter(layer, [&](const ParameterName&, Parameter<double>& p) {
      if (index == m_.size()) {
        m_.emplace_back(Matrix<double>::Zero(p.value.rows(), p.value.cols()));
        v_.emplace_back(Matrix<double>::Zero(p.value.rows(), p.value.cols()));
      }
      m_[index] = 0.9 * m_[index] + 0.1 * p.gradient();
      v_[index] = 0.999 * v_[index] + 0.001 * p.gradient().cwiseAbs2();
      const double first = 1 - std::pow(0.9, steps_);
      const double second = 1 - std::pow(0.999, steps_);
      p.value.array() -=
          rate * (m_[index].array() / first) / ((v_[index].array() / second).sqrt() + 1e-8);
      ++index;
    });
    zero_gradients(layer);
  }

 private:
  std::vector<Matrix<double>> m_, v_;
  int steps_ = 0;
};

/// Two clouds of tokens, and for each cloud another linear map: y = x·A on one side, y = -x·A on
/// the other. A linear map of all tokens can do little about it.
struct Problem {
  static constexpr Index tokens = 256;
  explicit Problem(std::uint64_t seed) : x(random_matrix(tokens, 4, seed)) {
    const Matrix<double> map = random_matrix(4, 4, 99);
    for (Index t = 0; t < x.rows(); ++t) {
      const double side = t % 2 == 0 ? 1 : -1;
      x(t, 0) += 4 * side;
      x(t, 1) *= 2;
    }
    y = x * map;
    for (Index t = 1; t < x.rows(); t += 2) y.row(t) *= -1;
  }
  double error(const Matrix<double>& guess) const {
    return (guess - y).squaredNorm() / y.squaredNorm();
  }
  Matrix<double> x, y;
};

/// The error of the best affine map, by the normal equations.
double best_affine_error(const Problem& problem) {
  Matrix<double> x(problem.x.rows(), 5);
  x << problem.x, Matrix<double>::Ones(problem.x.rows(), 1);
  Matrix<double> normal = x.transpose() * x;
  Matrix<double> right = x.transpose() * problem.y;
  // Gauss-Jordan without pivots: the matrix is positive definite.
  for (Index i = 0; i < 5; ++i) {
    right.row(i) /= normal(i, i);
    normal.row(i) /= Matrix<double>(normal)(i, i);
    for (Index j = 0; j < 5; ++j) {
      if (j == i) continue;
      const double factor = normal(j, i);
      normal.row(j) -= factor * normal.row(i);
      right.row(j) -= factor * right.row(i);
    }
  }
  return problem.error(x * right);
}

}  // namespace

TEST_CASE("learning: a layer splits a problem that its experts can only solve apart",
          "[layer][learning]") {
  using Layer = MoELayer<Expert<FeedForward, double>>;
  const test::Threads threads(1);  // too small for more
  const Problem training(1);
  const Problem held_out(2);
  const double single = best_affine_error(held_out);
  CHECK(single > 0.2);
  // Each expert is linear, and so is any fixed mixture of them.
  Layer layer({.width = 4,
               .expert = {.hidden = 4, .activation = Activation::identity},
               .gate = {.experts = 4, .top_k = 2},
               .seed = 3});
  PlainAdam<Layer> adam;
  Layer::Tape tape;
  double start = 0;
  for (std::uint64_t step = 0; step < 300; ++step) {
    const Matrix<double>& y = layer.forward(training.x, tape, {.step = step});
    if (step == 0) start = training.error(y);
    layer.backward(2 * (y - training.y) / static_cast<double>(training.x.rows()), tape);
    adam.update(layer, 0.02);
  }
  const double end = held_out.error(layer.evaluate(held_out.x, tape));
  INFO("best affine map " << single << ", layer " << start << " -> " << end);
  CHECK(end < 0.05 * single);
  CHECK(tape.balance().unused_experts() == 0);
}

TEST_CASE("learning: pre-activations saved in bfloat16 teach as well", "[layer][learning]") {
  using Layer = MoELayer<Expert<FeedForward, double>>;
  const test::Threads threads(1);
  const Problem held_out(2);
  double total[2] = {};
  for (std::uint64_t seed = 3; seed < 6; ++seed) {
    const Problem training(10 * seed);
    double end[2] = {};
    for (const Precision saved : {Precision::full, Precision::bfloat16}) {
      Layer layer({.width = 4,
                   .expert = {.hidden = 16, .activation = Activation::silu, .saved = saved},
                   .gate = {.experts = 4, .top_k = 2},
                   .seed = seed});
      PlainAdam<Layer> adam;
      Layer::Tape tape;
      for (std::uint64_t step = 0; step < 300; ++step) {
        const Matrix<double>& y = layer.forward(training.x, tape, {.step = step});
        layer.backward(2 * (y - training.y) / static_cast<double>(training.x.rows()), tape);
        adam.update(layer, 0.02);
      }
      end[static_cast<int>(saved)] = held_out.error(layer.evaluate(held_out.x, tape));
      total[static_cast<int>(saved)] += end[static_cast<int>(saved)];
    }
    INFO("seed " << seed << ": full " << end[0] << ", bfloat16 " << end[1]);
    CHECK(end[0] < 0.01);
    CHECK(end[1] < 0.01);
    CHECK(end[0] != end[1]);
  }
  INFO("over all seeds: full " << total[0] << ", bfloat16 " << total[1]);
  CHECK(std::abs(total[1] / total[0] - 1) < 0.05);
}

TEST_CASE("learning: the balance losses pull a collapsed gate back", "[layer][learning]") {
  using Layer = MoELayer<Expert<FeedForward, double>>;
  const test::Threads threads(1);
  for (const Index top_k : {1, 2}) {
    INFO(top_k << " active");
    Layer::Config config{
        .width = 4, .expert = {.hidden = 2}, .gate = {.experts = 6, .top_k = top_k}, .seed = 3};
    Layer layer(config);
    Matrix<double> x = random_matrix(128, 4, 1);
    x.col(0).setOnes();
    for_each_parameter(layer, [&](const std::string& name, Parameter<double>& parameter) {
      if (name != "gate.weight") return;
      for (Index e = 0; e < top_k; ++e) parameter.value(0, e) = 3;
    });
    const Matrix<double> no_gradient = Matrix<double>::Zero(128, 4);
    Layer::Tape tape;
    layer.forward(x, tape, {.step = 0});
    const double importance = tape.balance().cv_importance();
    const double load = tape.balance().cv_load();
    CHECK(importance > 1);
    CHECK(load > 1);
    PlainAdam<Layer> adam;
    for (std::uint64_t step = 0; step < 150; ++step) {
      layer.forward(x, tape, {.step = step});
      layer.backward(no_gradient, tape);
      adam.update(layer, 0.05);
    }
    layer.forward(x, tape, {.step = 1000});
    INFO("CV of importance " << importance << " -> " << tape.balance().cv_importance()
                             << ", of load " << load << " -> " << tape.balance().cv_load());
    CHECK(tape.balance().cv_importance() < 0.25);
    CHECK(tape.balance().cv_load() < 0.25);
    CHECK(tape.balance().unused_experts() == 0);
  }
}
