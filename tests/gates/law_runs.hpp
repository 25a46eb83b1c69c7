#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "laws.hpp"

/// \file
/// Passes of a gate of any law, what they leave, and whether two left the same.

namespace moe::test {

/// A gate of a law with random parameters.
template <class Law>
typename Law::Gate make_gate(std::uint64_t parameters = 1,
                             const typename Law::Config& config = Law::config()) {
  typename Law::Gate gate(config, Law::seed);
  randomize(gate, parameters, 0.7);
  Law::prepare(gate);
  return gate;
}

/// As many random rows as the sequences of any law divide.
template <class Law>
Matrix<typename Law::Scalar> random_rows(Index rows = 12, std::uint64_t seed = 1) {
  return random_matrix<typename Law::Scalar>(rows, Law::config().width, seed);
}
/// The gradients w.r.t. the weights, by row and expert.
template <class Law>
Matrix<typename Law::Scalar> random_dweight(Index rows = 12, std::uint64_t seed = 8) {
  static const Index experts = typename Law::Gate(Law::config(), 0).experts();
  return random_matrix<typename Law::Scalar>(rows, experts, seed);
}

/// A gate after forward() and backward() of a pass, with what these left.
template <class Law>
struct GateRun {
  using Scalar = typename Law::Scalar;

  GateRun(typename Law::Gate fresh, const Matrix<Scalar>& x, const Matrix<Scalar>& r,
          const Pass& pass)
      : gate(std::move(fresh)) {
    gate.forward(x, tape, pass);
    dx = gate_dx<typename Law::Gate>(gate, x, dweight_of(tape.routing, r), tape);
  }

  typename Law::Gate gate;
  typename Law::Tape tape;
  Matrix<Scalar> dx;
};

template <class Scalar>
std::array<Scalar, 6> as_array(const GateLosses<Scalar>& losses) {
  return {losses.importance, losses.load, losses.switch_loss,
          losses.sequence,   losses.z,    losses.threshold};
}
template <class Scalar>
bool same_balance(const Balance<Scalar>& a, const Balance<Scalar>& b) {
  return a.loss == b.loss && as_array(a.losses) == as_array(b.losses) &&
         same_bits(a.importance, b.importance) && same_bits(a.load, b.load) &&
         a.tokens_per_expert == b.tokens_per_expert;
}
template <class Scalar>
bool same_routing(const Routing<Scalar>& a, const Routing<Scalar>& b) {
  return a.experts == b.experts && a.token_offsets == b.token_offsets && a.expert == b.expert &&
         a.weight == b.weight;
}
inline bool same_bits(const Named& a, const Named& b) {
  return std::ranges::equal(a, b, [](const auto& x, const auto& y) {
    return x.first == y.first && same_bits(x.second, y.second);
  });
}

/// Whether two passes chose, lost and learned the same, to the last bit.
template <class Law>
void check_same(GateRun<Law>& a, GateRun<Law>& b) {
  CHECK(same_routing(a.tape.routing, b.tape.routing));
  CHECK(same_balance(a.tape.balance, b.tape.balance));
  CHECK(same_bits(a.dx, b.dx));
  CHECK(same_bits(gradients_of(a.gate), gradients_of(b.gate)));
}

/// Gradients of a pass against differences, at a point where no step of them crosses a tie, of a gate
/// that change(gate) has changed.
template <class Law, class Change>
void check_gradients(const Pass& pass, Index rows, const Change& change) {
  const Matrix<double> r = random_dweight<Law>(rows);
  for (std::uint64_t seed = 1; seed < 100; ++seed) {
    auto gate = make_gate<Law>(seed);
    change(gate);
    Matrix<double> x = random_rows<Law>(rows, seed);
    typename Law::Tape tape;
    gate.forward(x, tape, pass);
    bool same = true;
    const auto loss = [&] {
      typename Law::Tape fresh;
      const Routing<double>& routing = gate.forward(x, fresh, pass);
      same = same && Law::choices(fresh) == Law::choices(tape);
      const std::vector<double> dweight = dweight_of(routing, r);
      double sum = fresh.balance.loss;
      for (std::size_t s = 0; s < dweight.size(); ++s) sum += routing.weight[s] * dweight[s];
      return sum;
    };
    difference_gradient(x, loss);
    visit_each(gate, [&](const std::string&, Parameter<double>& p) {
      if (same) difference_gradient(p.value, loss, 0.7e-4);
    });
    if (!same) continue;
    const Matrix<double> dx = gate_dx(gate, x, dweight_of(tape.routing, r), tape);
    check_scaled_gradients(gate, dx, x, loss, 0.7, 1, 1);
    return;
  }
  FAIL("no point away from ties");
}
template <class Law>
void check_gradients(const Pass& pass) {
  check_gradients<Law>(pass, 12, [](typename Law::Gate&) {});
}

using Mask = std::vector<std::uint8_t>;  ///< Pass::valid

/// The valid rows.
template <class Scalar>
Matrix<Scalar> compacted(const Matrix<Scalar>& matrix, const Mask& valid) {
  Matrix<Scalar> rows(std::count_if(valid.begin(), valid.end(), [](auto v) { return v != 0; }),
                      matrix.cols());
  Index to = 0;
  for (Index row = 0; row < matrix.rows(); ++row) {
    if (valid[detail::to_size(row)] != 0) rows.row(to++) = matrix.row(row);
  }
  return rows;
}

/// NaN and infinity in rows that must not be read.
template <class Scalar>
void spoil_padding(const Mask& valid, Matrix<Scalar>& matrix) {
  using Limits = std::numeric_limits<Scalar>;
  const Scalar bad[] = {Limits::quiet_NaN(), Limits::infinity(), -Limits::infinity()};
  for (Index row = 0; row < matrix.rows(); ++row) {
    if (valid[detail::to_size(row)] == 0) matrix.row(row).setConstant(bad[row % 3]);
  }
}

}  // namespace moe::test
