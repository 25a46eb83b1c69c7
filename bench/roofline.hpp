#pragma once

#include <algorithm>

#include "machine.hpp"

/// \file
/// The time that the machine cannot beat:
///
///     roofline = max(operations / multiply_add_peak, bytes / read_bandwidth)
///
/// Operations of a forward pass, a multiply-add being two:
///
///     2·T·D·E·(products of the gate: 2 with noise, 1 in evaluate, 0 for a fixed gate)
///     + 2·S·(2·D·H)
///
/// and twice as many backward. Bytes are those that no implementation is spared, each pass reading
/// or writing every number once:
///
///     forward     weights of the experts used and of the gate, x, y, tape
///     evaluate    the same without the tape
///     backward    weights, gradients of the weights, x, dx, dy, tape
///
/// where the tape is what the passes hand over beside x: S x H pre-activations, and of each slot an
/// index and a weight. If all of them together fit into L3, bytes count nothing.
/// What the library moves beyond that (a copy of x, the rows before they are added up, gradients
/// that are read before they are added to) is its own fault and lowers its fraction.

namespace bench {

struct Shape {
  Index tokens;
  Index width;
  Index hidden;
  Index experts;
  Index top_k;
  Index gate_products = 2;

  Index slots() const { return tokens * top_k; }
};

struct Work {
  double operations = 0;
  double bytes = 0;     ///< moved
  double resident = 0;  ///< of different numbers among them
};

namespace detail {

struct Bytes {
  double weights;
  double rows;  ///< of one T x D matrix
  double tape;
};

template <class Scalar>
Bytes bytes_of(const Shape& s, Index used_experts) {
  const Index expert = 2 * s.width * s.hidden + s.width + s.hidden;
  const Index gate = s.gate_products * s.width * s.experts;
  const auto scalars = [](Index count) { return static_cast<double>(count) * sizeof(Scalar); };
  return {scalars(used_experts * expert + gate), scalars(s.tokens * s.width),
          scalars(s.slots() * (s.hidden + 1)) + static_cast<double>(s.slots()) * sizeof(Index)};
}

inline double forward_operations(const Shape& s) {
  return 2 * static_cast<double>(s.tokens * s.width * s.experts * s.gate_products) +
         4 * static_cast<double>(s.slots()) * static_cast<double>(s.width * s.hidden);
}

}  // namespace detail

template <class Scalar>
Work forward_work(const Shape& shape, Index used_experts) {
  const detail::Bytes b = detail::bytes_of<Scalar>(shape, used_experts);
  const double bytes = b.weights + 2 * b.rows + b.tape;
  return {detail::forward_operations(shape), bytes, bytes};
}

template <class Scalar>
Work evaluate_work(const Shape& shape, Index used_experts) {
  const detail::Bytes b = detail::bytes_of<Scalar>(shape, used_experts);
  const double bytes = b.weights + 2 * b.rows;
  return {detail::forward_operations(shape), bytes, bytes};
}

/// Forward and backward.
template <class Scalar>
Work step_work(const Shape& shape, Index used_experts) {
  const detail::Bytes b = detail::bytes_of<Scalar>(shape, used_experts);
  return {3 * detail::forward_operations(shape), 3 * b.weights + 5 * b.rows + 2 * b.tape,
          2 * b.weights + 4 * b.rows + b.tape};
}

template <class Scalar>
double roofline_seconds(const Work& work, Index threads) {
  const double arithmetic = work.operations / multiply_add_peak<Scalar>(threads);
  if (work.resident <= last_level_cache()) return arithmetic;
  return std::max(arithmetic, work.bytes / read_bandwidth(threads));
}

/// Experts that got a slot.
template <class Scalar>
Index used_experts(const moe::Dispatch<Scalar>& dispatch) {
  Index used = 0;
  for (Index e = 0; e < dispatch.experts(); ++e) used += dispatch.slots_of(e) > 0 ? 1 : 0;
  return used;
}

}  // namespace bench
