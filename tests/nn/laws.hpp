#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../support.hpp"
#include "moe/nn/dropout.hpp"
#include "moe/nn/embedding.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/lstm.hpp"
#include "moe/nn/residual.hpp"
#include "moe/nn/rms_norm.hpp"

/// \file
/// The modules of nn/ under one interface, for tests of what each of them must do.

namespace moe::test {

/// T rows, and the widths of x and y.
struct Shape {
  Index rows;
  Index inputs;
  Index outputs;
};

/// What is the same for most modules.
template <class Module_, class Scalar_>
struct ModuleLaw {
  using Scalar = Scalar_;
  using Module = Module_;
  using Tape = typename Module::Tape;
  using Input = Matrix<Scalar>;
  static constexpr bool evaluates_as_trained = true;
  static constexpr bool copies_x = true;     // so that forward takes its tape's own y
  static constexpr bool knows_width = true;  // so that it knows a tape of another width
  static constexpr double largest_scale = 10;
  static std::string rows_were(Index rows) { return "x had " + std::to_string(rows); }
  static Input input(const Shape& shape, std::uint64_t seed, double scale = 1) {
    return random_matrix<Scalar>(shape.rows, shape.inputs, seed, scale);
  }
  /// Of another module.
  static Shape other(const Shape& shape) { return {shape.rows, shape.inputs + 2, shape.outputs}; }
  /// x may be of any class that the module takes.
  template <class X>
  static const Matrix<Scalar>& forward(const Module& module, const X& x, Tape& tape) {
    return module.forward(x, tape);
  }
  template <class X>
  static const Matrix<Scalar>& evaluate(const Module& module, const X& x, Tape& tape) {
    return module.evaluate(x, tape);
  }
};

// The name in messages, what is special, a shape that is enough for several tasks, and how a module
// is made, and given something and called where that is special too.

template <class Scalar, bool bias = true>
struct LinearLaw : ModuleLaw<Linear<Scalar>, Scalar> {
  using Module = Linear<Scalar>;
  using Tape = typename Module::Tape;
  static constexpr const char* name = "Linear";
  static constexpr Shape large{203, 71, 130};
  static std::string columns_were(const Shape& shape) {
    return "the layer has " + std::to_string(shape.outputs) + " outputs";
  }

  static Module make(const Shape& shape) {
    return Module({.inputs = shape.inputs, .outputs = shape.outputs, .bias = bias}, 3);
  }
};

template <class Scalar>
struct LSTMLaw : ModuleLaw<LSTM<Scalar>, Scalar> {
  using Module = LSTM<Scalar>;
  using Tape = typename Module::Tape;
  static constexpr const char* name = "LSTM";
  static constexpr double largest_scale = 2;  // above, sigmoids have no gradient to speak of
  static constexpr Shape large{280, 20, 33};
  static std::string columns_were(const Shape& shape) {
    return "hidden is " + std::to_string(shape.outputs);
  }

  static Module make(const Shape& shape) {
    return Module({.inputs = shape.inputs, .hidden = shape.outputs}, 1);
  }
  /// The same for every pass of as many rows.
  static typename Module::State state(const Module& module, Index rows) {
    const Index sequences = rows >= 280 ? 40 : rows % 2 == 0 ? 2 : 1;
    const Index hidden = module.config().hidden;
    return {random_matrix<Scalar>(sequences, hidden, 7),
            random_matrix<Scalar>(sequences, hidden, 8)};
  }
  static const Matrix<Scalar>& forward(const Module& module, const MatrixRef<Scalar>& x,
                                       Tape& tape) {
    auto before = state(module, x.rows());
    return module.forward(x, before, tape);
  }
  static const Matrix<Scalar>& evaluate(const Module& module, const MatrixRef<Scalar>& x,
                                        Tape& tape) {
    auto before = state(module, x.rows());
    return module.evaluate(x, before, tape);
  }
};

template <class Scalar>
struct DropoutLaw : ModuleLaw<Dropout<Scalar>, Scalar> {
  using Module = Dropout<Scalar>;
  using Tape = typename Module::Tape;
  static constexpr const char* name = "Dropout";
  static constexpr bool evaluates_as_trained = false;
  static constexpr bool copies_x = false;
  static constexpr bool knows_width = false;
  static constexpr Shape large{301, 67, 67};
  static std::string columns_were(const Shape& shape) {
    return "x had " + std::to_string(shape.outputs);
  }

  static Module make(const Shape&) { return Module({.rate = 0.3}, 5); }
  static Matrix<Scalar> input(const Shape& shape, std::uint64_t seed, double scale = 1) {
    return random_matrix<Scalar>(shape.rows, shape.outputs, seed, scale);
  }
  static const Matrix<Scalar>& forward(const Module& module, const MatrixRef<Scalar>& x,
                                       Tape& tape) {
    return module.forward(x, tape, {.step = 3});
  }
};

template <class Scalar>
struct RMSNormLaw : ModuleLaw<RMSNorm<Scalar>, Scalar> {
  using Module = RMSNorm<Scalar>;
  static constexpr const char* name = "RMSNorm";
  static constexpr bool copies_x = false;
  static constexpr Shape large{601, 67, 67};
  static std::string columns_were(const Shape& shape) {
    return "the norm's width is " + std::to_string(shape.outputs);
  }

  static Module make(const Shape& shape) {
    Module module({.width = shape.outputs, .epsilon = 0.01});
    module.gain.value = random_matrix<Scalar>(1, shape.outputs, 3);
    return module;
  }
  static Matrix<Scalar> input(const Shape& shape, std::uint64_t seed, double scale = 1) {
    return random_matrix<Scalar>(shape.rows, shape.outputs, seed, scale);
  }
  static Shape other(const Shape& shape) { return {shape.rows, shape.inputs, shape.outputs + 2}; }
};

/// Around an RMSNorm.
template <class Scalar>
struct ResidualLaw : ModuleLaw<Residual<RMSNorm<Scalar>>, Scalar> {
  using Norm = RMSNormLaw<Scalar>;
  using Module = Residual<RMSNorm<Scalar>>;
  static constexpr const char* name = "Residual";
  static constexpr bool copies_x = false;
  static constexpr bool knows_width = false;
  static constexpr Shape large = Norm::large;
  static std::string columns_were(const Shape& shape) {
    return "x had " + std::to_string(shape.outputs);
  }

  static Module make(const Shape& shape) { return Module(Norm::make(shape)); }
  static Matrix<Scalar> input(const Shape& shape, std::uint64_t seed, double scale = 1) {
    return Norm::input(shape, seed, scale);
  }
  static Shape other(const Shape& shape) { return Norm::other(shape); }
};

/// Its x are ids, words of a vocabulary of shape.inputs.
template <class Scalar>
struct EmbeddingLaw : ModuleLaw<Embedding<Scalar>, Scalar> {
  using Module = Embedding<Scalar>;
  using Tape = typename Module::Tape;
  using Input = std::vector<Index>;
  static constexpr const char* name = "Embedding";
  static constexpr Shape large{900, 11, 300};
  static std::string rows_were(Index rows) { return "there were " + std::to_string(rows) + " ids"; }
  static std::string columns_were(const Shape& shape) {
    return "the embedding's width is " + std::to_string(shape.outputs);
  }

  static Module make(const Shape& shape) {
    return Module({.vocabulary = shape.inputs, .width = shape.outputs}, 1);
  }
  static Input input(const Shape& shape, std::uint64_t seed, double = 1) {
    Input ids;
    for (Index t = 0; t < shape.rows; ++t) {
      ids.push_back((t * t + static_cast<Index>(seed)) % shape.inputs);
    }
    return ids;
  }
};

template <class Law>
inline constexpr bool has_dx = std::is_same_v<typename Law::Input, Matrix<typename Law::Scalar>>;

using NNModules = std::tuple<LinearLaw<float>, LinearLaw<double>, LinearLaw<double, false>,
                             LSTMLaw<float>, LSTMLaw<double>, DropoutLaw<float>, DropoutLaw<double>,
                             EmbeddingLaw<float>, EmbeddingLaw<double>, RMSNormLaw<float>,
                             RMSNormLaw<double>, ResidualLaw<float>, ResidualLaw<double>>;
using NNModulesInDouble =
    std::tuple<LinearLaw<double>, LinearLaw<double, false>, LSTMLaw<double>, DropoutLaw<double>,
               EmbeddingLaw<double>, RMSNormLaw<double>, ResidualLaw<double>>;
using NNModulesOfMatrices =
    std::tuple<LinearLaw<double>, LinearLaw<float>, LSTMLaw<double>, LSTMLaw<float>,
               DropoutLaw<double>, DropoutLaw<float>, RMSNormLaw<double>, RMSNormLaw<float>,
               ResidualLaw<double>, ResidualLaw<float>>;

/// Gradients by the parameters' names.
template <class Scalar, class Module>
std::map<std::string, Matrix<Scalar>> gradients_of(const Module& module) {
  std::map<std::string, Matrix<Scalar>> gradients;
  for_each_parameter(module, [&](const std::string& name, const auto& parameter) {
    gradients[name] = parameter.gradient();
  });
  return gradients;
}

template <class Scalar>
bool same_bits(const std::map<std::string, Matrix<Scalar>>& a,
               const std::map<std::string, Matrix<Scalar>>& b) {
  return std::ranges::equal(a, b, [](const auto& x, const auto& y) {
    return x.first == y.first && same_bits(x.second, y.second);
  });
}

template <class Module>
bool gradients_are_zero(const Module& module) {
  bool zero = true;
  for_each_parameter(module, [&](const ParameterName&, const auto& parameter) {
    zero = zero && parameter.gradient().isZero(0);
  });
  return zero;
}

}  // namespace moe::test
