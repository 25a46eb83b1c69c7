#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "moe/experts/feed_forward_passes.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/random.hpp"

/// \file
/// The network of most experts: two linear maps with an activation between them.

namespace moe {

/// The plain form is y = a·W_2 + b_2 with
///
///     a = act(min(x·W_1 + b_1, limit))
///
/// and the gated form (N. Shazeer, "GLU Variants Improve Transformer", 2020; SwiGLU with
/// Activation::silu) the same y with
///
///     a = act(min(x·W_1 + b_1, limit)) ⊙ (clamp(x·W_3 + b_3, -limit, limit) + linear_offset).
///
/// Config says whether there are biases and a limit; by default the plain form has biases and the
/// gated one none, there is no limit, and the offset is 0. Beyond a limit the gradient is 0. A slot of
/// weight w adds w·y(x) to its token, or with Config.weighted_input y(w·x).
///
/// Parameters and their names: plain, up.weight (W_1, D x H), up.bias (b_1, 1 x H), down.weight (W_2,
/// H x D), down.bias (b_2, 1 x D); gated, gate.weight (W_1), gate.bias (b_1), up.weight (W_3),
/// up.bias (b_3), down.weight (W_2), down.bias (b_2); the biases with Config.bias only. A map of n
/// inputs starts uniform in ±1/sqrt(n), its bias too, as PyTorch's Linear does.
///
/// It is a FusedNetwork: its first half makes the hidden row a, weighted already, its second half
/// multiplies that by W_2 and adds it to the tokens. For backward it saves a slot's pre-activations
/// only (H numbers, 2·H gated), in the precision of Config::saved, or nothing with Config::recompute:
/// the gradient of the slot's weight is ⟨dy·W_2ᵀ, a⟩ + ⟨b_2, dy⟩, and dy·W_2ᵀ is needed anyway. With the
/// weight on the input it saves z = x·W_1, gated x·W_3 too, of which w·z + b is the pre-activation and
/// ⟨z, dpre⟩ the weight's gradient.
template <class Scalar_ = float>
class FeedForward : public detail::FeedForwardPasses<Scalar_, Parameter<Scalar_>> {
  using Base = detail::FeedForwardPasses<Scalar_, Parameter<Scalar_>>;

 public:
  using typename Base::Block;
  using typename Base::Config;
  using typename Base::Scalar;

  /// Throws std::invalid_argument for a configuration out of range.
  FeedForward(const Config& config, std::uint64_t seed) : Base(config) {
    if (config.gated) gate_ = Parameter<Scalar>(config.width, config.hidden);
    up_ = Parameter<Scalar>(config.width, config.hidden);
    down_ = Parameter<Scalar>(config.hidden, config.width);
    const Scalar up_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.width));
    const Scalar down_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.hidden));
    fill_uniform(gate_.value, up_bound, derive_seed(seed, 0));
    fill_uniform(up_.value, up_bound, derive_seed(seed, 1));
    fill_uniform(up_bias_.value, up_bound, derive_seed(seed, 2));
    fill_uniform(down_.value, down_bound, derive_seed(seed, 3));
    fill_uniform(down_bias_.value, down_bound, derive_seed(seed, 4));
    fill_uniform(gate_bias_.value, up_bound, derive_seed(seed, 5));
  }

  Index gradient_rows() const { return (config_.gated ? 2 : 1) * config_.width + config_.hidden; }

  // dW_1 += xᵀ·dpre, dW_2 += (w·a)ᵀ·dy, db_1 += Σ dpre, db_2 += Σ w·dy, of those that are trained. With
  // the weight on the input dW_1 += xᵀ·dz, dz = w·dpre, and the others as without one.

  void add_gradients(const Block& block, const MatrixRef<Scalar>& dy, Range rows,
                     bool replace = false) {
    const detail::Start start = replace ? detail::Start::zero : detail::Start::accumulate;
    const MatrixView<Scalar> dpre = pre_of(block);
    const GatheredRows<Scalar> dfirst(columns_of(dpre, 0, config_.hidden));
    Index first = 0;
    const auto add = [&](const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b,
                         Parameter<Scalar>& weight) {
      const Index from = std::max(rows.first, first);
      const Index to = std::min(rows.first + rows.count, first + weight.value.rows());
      if (from < to && weight.trained) {
        detail::gemm_serial(detail::GemmTN<Scalar>{.a = a,
                                                   .b = b,
                                                   .c = view(weight.gradient()),
                                                   .rows = {from - first, to - from},
                                                   .start = start});
      }
      first += weight.value.rows();
    };
    const GatheredRows<Scalar> dup(
        columns_of(dpre, config_.gated ? config_.hidden : 0, config_.hidden));
    if (config_.gated) add(block.x, dfirst, gate_);
    add(block.x, dup, up_);
    const GatheredRows<Scalar> dy_rows = block.rows_of(dy);
    add(GatheredRows<Scalar>(hidden_of(block)), dy_rows, down_);
    if (!config_.bias || rows.first > 0) return;
    const auto add_bias = [&](const GatheredRows<Scalar>& from,
                              const detail::RowFactors<Scalar>& factors, Parameter<Scalar>& bias) {
      if (!bias.trained) return;
      Matrix<Scalar>& gradient = bias.gradient();
      if (replace) detail::resize_to_zero(gradient, 1, bias.size());
      detail::add_scaled_rows(from, factors, gradient.data());
    };
    const MatrixView<Scalar> unweighted = config_.weighted_input ? unweighted_of(block) : dpre;
    add_bias(columns_of(unweighted, 0, config_.hidden), {}, config_.gated ? gate_bias_ : up_bias_);
    if (config_.gated) {
      add_bias(columns_of(unweighted, config_.hidden, config_.hidden), {}, up_bias_);
    }
    add_bias(dy_rows, output_factors(block), down_bias_);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Base::visit_parts(self, visit);
  }

 private:
  using Base::config_;
  using Base::down_;
  using Base::down_bias_;
  using Base::gate_;
  using Base::gate_bias_;
  using Base::up_;
  using Base::up_bias_;

  using Base::hidden_of;
  using Base::output_factors;
  using Base::pre_of;
  using Base::unweighted_of;
};

}  // namespace moe
