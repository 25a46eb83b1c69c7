#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "contestant.hpp"
#include "corpus.hpp"
#include "mixture.hpp"
#include "options.hpp"
#include "recurrent.hpp"
#include "study.hpp"

/// \file
/// One run of the study, from the first update to the test. Each kind of model is compiled by itself
/// in study_KIND.cpp.

namespace language_model {

/// What all runs read, and none changes.
struct Texts {
  std::vector<double> frequencies;
  Batches training, validation, test;
};

inline void configure(Mixture<moe::NoisyTopKGate<float>>::Config& config, const Run& run,
                      const Options& o) {
  config = {.gate = {.experts = run.experts,
                     .top_k = run.top_k,
                     .noise = has_noise(o),
                     .importance_weight = run.importance_weight,
                     .load_weight = run.load_weight},
            .hidden = run.hidden};
}

inline void configure(Mixture<moe::HierarchicalGate<float>>::Config& config, const Run& run,
                      const Options& o) {
  config = {.gate = {.groups = run.groups,
                     .group_experts = run.experts / run.groups,
                     .top_k_groups = run.top_k_groups,
                     .top_k = run.top_k / run.top_k_groups,
                     .noise = has_noise(o),
                     .importance_weight = run.importance_weight,
                     .load_weight = run.load_weight},
            .hidden = run.hidden};
}

inline void configure(Mixture<moe::ProductKeyGate<float>>::Config& config, const Run& run,
                      const Options& o) {
  config = {.gate = {.row_keys = run.groups,
                     .column_keys = run.experts / run.groups,
                     .top_k = run.top_k,
                     .noise = has_noise(o),
                     .importance_weight = run.importance_weight,
                     .load_weight = run.load_weight},
            .hidden = run.hidden};
}

inline void configure(Mixture<moe::BalancedGate<float>>::Config& config, const Run& run,
                      const Options&) {
  config = {.gate = {.experts = run.experts, .top_k = run.top_k}, .hidden = run.hidden};
}

/// As published (L. Wang et al. 2024, arXiv 2408.15664): sigmoid scores, whose bias can come to
/// outweigh them. Weights add up to one, as those of the noisy gate do.
inline void configure(Mixture<moe::TopKGate<float>>::Config& config, const Run& run,
                      const Options& o) {
  config = {.gate = {.experts = run.experts,
                     .top_k = run.top_k,
                     .score = moe::Score::sigmoid,
                     .renormalise = true,
                     .selection_bias = true,
                     .bias_rate = o.bias_rate},
            .hidden = run.hidden};
}

inline void configure(RecurrentStack<>::Config& config, const Run& run, const Options&) {
  config = {.layers = run.layers, .hidden = run.hidden};
}

template <class Middle>
typename Contestant<Middle>::Config run_config(const Run& run, const Options& o,
                                               const std::vector<double>& frequencies) {
  auto config = contestant_config<Middle>(o, frequencies);
  configure(config.model.middle, run, o);
  if constexpr (requires { config.model.middle.gate; }) {
    set_style(config.model.middle, o);
    config.model.mixtures = o.mixtures;
  }
  // Where all experts see every token.
  if (run.kind == Kind::noisy_top_k && run.experts == run.top_k) {
    config.expert_rate = o.dense_expert_rate;
  }
  // LSTMs alone do better with its first moment.
  if (run.kind == Kind::recurrent) config.factored = false;
  if (run.memory > 0) config.model.memory = run.memory;
  config.model.seed = run.seed;
  return config;
}

/// Nothing when it was stopped. The test part is read once, when all is done.
template <class Middle>
std::optional<Result> train_as(const Run& run, const Options& o, const Texts& texts,
                               Progress& progress) {
  Contestant<Middle> contestant(run_config<Middle>(run, o, texts.frequencies));
  const Index updates = updates_of(run, o);
  const moe::WarmUpLinearDecay learning_rate{
      .peak = o.learning_rate, .warm_up = std::min(o.warm_up, updates), .total = updates + 1};
  Batches::Batch batch;
  for (Index update = 1; update <= updates; ++update) {
    if (*progress.stop) return std::nullopt;
    const Index index = (update - 1) % texts.training.count();
    texts.training.get(index, batch);
    if (index == 0) contestant.start_epoch();
    contestant.update(batch, static_cast<std::uint64_t>(update), learning_rate(update),
                      noise_at(o, static_cast<double>(update) / static_cast<double>(updates)));
    progress.update = update;
  }
  const Model<Middle>& model = contestant.model();
  const Evaluation validation = evaluate(model, texts.validation, o.sequences);
  const Evaluation test = evaluate(model, texts.test, o.sequences);
  return Result{.operations = static_cast<double>(model.operations()),
                .parameters = static_cast<double>(moe::parameter_count(model)),
                .seconds = contestant.seconds(),
                .validation = validation.perplexity,
                .test = test.perplexity,
                .cv_importance = static_cast<double>(test.balance.cv_importance()),
                .cv_load = static_cast<double>(test.balance.cv_load()),
                .max_over_mean_load = static_cast<double>(test.balance.max_over_mean_load()),
                .unused_experts = static_cast<double>(test.balance.unused_experts())};
}

// Each in the source file of its name.
std::optional<Result> train_noisy_top_k(const Run&, const Options&, const Texts&, Progress&);
std::optional<Result> train_hierarchical(const Run&, const Options&, const Texts&, Progress&);
std::optional<Result> train_product_keys(const Run&, const Options&, const Texts&, Progress&);
std::optional<Result> train_balanced(const Run&, const Options&, const Texts&, Progress&);
std::optional<Result> train_loss_free(const Run&, const Options&, const Texts&, Progress&);
std::optional<Result> train_recurrent(const Run&, const Options&, const Texts&, Progress&);

/// The one of them that is the run's.
inline std::optional<Result> train(const Run& run, const Options& o, const Texts& texts,
                                   Progress& progress) {
  switch (run.kind) {
    case Kind::noisy_top_k:
      return train_noisy_top_k(run, o, texts, progress);
    case Kind::hierarchical:
      return train_hierarchical(run, o, texts, progress);
    case Kind::product_keys:
      return train_product_keys(run, o, texts, progress);
    case Kind::balanced:
      return train_balanced(run, o, texts, progress);
    case Kind::loss_free:
      return train_loss_free(run, o, texts, progress);
    case Kind::recurrent:
      return train_recurrent(run, o, texts, progress);
  }
  return std::nullopt;
}

}  // namespace language_model
