#pragma once

#include <array>
#include <cmath>
#include <string_view>

#include "moe/routing/capacity.hpp"
#include "moe/routing/config_checks.hpp"
#include "moe/routing/group_limit.hpp"
#include "moe/routing/switch_loss.hpp"

/// \file
/// The options of TopKGate. docs/gates.md lists those of published models.

namespace moe {

/// The scores by which experts are chosen and of which the weights are made; c are the logits.
enum class Score {
  softmax,            ///< s = softmax(c) over all experts, before the choice
  softmax_of_chosen,  ///< chosen by c; the weights are the softmax over the chosen c
  sigmoid,            ///< s = 1 / (1 + e^-c), each expert by itself
  sqrt_softplus,      ///< s = sqrt(log(1 + e^c)), each expert by itself (DeepSeek-V4)
};
constexpr std::array<std::string_view, 4> enumerator_names(Score) {
  return {"softmax", "softmax_of_chosen", "sigmoid", "sqrt_softplus"};
}

/// The configuration of TopKGate, which defines the letters used here. By default: a softmax, the K
/// largest, no loss.
struct TopKConfig {
  Index width = 0;    ///< D; 0 inside a layer's configuration stands for the layer's width
  Index experts = 0;  ///< E
  Index top_k = 0;    ///< K, experts chosen for a token, 1 <= K <= E

  bool bias = false;             ///< a bias of the logits, a parameter that is zero initially
  Score score = Score::softmax;  ///< the function that makes the scores s of the logits c
  /// Divide w by N + ε, see below; the weights of softmax_of_chosen add up to 1 anyway.
  bool renormalise = false;
  /// ε >= 0, added to N, by which weights are divided if they are renormalised: 1e-20 in DeepSeek's and
  /// Hugging Face's code for sigmoids, 0 in most other models. Weights of tiny scores then add up to
  /// less than 1. With 0, scores that are all 0 get weights of 0.
  double renormalise_epsilon = 0;
  /// p >= 1 of N = (Σ s^p)^(1/p); must be 1 without renormalise and with softmax_of_chosen.
  double renormalise_norm = 1;
  /// Renormalise once, over the choices left after drops; needs renormalise or softmax_of_chosen.
  bool renormalise_after_drops = false;
  double scale = 1;  ///< of all weights, above 0

  Index groups = 1;  ///< divides E
  /// Groups chosen for a token, 1 <= top_k_groups <= groups; they must have at least K experts.
  Index top_k_groups = 1;
  /// The score by which a token's groups are chosen.
  GroupScore group_score = GroupScore::best;

  /// Whether there is a selection bias b, which update_selection_bias() moves: see TopKGate.
  bool selection_bias = false;
  double bias_rate = 0.001;  ///< by how much update_selection_bias() moves an entry, >= 0

  /// In [0, 1). j is uniform in [1 - a, 1 + a), where a = jitter·Pass::noise_factor [F22 app. C].
  double jitter = 0;
  /// K = 2: in training the second choice is kept with probability 2·w, at most 1 [G21].
  bool random_second = false;
  /// K = 2: in training the second choice is drawn, with the probabilities softmax(c), by Gumbel noise, as in
  /// NLLB-MoE's code; not with a selection bias, which would have no part in it.
  bool drawn_second = false;

  /// In training an expert has factor·T·K/E places, rounded up, at most T; >= 0, 0: no limit.
  double capacity_factor = 0;
  double evaluation_capacity_factor = 0;  ///< the same in evaluate()
  /// The places of an expert in each of the batch's `sequences`, in training: a number of tokens, as
  /// expert_capacity of Hugging Face's Switch Transformer. At least 0. With 0, capacity_factor is used, for
  /// the whole batch; above 0, capacity_factor must be 0.
  Index capacity = 0;
  /// The same in evaluate(), with evaluation_capacity_factor.
  Index evaluation_capacity = 0;
  PlaceOrder place_order = PlaceOrder::rows;  ///< which choices are dropped

  double switch_loss_weight = 0;                     ///< of the Switch loss of a batch, >= 0
  double sequence_loss_weight = 0;                   ///< of its mean over sequences, >= 0
  SwitchCount switch_count = SwitchCount::per_slot;  ///< what f counts in both
  /// The number of sequences in a batch whose pass does not say it (Pass::sequences), at least 1. forward()
  /// refuses a batch whose rows are not a multiple of it if capacity or sequence_loss_weight is set; evaluate()
  /// does so if evaluation_capacity is set, and otherwise leaves out the loss by sequence for such a batch.
  Index sequences = 1;
  RowOrder row_order = RowOrder::time_major;  ///< of the rows of these sequences
  double z_loss_weight = 0;                   ///< of the router z-loss [Z22], >= 0

  double init_stddev = 0.02;  ///< standard deviation of the normal initial W_g, >= 0

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("width", self.width);
    visit("experts", self.experts);
    visit("top_k", self.top_k);
    visit("bias", self.bias);
    visit("score", self.score);
    visit("renormalise", self.renormalise);
    visit("renormalise_epsilon", self.renormalise_epsilon);
    visit("renormalise_norm", self.renormalise_norm);
    visit("renormalise_after_drops", self.renormalise_after_drops);
    visit("scale", self.scale);
    visit("groups", self.groups);
    visit("top_k_groups", self.top_k_groups);
    visit("group_score", self.group_score);
    visit("selection_bias", self.selection_bias);
    visit("bias_rate", self.bias_rate);
    visit("jitter", self.jitter);
    visit("random_second", self.random_second);
    visit("drawn_second", self.drawn_second);
    visit("capacity_factor", self.capacity_factor);
    visit("evaluation_capacity_factor", self.evaluation_capacity_factor);
    visit("capacity", self.capacity);
    visit("evaluation_capacity", self.evaluation_capacity);
    visit("place_order", self.place_order);
    visit("switch_loss_weight", self.switch_loss_weight);
    visit("sequence_loss_weight", self.sequence_loss_weight);
    visit("switch_count", self.switch_count);
    visit("sequences", self.sequences);
    visit("row_order", self.row_order);
    visit("z_loss_weight", self.z_loss_weight);
    visit("init_stddev", self.init_stddev);
  }
};

namespace detail {

/// Throws std::invalid_argument, naming the field and the numbers, unless every option is in range.
inline const TopKConfig& checked(const TopKConfig& config) {
  constexpr const char* gate = "TopKGate";
  check_at_least_one(gate, "width", config.width);
  check_at_least_one(gate, "experts", config.experts);
  check_choice(gate, "top_k", config.top_k, "experts", config.experts);
  require(config.score >= Score::softmax && config.score <= Score::sqrt_softplus,
          "TopKGate::Config.score = ", static_cast<int>(config.score),
          ", must be one of the 4 scores");
  require(std::isfinite(config.scale) && config.scale > 0,
          "TopKGate::Config.scale = ", config.scale, ", must be finite and above 0");
  check_at_least_zero(gate, "Config.renormalise_epsilon", config.renormalise_epsilon);
  require(std::isfinite(config.renormalise_norm) && config.renormalise_norm >= 1,
          "TopKGate::Config.renormalise_norm = ", config.renormalise_norm,
          ", must be finite and at least 1");
  const bool of_chosen = config.score == Score::softmax_of_chosen;
  require(config.renormalise_norm == 1 || (config.renormalise && !of_chosen),
          "TopKGate::Config.renormalise_norm = ", config.renormalise_norm,
          ", must be 1 without renormalise, and with softmax_of_chosen");
  require(!config.renormalise_after_drops || config.renormalise || of_chosen,
          "TopKGate::Config.renormalise_after_drops = true, must be false without renormalise "
          "or softmax_of_chosen");
  require(config.groups >= 1 && config.experts % config.groups == 0,
          "TopKGate::Config.groups = ", config.groups,
          ", must be at least 1 and divide experts = ", config.experts);
  check_choice(gate, "top_k_groups", config.top_k_groups, "groups", config.groups);
  const Index reachable = config.experts / config.groups * config.top_k_groups;
  require(config.top_k <= reachable, "TopKGate::Config.top_k = ", config.top_k,
          ", but top_k_groups = ", config.top_k_groups, " hold ", reachable, " experts");
  require(config.group_score == GroupScore::best || config.group_score == GroupScore::two_best,
          "TopKGate::Config.group_score = ", static_cast<int>(config.group_score),
          ", must be one of the 2 scores of groups");
  check_at_least_zero(gate, "Config.bias_rate", config.bias_rate);
  require(config.jitter >= 0 && config.jitter < 1, "TopKGate::Config.jitter = ", config.jitter,
          ", must be in [0, 1)");
  require(!config.random_second || config.top_k == 2,
          "TopKGate::Config.random_second with top_k = ", config.top_k, ", must be 2");
  require(!config.drawn_second || config.top_k == 2,
          "TopKGate::Config.drawn_second with top_k = ", config.top_k, ", must be 2");
  require(
      !config.drawn_second || !config.selection_bias,
      "TopKGate::Config.drawn_second with selection_bias, which would have no part in the draw");
  check_at_least_zero(gate, "Config.capacity_factor", config.capacity_factor);
  check_at_least_zero(gate, "Config.evaluation_capacity_factor", config.evaluation_capacity_factor);
  const auto check_capacity = [](const char* field, Index capacity, double factor) {
    require(capacity >= 0, "TopKGate::Config.", field, " = ", capacity, ", must be at least 0");
    require(capacity == 0 || factor == 0, "TopKGate::Config.", field, " = ", capacity, ", but ",
            field, "_factor = ", factor, "; one of them must be 0");
  };
  check_capacity("capacity", config.capacity, config.capacity_factor);
  check_capacity("evaluation_capacity", config.evaluation_capacity,
                 config.evaluation_capacity_factor);
  require(config.place_order >= PlaceOrder::rows && config.place_order <= PlaceOrder::best_tokens,
          "TopKGate::Config.place_order = ", static_cast<int>(config.place_order),
          ", must be one of the 4 orders");
  check_at_least_zero(gate, "Config.switch_loss_weight", config.switch_loss_weight);
  check_at_least_zero(gate, "Config.sequence_loss_weight", config.sequence_loss_weight);
  require(config.switch_count >= SwitchCount::per_slot &&
              config.switch_count <= SwitchCount::first_choice,
          "TopKGate::Config.switch_count = ", static_cast<int>(config.switch_count),
          ", must be one of the 3 counts");
  check_at_least_one(gate, "sequences", config.sequences);
  require(config.row_order == RowOrder::time_major || config.row_order == RowOrder::sequence_major,
          "TopKGate::Config.row_order = ", static_cast<int>(config.row_order),
          ", must be one of the 2 orders");
  check_at_least_zero(gate, "Config.z_loss_weight", config.z_loss_weight);
  check_at_least_zero(gate, "Config.init_stddev", config.init_stddev);
  return config;
}

}  // namespace detail
}  // namespace moe
