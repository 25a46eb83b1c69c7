#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../support.hpp"
#include "moe/gates/gate.hpp"

/// \file
/// What the tests of several gates need.

namespace moe::test {

using Indices = std::vector<Index>;

template <class Module>
auto& parameter(Module& gate, std::string_view wanted) {
  using Found = Parameter<typename Module::Scalar>;
  std::conditional_t<std::is_const_v<Module>, const Found, Found>* found = nullptr;
  visit_each(gate, [&](const std::string& name, auto& p) {
    if (name == wanted) found = &p;
  });
  REQUIRE(found != nullptr);
  return *found;
}

template <class Gate>
bool has_zero_gradients(const Gate& gate) {
  bool zero = true;
  visit_each(gate, [&](const std::string&, const auto& parameter) {
    zero = zero && (parameter.gradient().array() == 0).all();
  });
  return zero;
}

/// What a gate adds to dx, from zeros.
template <class Gate>
Matrix<typename Gate::Scalar> gate_dx(Gate& gate, const Matrix<typename Gate::Scalar>& x,
                                      std::span<const typename Gate::Scalar> dweight,
                                      typename Gate::Tape& tape) {
  Matrix<typename Gate::Scalar> dx = Matrix<typename Gate::Scalar>::Zero(x.rows(), x.cols());
  gate.backward(x, dweight, tape, dx);
  return dx;
}

/// r by slot, from r by token and expert.
template <class Scalar>
std::vector<Scalar> dweight_of(const Routing<Scalar>& routing, const Matrix<Scalar>& r) {
  std::vector<Scalar> dweight;
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index s = routing.token_offsets[detail::to_size(t)];
         s < routing.token_offsets[detail::to_size(t) + 1]; ++s) {
      dweight.push_back(r(t, routing.expert[detail::to_size(s)]));
    }
  }
  return dweight;
}

/// ⟨r, G⟩ + balance loss of a training pass, r by token and expert, so that it has a meaning when a
/// step of the differences changes the order of slots.
template <class Gate>
double loss_of(const Gate& gate, const Matrix<double>& x, const Matrix<double>& r,
               const Pass& key = {.step = 0}) {
  typename Gate::Tape tape;
  const Routing<double>& routing = gate.forward(x, tape, key);
  const std::vector<double> by_slot = dweight_of(routing, r);
  double sum = tape.balance.loss;
  for (std::size_t s = 0; s < by_slot.size(); ++s) sum += routing.weight[s] * by_slot[s];
  return sum;
}

}  // namespace moe::test
