#pragma once

#include <cmath>
#include <vector>

#include "../allocation.hpp"
#include "../support.hpp"
#include "moe/optim/gradient_clipping.hpp"

/// \file
/// What lazy updates promise whatever the optimizer is. Each optimizer's tests make these checks
/// with their own make(updates), which returns an optimizer that decays weights.

namespace moe::test {

/// A gate, of whose gradient nobody keeps track, and experts that are kept track of: one a single
/// number, the others of two blocks, half of them enough for several tasks an update.
template <class Scalar>
struct Mixture {
  Mixture() : gate(random(7, 3, 0)) {
    experts.push_back(random(1, 1, 1));
    for (Index e = 1; e < 24; ++e) experts.push_back(random(90, 60 + e, e + 1));
    detail::track_gradients(experts);
  }

  /// As a backward pass at update t does, the loss being ½·cos(t)·Σw²: adds to the gate, and to an
  /// expert e if routed(e, t).
  template <class Routed>
  void backward(Index t, const Routed& routed) {
    const auto factor = static_cast<Scalar>(std::cos(static_cast<double>(t)));
    gate.gradient() += factor * gate.value;
    for (Index e = 0; e < size(); ++e) {
      if (!routed(e, t)) continue;
      detail::accumulate((*this)[e]);
      (*this)[e].gradient() += factor * (*this)[e].value;
    }
  }

  Index size() const { return static_cast<Index>(experts.size()); }
  Parameter<Scalar>& operator[](Index e) { return experts[detail::to_size(e)]; }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("gate", self.gate);
    visit("experts", self.experts);
  }

  Parameter<Scalar> gate;
  std::vector<Parameter<Scalar>> experts;

 private:
  static Parameter<Scalar> random(Index rows, Index columns, Index which) {
    Parameter<Scalar> parameter(rows, columns);
    parameter.value = random_matrix<Scalar>(rows, columns, static_cast<std::uint64_t>(which));
    return parameter;
  }
};

inline bool to_all(Index, Index) { return true; }

/// Expert 1 gets nothing ever, expert 2 at the first update only, the others now and then.
inline bool to_some(Index e, Index t) {
  return e == 2 ? t == 0 : e != 1 && (e + t * (1 + e % 3)) % 2 == 0;
}

/// Equal to the last bit, value by value.
template <class Scalar>
bool same_values(Mixture<Scalar>& a, Mixture<Scalar>& b) {
  bool same = same_bits(a.gate.value, b.gate.value);
  for (Index e = 0; e < a.size(); ++e) same = same && same_bits(a[e].value, b[e].value);
  return same;
}

/// A mixture after `updates` updates, everything in the given mode.
template <class Scalar, class Make, class Routed>
Mixture<Scalar> trained(const Make& make, Updates mode, const Routed& routed, Index updates = 4) {
  Mixture<Scalar> mixture;
  auto optimizer = make(mode);
  for (Index t = 0; t < updates; ++t) {
    zero_gradients(mixture, mode);
    mixture.backward(t, routed);
    clip_gradients(mixture, 1.0, mode);
    optimizer.update(mixture, 0.1);
  }
  return mixture;
}

/// An idle parameter stays as it is to the last bit, where a dense update decays it.
template <class Scalar, class Make>
void check_idle_is_left_alone(const Make& make) {
  Mixture<Scalar> before;
  Mixture<Scalar> once = trained<Scalar>(make, Updates::lazy, to_some, 1);
  Mixture<Scalar> lazy = trained<Scalar>(make, Updates::lazy, to_some);
  CHECK(same_bits(lazy[1].value, before[1].value));
  CHECK_FALSE(same_bits(lazy[2].value, before[2].value));
  CHECK(same_bits(lazy[2].value, once[2].value));
  CHECK_FALSE(same_bits(lazy[3].value, before[3].value));
  Mixture<Scalar> dense = trained<Scalar>(make, Updates::dense, to_some);
  CHECK_FALSE(same_bits(dense[1].value, before[1].value));
  CHECK_FALSE(same_bits(dense[2].value, lazy[2].value));
}

/// Where nothing is ever idle the two modes are one.
template <class Scalar, class Make>
void check_lazy_is_dense_where_all_get_tokens(const Make& make) {
  Mixture<Scalar> dense = trained<Scalar>(make, Updates::dense, to_all);
  Mixture<Scalar> lazy = trained<Scalar>(make, Updates::lazy, to_all);
  CHECK(same_values(dense, lazy));
}

/// What was zeroed lazily is zero to whoever is dense.
template <class Scalar, class Make>
void check_dense_after_lazy_zeroing(const Make& make) {
  Mixture<Scalar> lazily;
  Mixture<Scalar> densely;
  auto first = make(Updates::dense);
  auto second = make(Updates::dense);
  for (Index t = 0; t < 4; ++t) {
    zero_gradients(lazily, Updates::lazy);
    zero_gradients(densely);
    for (auto* mixture : {&lazily, &densely}) mixture->backward(t, to_some);
    const double norm = gradient_norm(densely);
    CHECK(gradient_norm(lazily) == norm);
    CHECK(gradient_norm(lazily, Updates::lazy) == norm);
    if (t % 2 == 1) {
      clip_gradients(lazily, 1.0);
      clip_gradients(densely, 1.0);
    }
    first.update(lazily, 0.1);
    second.update(densely, 0.1);
  }
  CHECK(same_values(lazily, densely));
}

/// A parameter fares as with a dense optimizer of its own that saw only the updates at which the
/// parameter was not idle.
template <class Scalar, class Make>
void check_lazy_is_dense_of_updates_with_tokens(const Make& make) {
  Mixture<Scalar> mixture;
  auto optimizer = make(Updates::lazy);
  Mixture<Scalar> expected;
  std::vector<decltype(optimizer)> own(mixture.experts.size(), make(Updates::dense));
  auto of_gate = make(Updates::dense);
  for (Index t = 0; t < 6; ++t) {
    const double learning_rate = 0.1 / static_cast<double>(t + 1);
    zero_gradients(mixture, Updates::lazy);
    mixture.backward(t, to_some);
    optimizer.update(mixture, learning_rate);
    zero_gradients(expected);
    expected.backward(t, to_some);
    of_gate.update(expected.gate, learning_rate);
    for (Index e = 0; e < expected.size(); ++e) {
      if (to_some(e, t)) own[detail::to_size(e)].update(expected[e], learning_rate);
    }
  }
  CHECK(same_values(mixture, expected));
}

/// A gradient written by hand is never missed by a dense update, and by a lazy one only where
/// somebody keeps track.
template <class Scalar, class Make>
void check_gradients_by_hand(const Make& make) {
  for (const Updates mode : {Updates::dense, Updates::lazy}) {
    Mixture<Scalar> before;
    Mixture<Scalar> mixture;
    auto optimizer = make(mode);
    mixture.gate.gradient().setOnes();
    mixture[5].gradient().setOnes();
    optimizer.update(mixture, 0.1);
    // Far more than the decay.
    CHECK((before.gate.value - mixture.gate.value).minCoeff() > Scalar(0.05));
    if (mode == Updates::dense) {
      CHECK((before[5].value - mixture[5].value).minCoeff() > Scalar(0.05));
    } else {
      CHECK(same_bits(before[5].value, mixture[5].value));
    }
  }
}

template <class Scalar, class Make>
void check_lazy_same_bits_on_any_number_of_threads(const Make& make) {
  Mixture<Scalar> expected = trained<Scalar>(make, Updates::lazy, to_some);
  for (const int threads : {1, 2, 3, 8}) {
    const Threads scope(threads);
    Mixture<Scalar> mixture = trained<Scalar>(make, Updates::lazy, to_some);
    CHECK(same_values(mixture, expected));
  }
}

template <class Scalar, class Make>
void check_lazy_takes_no_memory(const Make& make) {
  for (const int threads : {1, 3}) {
    const Threads scope(threads);
    Mixture<Scalar> mixture;
    auto optimizer = make(Updates::lazy);
    const auto update = [&] {
      clip_gradients(mixture, 1.0, Updates::lazy);
      optimizer.update(mixture, 0.1);
      zero_gradients(mixture, Updates::lazy);
    };
    mixture.backward(0, to_some);
    update();
    for (Index t = 1; t < 4; ++t) {
      mixture.backward(t, to_some);
      CHECK(allocations_in(update) == 0);
    }
  }
}

template <class Scalar, class Make>
void check_lazy_updates(const Make& make) {
  check_idle_is_left_alone<Scalar>(make);
  check_lazy_is_dense_where_all_get_tokens<Scalar>(make);
  check_dense_after_lazy_zeroing<Scalar>(make);
  check_lazy_is_dense_of_updates_with_tokens<Scalar>(make);
  check_gradients_by_hand<Scalar>(make);
  check_lazy_same_bits_on_any_number_of_threads<Scalar>(make);
  check_lazy_takes_no_memory<Scalar>(make);
}

}  // namespace moe::test
