#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "moe/experts/expert.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/random.hpp"

/// \file
/// The network of most experts: two linear maps with an activation between them.

namespace moe {

/// y = act(x·W_1 + b_1)·W_2 + b_2, or the gated form y = (act(x·W_1) ⊙ (x·W_3))·W_2, which has no
/// biases (N. Shazeer, "GLU Variants Improve Transformer", 2020; SwiGLU with Activation::silu).
///
/// Parameters and their names: plain, up.weight (W_1, D x H), up.bias, down.weight (W_2, H x D),
/// down.bias; gated, gate.weight (W_1), up.weight (W_3), down.weight (W_2). A map of n inputs
/// starts uniform in ±1/sqrt(n), as PyTorch's Linear does.
///
/// It is a GatheringNetwork: its verbs take at most expert_block_rows rows, n of them below. For
/// backward it keeps a slot's pre-activations only (H numbers, 2·H gated): the gradient of the
/// slot's weight is ⟨dy·W_2ᵀ, a⟩ + ⟨b_2, dy⟩, a being the hidden row, and dy·W_2ᵀ is needed anyway.
template <class Scalar_ = float>
class FeedForward {
 public:
  using Scalar = Scalar_;

  struct Config {
    Index width = 0;   ///< D; 0 inside a layer's configuration stands for the layer's width
    Index hidden = 0;  ///< H
    Activation activation = Activation::relu;
    bool gated = false;
  };

  /// Memory for one block of rows.
  struct Scratch {
    Matrix<Scalar> hidden;  ///< a, and in backward weight·a
    Matrix<Scalar> pre;     ///< the pre-activations in evaluate, their gradient in backward
  };

  /// Throws std::invalid_argument for a configuration out of range.
  explicit FeedForward(const Config& config, std::uint64_t seed = 0)
      : config_(checked(config)),
        gate_(config.gated ? config.width : 0, config.gated ? config.hidden : 0),
        up_(config.width, config.hidden),
        up_bias_(1, config.gated ? 0 : config.hidden),
        down_(config.hidden, config.width),
        down_bias_(1, config.gated ? 0 : config.width) {
    const Scalar up_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.width));
    const Scalar down_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.hidden));
    fill_uniform(gate_.value, up_bound, derive_seed(seed, 0));
    fill_uniform(up_.value, up_bound, derive_seed(seed, 1));
    fill_uniform(up_bias_.value, up_bound, derive_seed(seed, 2));
    fill_uniform(down_.value, down_bound, derive_seed(seed, 3));
    fill_uniform(down_bias_.value, down_bound, derive_seed(seed, 4));
  }

  const Config& config() const { return config_; }
  Index tape_width() const { return config_.gated ? 2 * config_.hidden : config_.hidden; }

  void reserve(Scratch& scratch) const {
    scratch.hidden.resize(expert_block_rows, config_.hidden);
    scratch.pre.resize(expert_block_rows, tape_width());
  }

  /// y (n x D) from the rows x; leaves the pre-activations in kept (n x tape_width()).
  void forward(const GatheredRows<Scalar>& x, MatrixView<Scalar> kept, MatrixView<Scalar> y,
               Scratch& scratch) const {
    using detail::Start;
    reserve(scratch);
    const MatrixView<Scalar> hidden = rows_of(scratch.hidden, 0, x.count());
    const MatrixView<Scalar> pre = columns_of<Scalar>(kept, 0, config_.hidden);
    if (config_.gated) {
      const MatrixView<Scalar> linear = columns_of<Scalar>(kept, config_.hidden, config_.hidden);
      detail::product_nn(x, view(gate_.value), pre);
      detail::product_nn(x, view(up_.value), linear);
      activate_gated(pre, linear, hidden);
      detail::product_nn(GatheredRows<Scalar>(hidden), view(down_.value), y);
    } else {
      detail::product_nn(x, view(up_.value), pre, Start::bias, up_bias_.value.data());
      activate(pre, hidden);
      detail::product_nn(GatheredRows<Scalar>(hidden), view(down_.value), y, Start::bias,
                         down_bias_.value.data());
    }
  }

  /// From dy, the gradient of the weighted rows of the output: dx (n x D), weight included, and
  /// dweight (n). Adds to the gradients of all weights and biases.
  void backward(const GatheredRows<Scalar>& x, ConstMatrixView<Scalar> kept,
                const GatheredRows<Scalar>& dy, const Scalar* weight, MatrixView<Scalar> dx,
                Scalar* dweight, Scratch& scratch) {
    using detail::Start;
    const Index n = x.count();
    reserve(scratch);
    const MatrixView<Scalar> hidden = rows_of(scratch.hidden, 0, n);
    const MatrixView<Scalar> dkept = rows_of(scratch.pre, 0, n);
    const MatrixView<Scalar> dpre = columns_of<Scalar>(dkept, 0, config_.hidden);
    const ConstMatrixView<Scalar> pre = columns_of<Scalar>(kept, 0, config_.hidden);

    if (config_.gated) {
      const MatrixView<Scalar> dlinear = columns_of<Scalar>(dkept, config_.hidden, config_.hidden);
      const ConstMatrixView<Scalar> linear =
          columns_of<Scalar>(kept, config_.hidden, config_.hidden);
      detail::product_nt(dy, view(std::as_const(down_.value)), dlinear);
      activate_gated_backward(pre, linear, weight, dlinear, dpre, hidden, dweight);
      detail::product_tn(x, GatheredRows<Scalar>(dpre), view(gate_.gradient));
      detail::product_tn(x, GatheredRows<Scalar>(dlinear), view(up_.gradient));
      detail::product_nt(GatheredRows<Scalar>(dpre), view(std::as_const(gate_.value)), dx);
      detail::product_nt(GatheredRows<Scalar>(dlinear), view(std::as_const(up_.value)), dx,
                         Start::accumulate);
    } else {
      detail::product_nt(dy, view(std::as_const(down_.value)), dpre);
      activate_backward(pre, weight, dpre, hidden, dweight);
      for (Index i = 0; i < n; ++i) {
        const Index width = config_.width;
        dweight[i] += detail::dot(width, down_bias_.value.data(), dy.row(i));
        detail::add_scaled(width, weight[i], dy.row(i), down_bias_.gradient.data());
        detail::add_scaled(config_.hidden, Scalar{1}, detail::row_data(dpre, i),
                           up_bias_.gradient.data());
      }
      detail::product_tn(x, GatheredRows<Scalar>(dpre), view(up_.gradient));
      detail::product_nt(GatheredRows<Scalar>(dpre), view(std::as_const(up_.value)), dx);
    }
    detail::product_tn(GatheredRows<Scalar>(hidden), dy, view(down_.gradient));
  }

  /// y (n x D) from the rows x, keeping nothing.
  void evaluate(const GatheredRows<Scalar>& x, MatrixView<Scalar> y, Scratch& scratch) const {
    reserve(scratch);
    forward(x, rows_of(scratch.pre, 0, x.count()), y, scratch);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    if (self.config_.gated) {
      visit("gate.weight", self.gate_);
      visit("up.weight", self.up_);
      visit("down.weight", self.down_);
    } else {
      visit("up.weight", self.up_);
      visit("up.bias", self.up_bias_);
      visit("down.weight", self.down_);
      visit("down.bias", self.down_bias_);
    }
  }

 private:
  using P = detail::Packet<Scalar>;

  static const Config& checked(const Config& config) {
    detail::require(config.width >= 1, "FeedForward::Config.width = ", config.width,
                    ", must be at least 1");
    detail::require(config.hidden >= 1, "FeedForward::Config.hidden = ", config.hidden,
                    ", must be at least 1");
    detail::require_activation("FeedForward::Config.activation", config.activation);
    return config;
  }

  /// a = act(pre).
  void activate(const MatrixView<Scalar>& pre, MatrixView<Scalar> a) const {
    detail::with_activation<Scalar>(config_.activation, [&](auto act) {
      for (Index i = 0; i < pre.rows(); ++i) {
        detail::map(
            pre.cols(), detail::row_data(a, i), [=](const P& v) { return act.value(v); },
            detail::row_data(pre, i));
      }
    });
  }

  /// In: dpre holds u = dy·W_2ᵀ. Out: dpre = weight·u ⊙ act'(pre), weighted = weight·act(pre), and
  /// dweight = ⟨u, act(pre)⟩.
  void activate_backward(const ConstMatrixView<Scalar>& pre, const Scalar* weight,
                         MatrixView<Scalar> dpre, MatrixView<Scalar> weighted,
                         Scalar* dweight) const {
    using namespace Eigen::internal;
    const Index hidden = config_.hidden;
    detail::with_activation<Scalar>(config_.activation, [&](auto act) {
      for (Index i = 0; i < pre.rows(); ++i) {
        const P w = detail::broadcast(weight[i]);
        detail::map(
            hidden, detail::row_data(weighted, i), [=](const P& v) { return act.value(v); },
            detail::row_data(pre, i));
        dweight[i] = detail::dot(hidden, detail::row_data(dpre, i), detail::row_data(weighted, i));
        detail::map(
            hidden, detail::row_data(weighted, i), [=](const P& a) { return pmul(w, a); },
            detail::row_data(weighted, i));
        detail::map(
            hidden, detail::row_data(dpre, i),
            [=](const P& u, const P& v) { return pmul(pmul(w, u), act.derivative(v)); },
            detail::row_data(dpre, i), detail::row_data(pre, i));
      }
    });
  }

  /// a = act(pre) ⊙ linear.
  void activate_gated(const MatrixView<Scalar>& pre, const MatrixView<Scalar>& linear,
                      MatrixView<Scalar> a) const {
    using namespace Eigen::internal;
    detail::with_activation<Scalar>(config_.activation, [&](auto act) {
      for (Index i = 0; i < pre.rows(); ++i) {
        detail::map(
            pre.cols(), detail::row_data(a, i),
            [=](const P& v, const P& l) { return pmul(act.value(v), l); }, detail::row_data(pre, i),
            detail::row_data(linear, i));
      }
    });
  }

  /// In: dlinear holds u = dy·W_2ᵀ. Out: dpre = weight·u ⊙ linear ⊙ act'(pre), dlinear =
  /// weight·u ⊙ act(pre), weighted = weight·act(pre) ⊙ linear, dweight = ⟨u, act(pre) ⊙ linear⟩.
  void activate_gated_backward(const ConstMatrixView<Scalar>& pre,
                               const ConstMatrixView<Scalar>& linear, const Scalar* weight,
                               MatrixView<Scalar> dlinear, MatrixView<Scalar> dpre,
                               MatrixView<Scalar> weighted, Scalar* dweight) const {
    using namespace Eigen::internal;
    const Index hidden = config_.hidden;
    detail::with_activation<Scalar>(config_.activation, [&](auto act) {
      for (Index i = 0; i < pre.rows(); ++i) {
        const P w = detail::broadcast(weight[i]);
        detail::map(
            hidden, detail::row_data(weighted, i),
            [=](const P& v, const P& l) { return pmul(act.value(v), l); }, detail::row_data(pre, i),
            detail::row_data(linear, i));
        dweight[i] =
            detail::dot(hidden, detail::row_data(dlinear, i), detail::row_data(weighted, i));
        detail::map(
            hidden, detail::row_data(weighted, i), [=](const P& a) { return pmul(w, a); },
            detail::row_data(weighted, i));
        detail::map(
            hidden, detail::row_data(dpre, i),
            [=](const P& u, const P& v, const P& l) {
              return pmul(pmul(pmul(w, u), l), act.derivative(v));
            },
            detail::row_data(dlinear, i), detail::row_data(pre, i), detail::row_data(linear, i));
        detail::map(
            hidden, detail::row_data(dlinear, i),
            [=](const P& u, const P& v) { return pmul(pmul(w, u), act.value(v)); },
            detail::row_data(dlinear, i), detail::row_data(pre, i));
      }
    });
  }

  Config config_;
  Parameter<Scalar> gate_;       ///< W_1 of the gated form, D x H
  Parameter<Scalar> up_;         ///< W_1 of the plain form, W_3 of the gated one, D x H
  Parameter<Scalar> up_bias_;    ///< b_1, 1 x H
  Parameter<Scalar> down_;       ///< W_2, H x D
  Parameter<Scalar> down_bias_;  ///< b_2, 1 x D
};

}  // namespace moe
