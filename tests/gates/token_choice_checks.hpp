#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "../naive_layer.hpp"
#include "gates.hpp"

/// \file
/// What the tests of gates have in common whose experts choose their tokens.

namespace moe::test {

/// Calls f(t, i, slot) for every slot, i being its expert.
template <class Scalar, class F>
void for_each_slot(const Routing<Scalar>& routing, F&& f) {
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index s = routing.token_offsets[detail::to_size(t)];
         s < routing.token_offsets[detail::to_size(t) + 1]; ++s) {
      f(t, routing.expert[detail::to_size(s)], detail::to_size(s));
    }
  }
}

/// The weights by token and expert, 0 where there is no slot.
template <class Scalar>
Matrix<Scalar> dense_weights(const Routing<Scalar>& routing) {
  Matrix<Scalar> G = Matrix<Scalar>::Zero(routing.tokens(), routing.experts);
  for_each_slot(routing, [&](Index t, Index i, std::size_t s) { G(t, i) = routing.weight[s]; });
  return G;
}

/// Softmax of each row, from the formula.
inline Matrix<double> naive_softmax(const Matrix<double>& c) {
  Matrix<double> p(c.rows(), c.cols());
  for (Index t = 0; t < c.rows(); ++t) {
    double total = 0;
    for (Index i = 0; i < c.cols(); ++i) total += std::exp(c(t, i));
    for (Index i = 0; i < c.cols(); ++i) p(t, i) = std::exp(c(t, i)) / total;
  }
  return p;
}

inline Matrix<double> naive_scores(const Matrix<double>& x, const Matrix<double>& w) {
  Matrix<double> c = Matrix<double>::Zero(x.rows(), w.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index i = 0; i < w.cols(); ++i) {
      for (Index d = 0; d < x.cols(); ++d) c(t, i) += x(t, d) * w(d, i);
    }
  }
  return c;
}

/// 1 where fewer than `count` tokens are better than t in column i.
template <class Scalar>
Matrix<double> naive_column_mask(const Matrix<Scalar>& scores, Index count) {
  const auto key = [&](Index t, Index i) {
    return std::isnan(scores(t, i)) ? -std::numeric_limits<Scalar>::infinity() : scores(t, i);
  };
  Matrix<double> mask(scores.rows(), scores.cols());
  for (Index i = 0; i < scores.cols(); ++i) {
    for (Index t = 0; t < scores.rows(); ++t) {
      Index better = 0;
      for (Index u = 0; u < scores.rows(); ++u) {
        better += key(u, i) > key(t, i) || (key(u, i) == key(t, i) && u < t) ? 1 : 0;
      }
      mask(t, i) = better < count ? 1 : 0;
    }
  }
  return mask;
}

/// The smallest gap, relative to the column's largest entry, between an expert's last token inside
/// and its first outside.
inline double column_margin(const Matrix<double>& p, Index count) {
  double margin = std::numeric_limits<double>::infinity();
  for (Index i = 0; i < p.cols() && count > 0 && count < p.rows(); ++i) {
    std::vector<double> column;
    for (Index t = 0; t < p.rows(); ++t) column.push_back(p(t, i));
    std::sort(column.begin(), column.end(), std::greater<>());
    const double gap = column[detail::to_size(count) - 1] - column[detail::to_size(count)];
    margin = std::min(margin, gap / column.front());
  }
  return margin;
}

/// The invariants of a routing: offsets that ascend, experts of a token that ascend, and after
/// sort_by_expert() each slot once, in the list of its expert, in the order of tokens.
template <class Scalar>
void check_routing(const Routing<Scalar>& routing, Index tokens, Index experts) {
  REQUIRE(routing.experts == experts);
  REQUIRE(routing.tokens() == tokens);
  REQUIRE(std::is_sorted(routing.token_offsets.begin(), routing.token_offsets.end()));
  Dispatch<Scalar> dispatch;
  REQUIRE_NOTHROW(sort_by_expert(routing, dispatch));
  REQUIRE(std::is_sorted(dispatch.offsets.begin(), dispatch.offsets.end()));
  REQUIRE(dispatch.offsets.back() == routing.slots());
  std::vector<int> seen(routing.expert.size());
  for (Index e = 0; e < experts; ++e) {
    for (Index position = dispatch.offsets[e]; position < dispatch.offsets[e + 1]; ++position) {
      const Index slot = dispatch.sorted_slot[position];
      ++seen[detail::to_size(slot)];
      REQUIRE(routing.expert[slot] == e);
    }
  }
  REQUIRE(std::count(seen.begin(), seen.end(), 1) == routing.slots());
}

/// Calls f(x, t) for x of 8 tokens of which t has NaN or an infinity in it.
template <class Scalar, class F>
void for_each_spoilt_batch(F&& f) {
  using Limits = std::numeric_limits<Scalar>;
  constexpr Index spoilt = 2;
  for (const Scalar bad : {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()}) {
    Matrix<Scalar> x = random_matrix<Scalar>(8, 3, 2);
    x(spoilt, 1) = bad;
    f(x, spoilt);
  }
}

/// Of the routing of such a batch: token t has `slots` slots, and no other's weights are NaN.
template <class Scalar>
void check_spoilt_token(const Routing<Scalar>& routing, Index experts, Index spoilt, Index slots) {
  check_routing(routing, 8, experts);
  for_each_slot(routing, [&](Index t, Index, std::size_t s) {
    CHECK(std::isnan(routing.weight[s]) == (t == spoilt));
  });
  CHECK(routing.slots_of_token(spoilt).count == slots);
}

/// What a gate of this configuration leaves on a tape, of 10 tokens, is refused by others in these words.
template <class Gate>
void check_foreign_tape(const typename Gate::Config& own,
                        const std::vector<typename Gate::Config>& others,
                        const std::string& message) {
  using Scalar = typename Gate::Scalar;
  const Matrix<Scalar> x = random_matrix<Scalar>(10, own.width, 2);
  typename Gate::Tape tape;
  Gate(own, 1).forward(x, tape, {.step = 0});
  const std::vector<Scalar> dweight(tape.routing.weight.size(), Scalar(0.5));
  for (const auto& config : others) {
    Gate other(config, 0);
    CHECK_THROWS_WITH(gate_dx(other, x, std::span<const Scalar>(dweight), tape), message);
  }
}

/// Checks every weight of a gate of noisy scores, and x, at a point away from ties: there
/// `margin(gate, tape)` is no longer small.
template <class Gate, class Margin>
void check_gate_gradients(const typename Gate::Config& config, Index tokens, double weight_scale,
                          double x_scale, const Margin& margin) {
  Gate gate(config, 77);
  typename Gate::Tape tape;
  const Pass key{.step = 3, .first_token = 5};
  Matrix<double> x;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 400; ++seed) {
    randomize(gate, seed, weight_scale);
    x = random_matrix(tokens, config.width, seed, x_scale);
    gate.forward(x, tape, key);
    clear = margin(gate, tape) > 2e-3;
  }
  REQUIRE(clear);
  const Matrix<double> r = random_matrix(tokens, gate.experts(), 8);
  const Matrix<double> dx = gate_dx(gate, x, dweight_of(tape.routing, r), tape);

  // e^h and Φ are steep where scores are large.
  const double steep = weight_scale * x_scale > 5 ? 0.02 : 1;
  const auto loss = [&] { return loss_of(gate, x, r, key); };
  check_scaled_gradients(gate, dx, x, loss, weight_scale, x_scale, steep);
}

/// Gradients of a whole layer with this gate against differences, away from the gate's ties:
/// `is_clear(gate, tape)` says whether a point is.
template <class Layer, class IsClear>
void check_layer_gradients(const typename Layer::Config& config, Index tokens,
                           const IsClear& is_clear) {
  Layer layer(config);
  typename Layer::Tape tape;
  Matrix<double> x;
  bool clear = false;
  for (std::uint64_t seed = 1; !clear && seed < 200; ++seed) {
    randomize(layer, seed, 0.7);
    x = random_matrix(tokens, config.width, seed);
    layer.forward(x, tape, {.step = 2});
    clear = is_clear(layer.gate(), tape);
  }
  REQUIRE(clear);
  const Matrix<double> r = random_matrix(tokens, config.width, 8);
  const Matrix<double> dx = layer.backward(r, tape);
  const auto loss = [&] {
    typename Layer::Tape pass;
    const double y = layer.forward(x, pass, {.step = 2}).cwiseProduct(r).sum();
    return y + pass.balance().loss;
  };
  CHECK(relative_error(dx, difference_gradient(x, loss)) < 1e-7);
  check_parameter_gradients(layer, loss);
}

/// Everything that forward, backward and evaluate leave has the same bits on 1, 2, 3 and 8 threads.
template <class Gate>
void check_threads(const typename Gate::Config& config, Index tokens) {
  using Scalar = typename Gate::Scalar;
  struct Result {
    Routing<Scalar> training, serving;
    Scalar loss;
    Matrix<Scalar> dx;
    Named gradients;
  };
  const Matrix<Scalar> x = random_matrix<Scalar>(tokens, config.width, 5);
  const auto run = [&](int count) {
    const Threads threads(count);
    Gate gate(config, 3);
    typename Gate::Tape tape;
    Result result;
    result.training = gate.forward(x, tape, {.step = 1});
    result.loss = tape.balance.loss;
    std::vector<Scalar> dweight(tape.routing.expert.size());
    for (std::size_t s = 0; s < dweight.size(); ++s) {
      dweight[s] = static_cast<Scalar>(s % 7) - Scalar{3};
    }
    result.dx = gate_dx<Gate>(gate, x, dweight, tape);
    result.gradients = gradients_of(gate);
    gate.evaluate(x, tape);
    result.serving = tape.routing;
    return result;
  };
  const Result one = run(1);
  for (const int count : {2, 3, 8}) {
    INFO(count << " threads");
    const Result other = run(count);
    for (const auto& [a, b] :
         {std::pair{&one.training, &other.training}, std::pair{&one.serving, &other.serving}}) {
      CHECK(a->token_offsets == b->token_offsets);
      CHECK(a->expert == b->expert);
      CHECK(a->weight == b->weight);
    }
    CHECK(one.loss == other.loss);
    CHECK(same_bits(one.dx, other.dx));
    for (const auto& [name, gradient] : one.gradients) {
      CHECK(same_bits(gradient, other.gradients.at(name)));
    }
  }
}

}  // namespace moe::test
