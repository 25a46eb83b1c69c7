#pragma once

#include <cmath>
#include <cstdint>

#include "moe/experts/feed_forward_passes.hpp"
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
/// up.bias (b_3), down.weight (W_2), down.bias (b_2); the biases with Config.bias only. The weight
/// and the bias of a map with n inputs are initially uniform in ±1/sqrt(n), as in PyTorch's Linear.
///
/// It is a FusedNetwork: its first half computes the hidden row a times the slot's weight, its
/// second half multiplies that by W_2 and adds the result to the tokens. For backward it saves a
/// slot's pre-activations only (H numbers, 2·H gated), in the precision of Config::saved, or
/// nothing with Config::recompute: the gradient of the slot's weight is ⟨dy·W_2ᵀ, a⟩ + ⟨b_2, dy⟩,
/// and dy·W_2ᵀ is needed anyway. Where the weight multiplies the input, it saves z = x·W_1, and
/// x·W_3 in the gated form: w·z + b is the pre-activation, and ⟨z, dpre⟩ the gradient of the
/// weight.
template <class Scalar_ = float>
class FeedForward : public detail::FeedForwardPasses<Scalar_, Parameter<Scalar_>> {
  using Base = detail::FeedForwardPasses<Scalar_, Parameter<Scalar_>>;

 public:
  using typename Base::Config;
  using typename Base::Scalar;

  /// Throws std::invalid_argument for a configuration out of range.
  FeedForward(const Config& config, std::uint64_t seed) : FeedForward(config) {
    const Scalar up_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.width));
    const Scalar down_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.hidden));
    fill_uniform(gate_.value, up_bound, derive_seed(seed, 0));
    fill_uniform(up_.value, up_bound, derive_seed(seed, 1));
    fill_uniform(up_bias_.value, up_bound, derive_seed(seed, 2));
    fill_uniform(down_.value, down_bound, derive_seed(seed, 3));
    fill_uniform(down_bias_.value, down_bound, derive_seed(seed, 4));
    fill_uniform(gate_bias_.value, up_bound, derive_seed(seed, 5));
  }

  /// A network whose parameters are all 0, to be overwritten, for example with those of a file.
  /// (Trained as it is, all its hidden units would stay equal.) Throws std::invalid_argument for a
  /// configuration out of range.
  static FeedForward zeros(const Config& config) { return FeedForward(config); }

  /// The parameters named above.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Base::visit_parts(self, visit);
  }

 private:
  explicit FeedForward(const Config& config) : Base(config) {
    if (config.gated) gate_ = Parameter<Scalar>(config.width, config.hidden);
    up_ = Parameter<Scalar>(config.width, config.hidden);
    down_ = Parameter<Scalar>(config.hidden, config.width);
  }

  using Base::down_;
  using Base::down_bias_;
  using Base::gate_;
  using Base::gate_bias_;
  using Base::up_;
  using Base::up_bias_;
};

}  // namespace moe
