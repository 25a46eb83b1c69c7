#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "moe/kernels/column_sums.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"

namespace moe {

/// Root mean square normalisation of each token, with a gain for each column:
///
///     y_j = gain_j · x_j / √(mean over i of x_i² + epsilon)
///
/// B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019. The gain is 1 initially;
/// PyTorch's RMSNorm calls it weight and has a smaller default epsilon. A token of zeros stays
/// zero. In float a token whose sum of squares is above 3.4e38 becomes 0, since that sum is
/// infinite.
template <class Scalar = float>
class RMSNorm {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index width = 0;        ///< D, at least 1
    double epsilon = 1e-5;  ///< above 0 as a Scalar too

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("epsilon", self.epsilon);
    }
  };

  /// The caller's scratch: what one pass computes and what its backward needs.
  struct Tape {
    Matrix<Scalar> y;            ///< T x D
    bool trained = false;        ///< whether the last pass was a forward()
    Matrix<Scalar> normalized;   ///< T x D, y without the gain
    std::vector<Scalar> scales;  ///< T, 1 / √(mean of squares + epsilon)
    Matrix<Scalar> dx;           ///< T x D, the gradient with respect to x
  };

  Parameter<Scalar> gain;  ///< 1 x D

  /// Throws std::invalid_argument for a configuration out of range.
  explicit RMSNorm(const Config& config) : config_(config) {
    detail::require(config.width >= 1, "RMSNorm::Config.width = ", config.width,
                    ", must be at least 1");
    const auto epsilon = static_cast<Scalar>(config.epsilon);
    detail::require(epsilon > 0 && std::isfinite(epsilon),
                    "RMSNorm::Config.epsilon = ", config.epsilon, ", must be finite and above 0");
    gain = Parameter<Scalar>(1, config.width);
    gain.value.setOnes();
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Training pass: returns tape.y (T x D). Throws std::invalid_argument if x is not T x D or
  /// overlaps tape.y or tape.normalized.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_input(x);
    detail::require_apart("RMSNorm::forward", "x", x, {tape.y, tape.normalized});
    run(x, tape, true);
    tape.trained = true;
    return tape.y;
  }

  /// Adds to the gain's gradient and returns dx. With n = y / gain and g = dy ⊙ gain
  ///
  ///     dgain_j = Σ over tokens of dy_j·n_j      dx = scale·(g - n·mean(g ⊙ n))
  ///
  /// Throws std::invalid_argument unless dy is T x D and the last pass on the tape was a forward(), or if dy
  /// overlaps tape.dx.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) {
    detail::check_shapes(*this, "RMSNorm");
    detail::require(tape.trained && tape.y.cols() == config_.width,
                    "RMSNorm::backward without a forward pass on this tape");
    detail::require(dy.rows() == tape.y.rows(), "RMSNorm::backward: dy has ", dy.rows(),
                    " rows, x had ", tape.y.rows());
    detail::require(dy.cols() == config_.width, "RMSNorm::backward: dy has ", dy.cols(),
                    " columns, the norm's width is ", config_.width);
    detail::require_apart("RMSNorm::backward", "dy", dy, {tape.dx});
    detail::resize(tape.dx, dy.rows(), dy.cols());
    const auto row_of_dy = [&](Index t) { return dy.data() + t * dy.outerStride(); };
    using Eigen::internal::pmul;
    using Eigen::internal::psub;
    using P = detail::Packet<Scalar>;
    const auto product = [](const P& a, const P& b) { return pmul(a, b); };
    const Index D = config_.width;
    if (gain.trained) {
      for_each_row(dy.rows(), [&](Index t) {
        detail::map(D, tape.dx.row(t).data(), product, row_of_dy(t), tape.normalized.row(t).data());
      });
      detail::add_column_sums(GatheredRows<Scalar>(tape.dx), gain.gradient());
    }
    for_each_row(dy.rows(), [&](Index t) {
      auto dx = tape.dx.row(t);
      const auto n = tape.normalized.row(t);
      detail::map(D, dx.data(), product, row_of_dy(t), gain.value.data());
      const P mean =
          detail::broadcast(detail::dot(D, dx.data(), n.data()) / static_cast<Scalar>(D));
      const P scale = detail::broadcast(tape.scales[detail::to_size(t)]);
      const auto gradient = [&](const P& g, const P& normalized) {
        return pmul(scale, psub(g, pmul(mean, normalized)));
      };
      detail::map(D, dx.data(), gradient, dx.data(), n.data());
    });
    return tape.dx;
  }

  /// forward() that saves nothing for backward(). Throws std::invalid_argument if x is not T x D or overlaps
  /// tape.y.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    check_input(x);
    detail::require_apart("RMSNorm::evaluate", "x", x, {tape.y});
    tape.trained = false;
    run(x, tape, false);
    return tape.y;
  }

  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const {
    Tape tape;
    evaluate(x, tape);
    return std::move(tape.y);
  }

  /// "gain".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("gain", self.gain);
  }

 private:
  void check_input(const MatrixRef<Scalar>& x) const {
    detail::check_shapes(*this, "RMSNorm");
    detail::require(x.cols() == config_.width, "RMSNorm: x has ", x.cols(),
                    " columns, the norm's width is ", config_.width);
  }

  /// Fills y and, for a backward pass, normalized and scales.
  void run(const MatrixRef<Scalar>& x, Tape& tape, bool trained) const {
    using Eigen::internal::pmul;
    using P = detail::Packet<Scalar>;
    const Index D = config_.width;
    detail::resize(tape.y, x.rows(), D);
    if (trained) {
      detail::resize(tape.normalized, x.rows(), D);
      detail::resize(tape.scales, x.rows());
    }
    for_each_row(x.rows(), [&](Index t) {
      const Scalar* row = x.data() + t * x.outerStride();
      const Scalar mean_square = detail::dot(D, row, row) / static_cast<Scalar>(D);
      const Scalar scale =
          Scalar{1} / std::sqrt(mean_square + static_cast<Scalar>(config_.epsilon));
      if (trained) tape.scales[detail::to_size(t)] = scale;
      Scalar* normalized = trained ? tape.normalized.row(t).data() : tape.y.row(t).data();
      const auto scaled = [factor = detail::broadcast(scale)](const P& a) {
        return pmul(factor, a);
      };
      const auto product = [](const P& a, const P& b) { return pmul(a, b); };
      detail::map(D, normalized, scaled, row);
      detail::map(D, tape.y.row(t).data(), product, normalized, gain.value.data());
    });
  }

  template <class F>
  void for_each_row(Index rows, const F& f) const {
    const Index block = std::max<Index>(1, (Index{1} << 13) / config_.width);
    parallel_for_blocks(rows, block, element_work(rows * config_.width),
                        [&](Index first, Index count) {
                          for (Index t = first; t < first + count; ++t) f(t);
                        });
  }

  Config config_;
};

}  // namespace moe
