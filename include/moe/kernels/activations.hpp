#pragma once

#include <algorithm>
#include <array>
#include <numbers>
#include <string_view>

#include "moe/kernels/math.hpp"

/// \file
/// Element-wise activation functions and their derivatives.

namespace moe {

/// An element-wise activation function.
enum class Activation {
  identity,      ///< x
  relu,          ///< max(x, 0)
  squared_relu,  ///< relu(x)² (So et al. 2021, "Primer", arXiv 2109.08668)
  gelu,          ///< x·Φ(x), by the error function (Hendrycks & Gimpel 2016, arXiv 1606.08415)
  gelu_tanh,     ///< its approximation by tanh
  gelu_sigmoid,  ///< its approximation x·sigmoid(1.702·x)
  silu,          ///< x·sigmoid(x)
  sigmoid,       ///< 1 / (1 + e^-x)
  tanh           ///< tanh(x)
};
constexpr std::array<std::string_view, 9> enumerator_names(Activation) {
  return {"identity",     "relu", "squared_relu", "gelu", "gelu_tanh",
          "gelu_sigmoid", "silu", "sigmoid",      "tanh"};
}

namespace detail {

/// The functions of one activation on packets: value(x) and derivative(x).
template <Activation activation, class Scalar>
struct ActivationFunction {
  using P = Packet<Scalar>;

  static P constant(double value) { return broadcast(static_cast<Scalar>(value)); }

  /// gelu_tanh(x) = x·sigmoid(2·sqrt(2/π)·(x + c·x³)): the sigmoid's argument.
  static constexpr double c = 0.044715;
  static constexpr double slope = 2.0 * std::numbers::sqrt2 * std::numbers::inv_sqrtpi;
  static constexpr double sigmoid_slope = 1.702;  ///< of gelu_sigmoid
  /// Beyond 30 the sigmoid is 0 or 1 to the last bit, and x³ would overflow.
  static P bounded(const P& x) {
    using namespace Eigen::internal;
    return pmin(pmax(x, constant(-30.0)), constant(30.0));
  }
  static P gelu_argument(const P& x) {
    using namespace Eigen::internal;
    return pmul(pmul(constant(slope), x), pmadd(constant(c), pmul(x, x), constant(1.0)));
  }

  static P value(const P& x) {
    using namespace Eigen::internal;
    if constexpr (activation == Activation::relu) {
      return pselect(pcmp_lt(x, constant(0.0)), constant(0.0), x);  // keeps NaN, unlike a maximum
    } else if constexpr (activation == Activation::squared_relu) {
      return pselect(pcmp_lt(x, constant(0.0)), constant(0.0), pmul(x, x));
    } else if constexpr (activation == Activation::gelu) {
      return pmul(x, detail::normal_cdf<Scalar>(x));
    } else if constexpr (activation == Activation::gelu_tanh) {
      return pmul(x, detail::sigmoid<Scalar>(gelu_argument(bounded(x))));
    } else if constexpr (activation == Activation::gelu_sigmoid) {
      return pmul(x, detail::sigmoid<Scalar>(pmul(constant(sigmoid_slope), x)));
    } else if constexpr (activation == Activation::silu) {
      return pmul(x, detail::sigmoid<Scalar>(x));
    } else if constexpr (activation == Activation::sigmoid) {
      return detail::sigmoid<Scalar>(x);
    } else if constexpr (activation == Activation::tanh) {
      return detail::tanh<Scalar>(x);
    } else {
      return x;
    }
  }

  static P derivative(const P& x) {
    using namespace Eigen::internal;
    const P one = constant(1.0);
    if constexpr (activation == Activation::relu) {
      return pselect(pcmp_lt(constant(0.0), x), one, constant(0.0));
    } else if constexpr (activation == Activation::squared_relu) {
      return pselect(pcmp_lt(x, constant(0.0)), constant(0.0), padd(x, x));
    } else if constexpr (activation == Activation::gelu) {
      return pmadd(x, detail::normal_density<Scalar>(x), detail::normal_cdf<Scalar>(x));
    } else if constexpr (activation == Activation::gelu_tanh) {
      const P b = bounded(x);
      const P s = detail::sigmoid<Scalar>(gelu_argument(b));
      const P argument_slope = pmul(constant(slope), pmadd(constant(3.0 * c), pmul(b, b), one));
      return pmul(s, pmadd(pmul(b, psub(one, s)), argument_slope, one));
    } else if constexpr (activation == Activation::gelu_sigmoid) {
      const P argument = pmul(constant(sigmoid_slope), x);
      const P s = detail::sigmoid<Scalar>(argument);
      return pmul(s, pmadd(argument, psub(one, s), one));
    } else if constexpr (activation == Activation::silu) {
      const P s = detail::sigmoid<Scalar>(x);
      return pmul(s, pmadd(x, psub(one, s), one));
    } else if constexpr (activation == Activation::sigmoid) {
      const P s = detail::sigmoid<Scalar>(x);
      return pmul(s, psub(one, s));
    } else if constexpr (activation == Activation::tanh) {
      const P t = detail::tanh<Scalar>(x);
      return psub(one, pmul(t, t));
    } else {
      return one;
    }
  }
};

/// Calls f with the functions of an activation known only at run time.
template <class Scalar, class F>
void with_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::identity:
      return f(ActivationFunction<Activation::identity, Scalar>{});
    case Activation::relu:
      return f(ActivationFunction<Activation::relu, Scalar>{});
    case Activation::squared_relu:
      return f(ActivationFunction<Activation::squared_relu, Scalar>{});
    case Activation::gelu:
      return f(ActivationFunction<Activation::gelu, Scalar>{});
    case Activation::gelu_tanh:
      return f(ActivationFunction<Activation::gelu_tanh, Scalar>{});
    case Activation::gelu_sigmoid:
      return f(ActivationFunction<Activation::gelu_sigmoid, Scalar>{});
    case Activation::silu:
      return f(ActivationFunction<Activation::silu, Scalar>{});
    case Activation::sigmoid:
      return f(ActivationFunction<Activation::sigmoid, Scalar>{});
    case Activation::tanh:
      return f(ActivationFunction<Activation::tanh, Scalar>{});
  }
  MOE_ASSERT(false && "an Activation outside its enumeration");
}

/// Throws std::invalid_argument for a number that is not one of the enumerators.
inline void require_activation(const char* field, Activation activation) {
  const auto count = static_cast<int>(enumerator_names(activation).size());
  const auto number = static_cast<int>(activation);
  require(number >= 0 && number < count, field, " = ", number, ", must be one of the ", count,
          " activations");
}

/// y[r][i] = factor[r]·activation(x[r][i]); y may be x.
template <class Scalar>
void activate(Activation activation, const GatheredRows<Scalar>& x, const ScatteredRows<Scalar>& y,
              const RowFactors<Scalar>& factors = {}) {
  with_activation<Scalar>(activation, [&](auto function) {
    for (Index r = 0; r < x.count(); ++r) {
      const Packet<Scalar> factor = broadcast(*factors.at(r));
      map(
          x.width(), y.row(r),
          [=](const Packet<Scalar>& v) { return Eigen::internal::pmul(factor, function.value(v)); },
          x.row(r));
    }
  });
}

/// The same for one row.
template <class Scalar>
void activate(Activation activation, Index count, const Scalar* x, Scalar* y) {
  activate<Scalar>(activation, {x, count, 1, count}, {y, count, 1, count});
}

/// On entry dx holds dy, the gradient with respect to y. Computes y as activate() does, and
///
///     dx[r][i] = factor[r]·dy[r][i]·activation'(x[r][i])
///     dots[r] = Σ_i dy[r][i]·activation(x[r][i]), the gradient with respect to factor[r]
///
/// in one pass, since most of the time goes into waiting for x.
template <class Scalar>
void activate_backward(Activation activation, const GatheredRows<Scalar>& x,
                       const ScatteredRows<Scalar>& y, const ScatteredRows<Scalar>& dx,
                       Scalar* dots, const RowFactors<Scalar>& factors = {}) {
  using namespace Eigen::internal;
  using P = Packet<Scalar>;
  with_activation<Scalar>(activation, [&](auto function) {
    for (Index r = 0; r < x.count(); ++r) {
      const P factor = broadcast(*factors.at(r));
      const Scalar* in = x.row(r);
      Scalar* out = y.row(r);
      Scalar* gradient = dx.row(r);
      P dot = broadcast(Scalar{0});
      // Not by for_each_packet(), with which GCC keeps the sum in memory.
      for (Index i = 0; i < x.width(); i += packet_size<Scalar>) {
        const PacketSpan at{i, std::min(packet_size<Scalar>, x.width() - i)};
        const P v = at.load(in);
        const P d = at.load(gradient);
        const P value = function.value(v);
        dot = pmadd(d, value, dot);
        at.store(out, pmul(factor, value));
        at.store(gradient, pmul(pmul(factor, d), function.derivative(v)));
      }
      dots[r] = predux(dot);
    }
  });
}

/// dx[i] = dy[i]·activation'(x[i]) of one row; dx may be dy.
template <class Scalar>
void activate_backward(Activation activation, Index count, const Scalar* x, const Scalar* dy,
                       Scalar* dx) {
  constexpr Index chunk = 64 * packet_size<Scalar>;
  Scalar value[to_size(chunk)];
  Scalar dot;
  for (Index i = 0; i < count; i += chunk) {
    const Index size = std::min(chunk, count - i);
    if (dx != dy) std::copy_n(dy + i, size, dx + i);
    activate_backward<Scalar>(activation, {x + i, size, 1, size}, {value, size, 1, size},
                              {dx + i, size, 1, size}, &dot);
  }
}

}  // namespace detail
}  // namespace moe
