#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/factored_adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/optim/sgd.hpp"

/// \file
/// The optimizers, for tests of what each of them must do, and modules for these.

namespace moe::test {

struct OptimizerConfig {
  double weight_decay = 0;
  Updates updates = Updates::dense;
};

/// How an optimizer is made, whether it has a state, and by how many learning rates two updates with
/// gradients of one move a weight.
template <template <class> class Optimizer, class Scalar_>
struct OptimizerLaw {
  using Scalar = Scalar_;
  static constexpr bool remembers = true;
  static constexpr double two_moves = 2;
  static typename Optimizer<Scalar>::Config config_of(const OptimizerConfig& config) {
    typename Optimizer<Scalar>::Config all;
    all.weight_decay = config.weight_decay;
    all.updates = config.updates;
    return all;
  }
  static Optimizer<Scalar> make(const OptimizerConfig& config = {}) {
    return Optimizer<Scalar>(config_of(config));
  }
};

// Each with its name in messages.

template <class Scalar>
struct PlainSGD : OptimizerLaw<SGD, Scalar> {
  static constexpr const char* name = "SGD";
  static constexpr bool remembers = false;
};
template <class Scalar>
struct MomentumSGD : OptimizerLaw<SGD, Scalar> {
  static constexpr const char* name = "SGD";
  static constexpr double two_moves = 1 + 1.9;
  static SGD<Scalar> make(const OptimizerConfig& config = {}) {
    auto all = MomentumSGD::config_of(config);
    all.momentum = 0.9;
    return SGD<Scalar>(all);
  }
};
template <class Scalar>
struct PlainAdam : OptimizerLaw<Adam, Scalar> {
  static constexpr const char* name = "Adam";
};
template <class Scalar>
struct PlainFactoredAdam : OptimizerLaw<FactoredAdam, Scalar> {
  static constexpr const char* name = "FactoredAdam";
};

using Optimizers = std::tuple<PlainSGD<float>, PlainSGD<double>, MomentumSGD<float>,
                              MomentumSGD<double>, PlainAdam<float>, PlainAdam<double>,
                              PlainFactoredAdam<float>, PlainFactoredAdam<double>>;

/// Squares of whole numbers modulo a prime, in [-1, 1]: no pattern in rows or columns, and made
/// faster than random numbers.
template <class Scalar>
Matrix<Scalar> scattered(Index rows, Index columns, int seed, double scale = 1.0) {
  return Matrix<Scalar>::NullaryExpr(rows, columns, [=](Index i, Index j) {
    const Index number = 1000 * seed + i * columns + j;
    return static_cast<Scalar>(scale * (static_cast<double>(number * number % 10007) / 5003 - 1));
  });
}

template <class Scalar>
Parameter<Scalar> scattered_parameter(Index rows, Index columns, int seed) {
  Parameter<Scalar> parameter(rows, columns);
  parameter.value = scattered<Scalar>(rows, columns, seed);
  return parameter;
}

/// Parameters of one block and of many, which FactoredAdam cuts into pieces or not, some of one
/// piece for several tasks, a bias, a column; with gradients.
template <class Scalar>
struct Several {
  Several() {
    int seed = 0;
    for (const auto& [rows, columns] : {std::pair<Index, Index>{640, 617},
                                        {131, 127},
                                        {70, 1030},
                                        {1, 37},
                                        {90, 1},
                                        {3, 90000}}) {
      parts.push_back(scattered_parameter<Scalar>(rows, columns, ++seed));
      parts.back().gradient() = scattered<Scalar>(rows, columns, ++seed);
    }
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("parts", self.parts);
  }
  std::vector<Parameter<Scalar>> parts;
};

template <class Scalar, class Module>
std::vector<Matrix<Scalar>> values_of(const Module& module) {
  std::vector<Matrix<Scalar>> values;
  for_each_parameter(module, [&](const ParameterName&, const Parameter<Scalar>& parameter) {
    values.push_back(parameter.value);
  });
  return values;
}

/// Whether two modules have equal values, to the last bit.
template <class Scalar, template <class> class Module>
bool same_values(const Module<Scalar>& a, const Module<Scalar>& b) {
  return std::ranges::equal(values_of<Scalar>(a), values_of<Scalar>(b),
                            [](const auto& x, const auto& y) { return same_bits(x, y); });
}

/// The state of an optimizer, as in a checkpoint.
template <class Scalar>
struct SavedState {
  template <class Optimizer, class Module>
  SavedState(Optimizer& optimizer, const Module& module) {
    optimizer.for_each_state(module, [&](const std::string& name, auto&& value) {
      if constexpr (requires { value.rows(); }) {
        matrices[name] = value;
      } else {
        numbers[name].assign(value.begin(), value.end());
      }
    });
  }

  template <class Optimizer, class Module>
  void restore(Optimizer& optimizer, const Module& module) const {
    optimizer.for_each_state(module, [&](const std::string& name, auto&& value) {
      if constexpr (requires { value.rows(); }) {
        value = matrices.at(name);
      } else {
        std::ranges::copy(numbers.at(name), value.begin());
      }
    });
  }

  std::map<std::string, Matrix<Scalar>> matrices;
  std::map<std::string, std::vector<Index>> numbers;
};

/// A gate, whose gradient is not tracked, and experts, whose gradients are: one is a single number, the
/// others have two blocks, and half of them are enough for several tasks an update.
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

/// A mixture after `updates` updates, everything in the given mode.
template <class Law, class Routed>
auto trained(Updates mode, const Routed& routed, Index updates = 4) {
  Mixture<typename Law::Scalar> mixture;
  auto optimizer = Law::make({.weight_decay = 0.01, .updates = mode});
  for (Index t = 0; t < updates; ++t) {
    zero_gradients(mixture, mode);
    mixture.backward(t, routed);
    clip_gradients(mixture, 1.0, mode);
    optimizer.update(mixture, 0.1);
  }
  return mixture;
}

}  // namespace moe::test
