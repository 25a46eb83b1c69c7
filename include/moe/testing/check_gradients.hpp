#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "moe/function_ref.hpp"
#include "moe/matrix.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"
#include "moe/reinforce/policy.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// Checks that a backward pass is the derivative of its forward pass, for networks, gates, policies and
/// models of users. Not part of moe/moe.hpp. Everything is computed in double, by differences of fourth
/// order, with about four forward passes for each number that is checked.
///
/// Gradients are added up over the passes of an update. So a second pass is made, with gradients
/// that are not zero before it, and std::invalid_argument is thrown unless backward() adds the same
/// numbers to them again.
///
///     using Layer = moe::MoELayer<moe::Expert<MyNetwork, double>, MyGate<double>>;
///     Layer layer({...});
///     const moe::GradientCheck check = moe::check_layer_gradients(layer, x, {.step = 0});
///     if (check.error > 1e-7) std::puts(check.text().c_str());
///
/// Where a function has no derivative (a ReLU at 0, a tie between experts), differences of two widths
/// disagree; such entries are left out and counted. A few are normal; if there are many, use another x.

namespace moe {

/// The result of a check: the entry of a gradient that is farthest from its difference quotient.
struct GradientCheck {
  std::string parameter;  ///< its name, or "x"; empty if all entries were left out
  Index row = 0;          ///< of the entry
  Index column = 0;       ///< of the entry
  double gradient = 0;    ///< by backward()
  double difference = 0;  ///< the difference quotient
  /// |gradient − difference| / max(a, b, 1e-11), a being the largest |difference| in the same parameter and
  /// b a millionth of the largest in all parameters. NaN if the gradient is NaN or infinite,
  /// and if all entries were left out, as when the loss is NaN.
  double error = 0;
  Index checked = 0;  ///< entries in all, those left out included
  Index kinks = 0;    ///< entries left out

  /// "gate.weight(3, 1) is 0.25, differences say 0.5: an error of 0.5; 2 of 340 entries left out".
  std::string text() const {
    if (kinks > 0 && kinks == checked) {
      return detail::join("all ", checked, " entries were left out: nothing was compared");
    }
    return detail::join(parameter, "(", row, ", ", column, ") is ", gradient, ", differences say ",
                        difference, ": an error of ", error, "; ", kinks, " of ", checked,
                        " entries left out");
  }
};

namespace detail {

/// Difference quotients of a loss w.r.t. every entry of some matrices, and the gradients to check.
class GradientComparison {
 public:
  explicit GradientComparison(FunctionRef<double()> loss) : loss_(loss) {}

  /// Adds a matrix that the loss depends on. Changes its entries one by one, and restores them.
  void add(const std::string& name, Matrix<double>& value, const Matrix<double>& gradient) {
    Entry entry{name, gradient, Matrix<double>(value.rows(), value.cols()),
                Matrix<double>(value.rows(), value.cols())};
    const double here = loss_();
    for (Index i = 0; i < value.size(); ++i) {
      double& number = value.data()[i];
      const double before = number;
      const double step = 1e-4 * std::max(1.0, std::abs(before));
      struct Slopes {
        double mean;
        double bend;  // the difference of the slopes on both sides
      };
      const auto slopes = [&](double width) {
        number = before + width;
        const double above = loss_();
        number = before - width;
        const double below = loss_();
        return Slopes{(above - below) / (2 * width), (above - 2 * here + below) / width};
      };
      const Slopes narrow = slopes(step);
      const Slopes wide = slopes(2 * step);
      number = before;
      entry.difference.data()[i] = (4 * narrow.mean - wide.mean) / 3;
      // A smooth function's bend grows with the width; that of a kink right here does not.
      entry.disagreement.data()[i] =
          std::max(std::abs(narrow.mean - wide.mean), std::abs(narrow.bend - wide.bend / 2));
    }
    largest_ = std::max(largest_, entry.largest());
    entries_.push_back(std::move(entry));
  }

  /// The gradient that was given to the n-th add().
  const Matrix<double>& gradient(std::size_t n) const { return entries_[n].gradient; }

  /// What the n-th gradient is set to before the second pass: its largest magnitude, at least 1; 1
  /// if that is not finite.
  double start(std::size_t n) const {
    const double largest = largest_of(entries_[n].gradient);
    return largest > 1 && std::isfinite(largest) ? largest : 1;
  }

  /// Throws std::invalid_argument unless `sum` is the n-th gradient, added to start(n).
  void check_sum(const char* caller, std::size_t n, const Matrix<double>& sum) const {
    const Entry& entry = entries_[n];
    const double before = start(n);
    // Far above the rounding errors of terms of magnitude 1e6 that cancel, and below all but the
    // smallest gradients.
    const double tolerance = std::max(1e-6 * before, 1e-3 * largest_of(entry.gradient));
    for (Index row = 0; row < sum.rows(); ++row) {
      for (Index column = 0; column < sum.cols(); ++column) {
        const double expected = before + entry.gradient(row, column);
        if (!std::isfinite(expected)) continue;  // which worst() reports
        const double found = sum(row, column);
        require(std::abs(found - expected) <= tolerance, caller, ": the gradient of ", entry.name,
                "(", row, ", ", column, ") was ", before, " before a backward pass and is ", found,
                " after it, must be ", expected,
                ": backward must add to the gradient, the same in every pass");
      }
    }
  }

  GradientCheck worst() const {
    GradientCheck check;
    bool first = true;
    for (const Entry& entry : entries_) {
      // Differences of a loss of size 1 cannot be told from 0 below 1e-11.
      const double scale = std::max({entry.largest(), 1e-6 * largest_, 1e-11});
      check.checked += entry.gradient.size();
      for (Index row = 0; row < entry.gradient.rows(); ++row) {
        for (Index column = 0; column < entry.gradient.cols(); ++column) {
          if (!(entry.disagreement(row, column) <= 1e-3 * scale)) {
            ++check.kinks;
            continue;
          }
          const double gradient = entry.gradient(row, column);
          const double difference = entry.difference(row, column);
          const double error = std::abs(gradient - difference) / scale;
          if (!first && error <= check.error) continue;
          first = false;
          check.parameter = entry.name;
          check.row = row;
          check.column = column;
          check.gradient = gradient;
          check.difference = difference;
          check.error = std::isfinite(error) ? error : std::nan("");
          if (!std::isfinite(error)) return check;
        }
      }
    }
    if (first && check.checked > 0) check.error = std::nan("");
    return check;
  }

 private:
  static double largest_of(const Matrix<double>& matrix) {
    return matrix.size() > 0 ? matrix.cwiseAbs().maxCoeff() : 0;
  }

  struct Entry {
    std::string name;
    Matrix<double> gradient;
    Matrix<double> difference;
    Matrix<double> disagreement;

    double largest() const { return largest_of(difference); }
  };

  FunctionRef<double()> loss_;
  std::vector<Entry> entries_;
  double largest_ = 0;  ///< of all differences
};

template <class Module>
void compare_parameters(Module& module, GradientComparison& comparison) {
  for_each_parameter(module, [&](const std::string& name, Parameter<double>& parameter) {
    if (!parameter.trained) return;
    const Matrix<double> gradient = parameter.gradient();
    comparison.add(name, parameter.value, gradient);
  });
}

/// Makes another pass, from gradients that are not zero, and sets them back to what compare_parameters() saw.
/// Throws std::invalid_argument unless the pass added that to them. `first` is the index in `comparison`
/// of the module's first trained parameter.
template <class Module>
void check_added(const char* caller, Module& module, FunctionRef<void()> backward,
                 const GradientComparison& comparison, std::size_t first) {
  const auto for_each_trained = [&](auto&& f) {
    std::size_t n = first;
    for_each_parameter(module, [&](const std::string&, Parameter<double>& parameter) {
      if (parameter.trained) f(n++, parameter.gradient());
    });
  };
  std::vector<Matrix<double>> sums;
  const auto set_back = [&] {
    for_each_trained([&](std::size_t n, Matrix<double>& gradient) {
      sums.push_back(gradient);
      gradient = comparison.gradient(n);  // in its memory, which the caller may refer to
    });
  };
  for_each_trained(
      [&](std::size_t n, Matrix<double>& gradient) { gradient.setConstant(comparison.start(n)); });
  try {
    backward();
  } catch (...) {
    set_back();
    throw;
  }
  set_back();
  for (std::size_t i = 0; i < sums.size(); ++i) comparison.check_sum(caller, first + i, sums[i]);
}

/// check_gradients() with the caller's name for messages.
template <class Module>
GradientCheck check_module_gradients(const char* caller, Module& module, FunctionRef<double()> loss,
                                     FunctionRef<void()> backward) {
  zero_gradients(module);
  backward();
  GradientComparison comparison(loss);
  compare_parameters(module, comparison);
  check_added(caller, module, backward, comparison, 0);
  return comparison.worst();
}

/// Random weights, of the shape of y: the loss of a check is the weighted sum of y.
inline Matrix<double> loss_weights_like(const Matrix<double>& y) {
  Matrix<double> weights(y.rows(), y.cols());
  fill_normal(weights, 1.0, 0x6C6F7373u);
  return weights;
}

}  // namespace detail

/// Checks the gradients of every trained parameter of a module: `loss` computes the loss with the present
/// parameters, `backward` makes forward and backward passes that add its gradients, without zeroing them.
/// Both are called several times and must draw the same noise each time. Afterwards the module has the
/// gradients that were checked. Throws std::invalid_argument, which names the parameter, if
/// `backward` does not add to a gradient that is not zero.
template <class Module>
GradientCheck check_gradients(Module& module, detail::FunctionRef<double()> loss,
                              detail::FunctionRef<void()> backward) {
  return detail::check_module_gradients("check_gradients", module, loss, backward);
}

namespace detail {

/// Throws std::invalid_argument unless the gate's loss is in proportion to Pass::loss_scale, and neither it nor the
/// y of a token depends on what padding holds. Difference quotients do not show that: a gate that
/// ignores loss_scale or padding in both forward() and backward() has the right gradient of a wrong
/// loss.
template <class Layer>
void check_pass_is_minded(const Layer& layer, const Matrix<double>& x, const Pass& pass) {
  constexpr const char* caller = "check_layer_gradients";
  typename Layer::Tape tape;
  const Matrix<double> y = layer.forward(x, tape, pass);
  const double loss = tape.balance().loss;
  if (!std::isfinite(loss) || !y.allFinite()) return;  // all differences are left out then
  const auto is_loss = [](double found, double expected) {
    return std::abs(found - expected) <= 1e-9 * std::abs(expected);
  };
  Pass half = pass;
  half.loss_scale /= 2;
  layer.forward(x, tape, half);
  require(is_loss(tape.balance().loss, loss / 2), caller, ": the gate's loss is ", loss,
          " with Pass.loss_scale = ", pass.loss_scale, " and ", tape.balance().loss, " with ",
          half.loss_scale, ", must be in proportion");

  if (pass.valid.empty()) return;
  // A NaN shows in sums, and a large number in maxima, which a NaN may not reach.
  for (const double held : {std::nan(""), 1e3}) {
    Matrix<double> other = x;
    for (Index row = 0; row < x.rows(); ++row) {
      if (pass.valid[to_size(row)] == 0) other.row(row).setConstant(held);
    }
    const Matrix<double>& other_y = layer.forward(other, tape, pass);
    require(is_loss(tape.balance().loss, loss), caller, ": the gate's loss is ", loss, ", and ",
            tape.balance().loss, " with ", held, " in padding, which must not be read");
    for (Index row = 0; row < x.rows(); ++row) {
      require(pass.valid[to_size(row)] == 0 || other_y.row(row) == y.row(row), caller, ": row ",
              row, " of y changes with ", held, " in padding, which must not be read");
    }
  }
}

}  // namespace detail

/// Checks a layer of doubles with its gate and its experts' network. The loss is a weighted sum of y plus
/// the balance losses; dx and the gradients of all trained parameters are checked. x is T x D. Throws
/// std::invalid_argument if the gate's loss is not in proportion to Pass::loss_scale, or if numbers in padding
/// (Pass::valid) are read: a gate that does so in backward() too would have right gradients of a wrong loss.
/// Throws it as well, and names the parameter, if backward() does not add to a gradient that is not zero.
template <class Layer>
GradientCheck check_layer_gradients(Layer& layer, Matrix<double> x, const Pass& pass) {
  static_assert(std::is_same_v<typename Layer::Scalar, double>,
                "gradients are checked in double: take a MoELayer<Expert<Network, double>>");
  detail::check_pass_is_minded(layer, x, pass);
  typename Layer::Tape tape;
  const Matrix<double> weights = detail::loss_weights_like(layer.forward(x, tape, pass));
  const auto loss = [&] {
    const double sum = layer.forward(x, tape, pass).cwiseProduct(weights).sum();
    return sum + tape.balance().loss;
  };
  const auto backward = [&]() -> const Matrix<double>& {
    layer.forward(x, tape, pass);
    return layer.backward(weights, tape);
  };
  zero_gradients(layer);
  const Matrix<double> dx = backward();
  detail::GradientComparison comparison(loss);
  comparison.add("x", x, dx);
  detail::compare_parameters(layer, comparison);
  constexpr std::size_t after_x = 1;
  detail::check_added("check_layer_gradients", layer, backward, comparison, after_x);
  return comparison.worst();
}

/// Checks a policy of doubles: the gradients of all trained parameters, for a weighted sum of the logits as
/// the loss. `previous` are the symbols that its rows read, steps·R numbers with R = inputs·samples,
/// negative in padding; `noise` is the key of its random numbers. `balance_loss` returns, from the tape of
/// a forward pass, the losses of mixtures in the policy, which their backward passes include. Throws
/// std::invalid_argument, which names the parameter, if backward() does not add to a gradient that is not zero.
template <Policy P>
GradientCheck check_policy_gradients(
    P& policy, std::span<const typename P::Input> inputs, Index samples,
    std::span<const Index> previous, const std::optional<NoiseKey>& noise = std::nullopt,
    detail::FunctionRef<double(const typename P::Tape&)> balance_loss =
        [](const typename P::Tape&) { return 0.0; }) {
  typename P::Tape tape;
  const auto forward = [&]() -> const Matrix<double>& {
    return policy.forward(inputs, samples, previous, noise, tape);
  };
  Matrix<double> weights = detail::loss_weights_like(forward());
  for (Index row = 0; row < weights.rows(); ++row) {
    if (previous[detail::to_size(row)] < 0) weights.row(row).setZero();
  }
  const auto loss = [&] {
    const Matrix<double>& logits = forward();
    double sum = balance_loss(tape);
    for (Index row = 0; row < logits.rows(); ++row) {
      // What padding holds is not read, not even times 0.
      if (previous[detail::to_size(row)] >= 0) sum += logits.row(row).dot(weights.row(row));
    }
    return sum;
  };
  return detail::check_module_gradients("check_policy_gradients", policy, loss, [&] {
    forward();
    policy.backward(weights, tape);
  });
}

}  // namespace moe
