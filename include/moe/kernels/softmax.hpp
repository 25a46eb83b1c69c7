#pragma once

#include <algorithm>
#include <cmath>

#include "moe/kernels/math.hpp"

/// \file
/// The softmax of a row and the gradient of its logarithm: for gates, cross-entropy and REINFORCE.

namespace moe::detail {

/// The largest of `count` >= 1 values; any of them if one is NaN.
template <class Scalar>
Scalar largest(Index count, const Scalar* x) {
  constexpr Index size = packet_size<Scalar>;
  Packet<Scalar> packet = broadcast(x[0]);
  Index i = 0;
  for (; i + size <= count; i += size) packet = Eigen::internal::pmax(packet, load(x + i));
  Scalar result = Eigen::internal::predux_max(packet);
  for (; i < count; ++i) result = std::max(result, x[i]);
  return result;
}

/// Σ e^(x[i] - shift) in one fixed order; the terms go to `terms` unless that is null.
template <class Scalar>
Scalar sum_exponentials(Index count, const Scalar* x, Scalar shift, Scalar* terms) {
  using namespace Eigen::internal;
  constexpr Index size = packet_size<Scalar>;
  const Packet<Scalar> shifts = broadcast(shift);
  Packet<Scalar> sum = broadcast(Scalar{0});
  Index i = 0;
  for (; i + size <= count; i += size) {
    const Packet<Scalar> term = moe::detail::exp<Scalar>(psub(load(x + i), shifts));
    if (terms != nullptr) store(terms + i, term);
    sum = padd(sum, term);
  }
  if (i < count) {
    Scalar rest[packet_size<Scalar>];  // without the lanes past the end, which are e^-shift
    store(rest, moe::detail::exp<Scalar>(psub(load_first(x + i, count - i), shifts)));
    if (terms != nullptr) std::copy_n(rest, count - i, terms + i);
    sum = padd(sum, load_first(rest, count - i));
  }
  return predux(sum);
}

/// The softmax of a row of logits: e^(x[i] - shift) / sum.
template <class Scalar>
struct SoftmaxRow {
  Scalar shift;
  double sum;

  /// -log softmax(x)[target], given the logit x[target].
  double loss(Scalar x) const {
    return std::log(sum) + (static_cast<double>(shift) - static_cast<double>(x));
  }
};

/// Writes the exponentials (`classes` of them) to `terms` unless that is null; x may be `terms`.
template <class Scalar>
SoftmaxRow<Scalar> softmax_row(Index classes, const Scalar* x, Scalar* terms) {
  const Scalar shift = largest(classes, x);
  return {shift, static_cast<double>(sum_exponentials(classes, x, shift, terms))};
}

/// Turns the exponentials of a row into (weight / count)·(softmax(x) - onehot(target)): the
/// gradient with respect to x of weight times the mean of `count` losses, of which this row is one.
template <class Scalar>
void softmax_row_backward(Index classes, const SoftmaxRow<Scalar>& row, Index target, double weight,
                          double count, Scalar* terms) {
  const auto scale = broadcast(static_cast<Scalar>(weight / (row.sum * count)));
  map(
      classes, terms, [scale](const Packet<Scalar>& e) { return Eigen::internal::pmul(e, scale); },
      terms);
  terms[target] -= static_cast<Scalar>(weight / count);
}

}  // namespace moe::detail
