#pragma once

#include <algorithm>
#include <cstdint>
#include <moe/io/safetensors.hpp>
#include <moe/moe.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "../common/terminal.hpp"
#include "batches.hpp"
#include "dictionary.hpp"
#include "model.hpp"
#include "options.hpp"
#include "score.hpp"

/// \file
/// A network in training, with all that its training carries along.

namespace pronounce {

using Network = Model<float>;
using Helper = moe::Reinforce<Network>;

using examples::seconds_now;

inline Network::Config network_of(const Options& o) {
  return {.letters = letters().size(),
          .phonemes = phonemes().size(),
          .embedding = o.embedding,
          .width = o.width,
          .experts = o.experts,
          .top_k = o.top_k,
          .expert_hidden = o.hidden,
          .dropout = o.dropout,
          .balance_weight = o.balance_weight,
          .seed = o.seed};
}

inline Helper::Baseline baseline_of(const Options& o) {
  if (o.baseline == "none") return moe::NoBaseline{};
  if (o.baseline == "running_mean") return moe::RunningMeanBaseline{};
  if (o.baseline == "linear") return moe::LinearBaseline<float>({.hidden = o.width});
  if (o.baseline == "greedy") return moe::GreedyBaseline{};
  if (o.baseline == "leave_one_out") return moe::LeaveOneOutBaseline{};
  throw std::runtime_error("--baseline " + o.baseline +
                           " is none of none, running_mean, linear, greedy, leave_one_out");
}

inline Helper::Config helper_of(const Options& o) {
  return {.end = end_symbol,
          .max_length = o.max_length,
          .temperature = o.temperature,
          .baseline = baseline_of(o),
          .samples = o.samples,
          .normalise = o.normalise,
          .entropy_bonus = o.entropy_bonus,
          .seed = moe::derive_seed(o.seed, 100)};
}

using Schedule = std::variant<moe::Alternation, moe::ShrinkingPrefix, moe::Blend>;

inline Schedule schedule_of(const Options& o) {
  if (o.schedule == "none") return moe::Alternation{.warm_up = o.updates, .highest = 0};
  if (o.schedule == "alternation") {
    return moe::Alternation{.warm_up = o.cross_entropy, .rise = o.rise, .highest = o.share};
  }
  if (o.schedule == "blend") {
    return moe::Blend{.warm_up = o.cross_entropy, .rise = o.rise, .highest = o.share};
  }
  if (o.schedule == "prefix") {
    // Few pronunciations have more phonemes than twelve.
    return moe::ShrinkingPrefix{.warm_up = o.cross_entropy,
                                .max_length = std::min<Index>(12, o.max_length),
                                .shrink = 2,
                                .stage = o.rise};
  }
  throw std::runtime_error("--schedule " + o.schedule +
                           " is none of none, alternation, blend, prefix");
}

inline std::string schedule_in_words(const Options& o) {
  return std::visit([](const auto& schedule) { return moe::to_string(schedule); }, schedule_of(o));
}

/// The learning rate of an update: a fall to a tenth while cross-entropy is alone, then a slower one
/// to nothing.
inline double learning_rate_of(const Options& o, Index update) {
  if (update <= o.cross_entropy) {
    const Index warm_up = std::min<Index>(200, o.cross_entropy);
    return moe::WarmUpLinearDecay{
        .peak = o.learning_rate,
        .warm_up = warm_up,
        .total = warm_up + (o.cross_entropy - warm_up) * 10 / 9 + 1}(update);
  }
  const Index late = o.updates - o.cross_entropy;
  const Index warm_up = std::min<Index>(50, late);
  return moe::WarmUpLinearDecay{
      .peak = o.late_rate, .warm_up = warm_up, .total = late + 1}(update - o.cross_entropy);
}

/// The dropout of an update. By default REINFORCE has none: the samples that it scores should be the
/// network's own, not those of one with holes.
inline double dropout_of(const Options& o, const moe::Objective& objective) {
  return objective.reinforce > 0 ? o.sampled_dropout : o.dropout;
}

/// What sequences earn; or, to see what that is worth, what they did not earn.
class Rewards {
 public:
  explicit Rewards(const Options& o) : kind_(o.reward), exact_bonus_(o.exact_bonus) {
    if (kind_ != "score" && kind_ != "constant" && kind_ != "shuffled") {
      throw std::runtime_error("--reward " + kind_ + " is none of score, constant, shuffled");
    }
  }

  double operator()(const Word& word, std::span<const Index> sequence, bool done) {
    if (!done) return 0;
    if (kind_ == "constant") return 1;
    const double score = reward_of(sequence, word.pronunciations, exact_bonus_);
    if (kind_ == "score") return score;
    // Shuffled: that of the sequence a thousand before it, of another word, so the distribution stays.
    double& place = past_(0, next_);
    next_ = (next_ + 1) % past_.cols();
    return std::exchange(place, score);
  }

  /// What the next rewards depend on, to be saved.
  moe::Matrix<double>& past() { return past_; }
  Index& next() { return next_; }

 private:
  std::string kind_;
  double exact_bonus_;
  moe::Matrix<double> past_ = moe::Matrix<double>::Zero(1, 1009);
  Index next_ = 0;
};

/// The most probable pronunciation of each entry, scored.
inline ErrorRates evaluate(const Network& network, const Helper& helper,
                           const std::vector<Entry>& entries) {
  constexpr std::size_t batch = 512;
  // Words of one length together leave no padding.
  std::vector<const Entry*> sorted;
  for (const Entry& entry : entries) sorted.push_back(&entry);
  std::stable_sort(sorted.begin(), sorted.end(), [](const Entry* a, const Entry* b) {
    return a->letters.size() < b->letters.size();
  });
  ErrorRates rates;
  Helper::Tape tape;
  for (std::size_t first = 0; first < sorted.size(); first += batch) {
    std::vector<Word> words;
    for (std::size_t i = first; i < std::min(first + batch, sorted.size()); ++i) {
      words.push_back(word_of(*sorted[i]));
    }
    helper.decode(network, words, tape);
    for (std::size_t i = 0; i < words.size(); ++i) {
      rates.add(tape.rollout.sequence(static_cast<Index>(i)), words[i].pronunciations);
    }
  }
  return rates;
}

class Trainer {
 public:
  Trainer(const Options& options, const std::vector<Entry>& entries)
      : options_(options),
        network_(network_of(options)),
        helper_(helper_of(options)),
        schedule_(schedule_of(options)),
        rewards_(options),
        batches_(entries, options.words, moe::derive_seed(options.seed, 101)) {}

  const Options& options() const { return options_; }
  const Network& network() const { return network_; }
  const Helper& helper() const { return helper_; }
  Index update() const { return update_; }
  double seconds() const { return seconds_; }
  Index batches() const { return batches_.count(); }

  /// Figures of the recent updates: nats a phoneme, and what sampled words earned.
  double cross_entropy() const { return cross_entropy_.mean(); }
  double reward() const { return reward_.mean(); }
  double share() const { return share_.mean(); }
  const moe::Balance<float>& balance() const { return tape_.policy.encoder.mixture.balance(); }

  void train() {
    const double start = seconds_now();
    ++update_;
    batches_.get(update_, batch_);
    moe::zero_gradients(network_);
    moe::zero_gradients(helper_);
    const auto objective =
        std::visit([&](const auto& schedule) { return schedule(update_); }, schedule_);
    network_.set_dropout(dropout_of(options_, objective));
    const moe::NoiseKey key{.step = static_cast<std::uint64_t>(update_)};
    const auto statistics = helper_.add_gradients(network_, batch_.words, batch_.references,
                                                  rewards_, objective, key, tape_);
    const double rate = learning_rate_of(options_, update_);
    moe::clip_gradients(network_, options_.clip);
    adam_.update(network_, rate);
    if (options_.baseline == "linear" && statistics.sampled_steps > 0) {
      helper_adam_.update(helper_, 1e-2);
    }

    share_.add(objective.reinforce, 0.02);
    if (statistics.forced_steps > 0) cross_entropy_.add(statistics.cross_entropy, 0.02);
    if (statistics.sampled_steps > 0) reward_.add(statistics.mean_reward, 0.02);
    seconds_ += seconds_now() - start;
  }

  /// Writes the network and, so that training can go on to the same bits, everything else.
  void save(const std::string& path) {
    moe::SafetensorsWriter writer;
    writer.add_parameters(network_);
    remember();
    for_each_extra([&](const std::string& name, const auto& value) { writer.add(name, value); });
    for_each_option(options_, [&](const char* name, const auto& value, const char*) {
      writer.set_metadata(name, to_text(value));
    });
    writer.write(path);
  }

  /// Takes up what save() left; the sizes of the network and the baseline must be those of the file.
  /// Throws std::runtime_error, nothing having changed, if anything is missing or cannot be.
  void load(const moe::SafetensorsFile& file) {
    for_each_extra([&](const std::string& name, auto&& value) {
      file.check(name, value);
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(value)>, std::span<Index>>) {
        std::vector<Index> counts(value.size());
        file.read(name, std::span<Index>(counts));
        const bool sane =
            std::all_of(counts.begin(), counts.end(), [](Index count) { return count >= 0; }) &&
            (name != "training.counts" || counts[1] < rewards_.past().cols());
        if (!sane) throw std::runtime_error(file.path() + ": " + name + " is out of range");
      }
    });
    file.read_parameters(network_);
    for_each_extra([&](const std::string& name, auto&& value) { file.read(name, value); });
    recall();
  }

 private:
  /// Calls f(name, value) for what the network does not hold.
  template <class F>
  void for_each_extra(F&& f) {
    adam_.for_each_state(network_, [&](const std::string& name, auto&& value) {
      f("training.adam." + name, value);
    });
    if (options_.baseline == "linear") {
      moe::for_each_parameter(helper_, [&](const std::string& name, auto& parameter) {
        f("training." + name, parameter.value);
      });
      helper_adam_.for_each_state(helper_, [&](const std::string& name, auto&& value) {
        f("training.baseline_adam." + name, value);
      });
    }
    f("training.past_rewards", rewards_.past());
    f("training.figures", figures_);
    f("training.counts", std::span<Index>(counts_));
  }

  /// The figures that are no matrix, in one that can be saved, and back.
  void remember() {
    const auto* baseline = std::get_if<moe::RunningMeanBaseline>(&helper_.baseline());
    const moe::RunningMean returns = baseline != nullptr ? baseline->mean : moe::RunningMean{};
    figures_ << returns.sum, returns.weight, cross_entropy_.sum, cross_entropy_.weight, reward_.sum,
        reward_.weight, share_.sum, share_.weight, seconds_;
    counts_ = {update_, rewards_.next()};
  }
  void recall() {
    if (const auto* baseline = std::get_if<moe::RunningMeanBaseline>(&helper_.baseline())) {
      helper_.set_baseline(moe::RunningMeanBaseline{
          .rate = baseline->rate, .mean = {.sum = figures_(0, 0), .weight = figures_(0, 1)}});
    }
    cross_entropy_ = {figures_(0, 2), figures_(0, 3)};
    reward_ = {figures_(0, 4), figures_(0, 5)};
    share_ = {figures_(0, 6), figures_(0, 7)};
    seconds_ = figures_(0, 8);
    update_ = counts_[0];
    rewards_.next() = counts_[1];
  }

  Options options_;
  Network network_;
  Helper helper_;
  Schedule schedule_;
  Rewards rewards_;
  Batches batches_;
  moe::Adam<float> adam_;
  moe::Adam<float> helper_adam_;
  Batch batch_;
  Helper::Tape tape_;
  moe::RunningMean cross_entropy_, reward_, share_;
  Index update_ = 0;
  double seconds_ = 0;
  moe::Matrix<double> figures_{1, 9};
  std::vector<Index> counts_{0, 0};
};

}  // namespace pronounce
