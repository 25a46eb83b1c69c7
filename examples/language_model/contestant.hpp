#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../common/terminal.hpp"
#include "corpus.hpp"
#include "mixture.hpp"
#include "model.hpp"
#include "options.hpp"
#include "timetable.hpp"

/// \file
/// One of the models that are trained side by side, with all that its training carries along.

namespace language_model {

using examples::seconds_now;

/// What a pass over held-out text tells.
struct Evaluation {
  double perplexity = 0;
  moe::Balance<float> balance;  ///< of all its tokens together
};

/// What is shown of a model in training.
struct Figures {
  std::string name;
  Index experts = 0;
  Index active = 0;
  Index operations = 0;  ///< multiply-adds a token
  Index parameters = 0;
  double loss = 0;     ///< recent training loss in nats
  double seconds = 0;  ///< of all updates so far, in which other models may have been trained too
  double tokens_per_second = 0;
};

/// Who trains a model: one process. Several that do it together have a class with the same members
/// (../expert_parallel/ranks.hpp).
class Alone {
 public:
  BatchPart part() const { return {}; }

  /// The mean of what the parts have.
  double mean(double value) const { return value; }

  template <class Module>
  Index parameter_count(const Module& module) const {
    return moe::parameter_count(module);
  }

  /// Makes of the gradients of a part those of the batch, and clips them.
  template <class Module>
  void finish_gradients(Module& module, double largest_norm, moe::Updates updates) const {
    moe::clip_gradients(module, largest_norm, updates);
  }
};

/// `sequences` are those of all parts.
template <class Middle, class Linear, class Team = Alone>
Evaluation evaluate(const Model<Middle, Linear>& model, const Batches& batches, Index sequences,
                    const Team& team = {}) {
  typename Model<Middle, Linear>::Tape tape;
  typename Model<Middle, Linear>::State state = model.initial_state(sequences / team.part().count);
  Batches::Batch batch;
  Evaluation result;
  moe::Balance<float>& total = result.balance;
  const Index experts = model.experts();
  total.importance.setZero(experts);
  total.load.setZero(experts);
  total.tokens_per_expert.assign(static_cast<std::size_t>(experts), 0);
  double loss = 0;
  for (Index i = 0; i < batches.count(); ++i) {
    batches.get(i, batch);
    loss += model.evaluate(batch.input, batch.target, state, tape);
    const moe::Balance<float>& balance = tape.balance();
    total.importance += balance.importance;
    total.load += balance.load;
    for (std::size_t e = 0; e < total.tokens_per_expert.size(); ++e) {
      total.tokens_per_expert[e] += balance.tokens_per_expert[e];
    }
  }
  result.perplexity = std::exp(team.mean(loss) / static_cast<double>(batches.count()));
  return result;
}

/// A module's parameters that have certain names, as a module: for an optimizer of their own.
template <class Module, class Predicate>
class ParametersWhere {
 public:
  ParametersWhere(Module& module, Predicate chosen) : module_(module), chosen_(std::move(chosen)) {}

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    moe::for_each_parameter(self.module_, [&](const std::string& name, auto& parameter) {
      if (self.chosen_(name)) visit(name.c_str(), parameter);
    });
  }

 private:
  Module& module_;
  Predicate chosen_;
};

inline bool is_of_expert(std::string_view name) {
  return name.starts_with("middle.experts.") || name.starts_with("last.experts.");
}
inline bool is_of_gate(std::string_view name) {
  return name.starts_with("middle.gate.") || name.starts_with("last.gate.");
}

template <class Middle>
struct ContestantConfig {
  std::string name{};
  typename Model<Middle>::Config model{};
  Index sequences = 0;    ///< in a batch, those of all parts
  bool factored = false;  ///< FactoredAdam for the experts, which Adam is for otherwise too
  double clip = 0;
  /// Learning rates of parts of the mixture, as factors of everything else's.
  double gate_rate = 1;
  double noise_rate = 1;
  double threshold_rate = 1;
  double expert_rate = 1;
  std::vector<double> frequencies{};  ///< of the words in the training part
};

template <class Middle, class Team = Alone>
class Contestant {
 public:
  using Config = ContestantConfig<Middle>;

  /// `surroundings`: what else the layer in the middle takes.
  template <class... Surroundings>
  explicit Contestant(Config config, const Team& team = {}, const Surroundings&... surroundings)
      : config_(std::move(config)),
        team_(team),
        model_(config_.model, surroundings...),
        parameters_(team_.parameter_count(model_)) {
    start_epoch();
    model_.start_from_frequencies(config_.frequencies);
    set_rates();
  }

  /// Goes on with a model that was trained; of the configuration's model nothing is used.
  Contestant(Config config, Model<Middle> trained)
      : config_(std::move(config)),
        model_(std::move(trained)),
        parameters_(team_.parameter_count(model_)) {
    start_epoch();
    set_rates();
  }

  const Model<Middle>& model() const { return model_; }
  /// Of the last update's batch.
  const moe::Balance<float>& balance() const { return tape_.balance(); }
  double seconds() const { return seconds_; }

  Figures figures() const {
    return {.name = config_.name,
            .experts = model_.experts(),
            .active = model_.top_k(),
            .operations = model_.operations(),
            .parameters = parameters_,
            .loss = loss_,
            .seconds = seconds_,
            .tokens_per_second = seconds_ > 0 ? tokens_ / seconds_ : 0};
  }

  void start_epoch() { state_ = model_.initial_state(config_.sequences / team_.part().count); }

  /// The timetable's next update; the batch is this one's part of its batch.
  void update(const Batches::Batch& batch, const Timetable& timetable) {
    if (timetable.batch() == 0) start_epoch();
    update(batch, static_cast<std::uint64_t>(timetable.update()), timetable.learning_rate(),
           timetable.noise());
  }
  /// `noise` is a factor of the gate's.
  void update(const Batches::Batch& batch, std::uint64_t step, double learning_rate,
              double noise = 1) {
    const double start = seconds_now();
    model_.set_noise(noise);
    // FactoredAdam passes by the experts that got no tokens. Adam's moments go on without them.
    const auto updates = config_.factored ? moe::Updates::lazy : moe::Updates::dense;
    moe::zero_gradients(model_, updates);
    const double loss = team_.mean(
        model_.train(batch.input, batch.target, state_, tape_, {.step = step}, team_.part()));
    team_.finish_gradients(model_, config_.clip, updates);
    for_each_optimizer([&](const char*, auto& optimizer, auto& module) {
      optimizer.update(module, learning_rate);
    });
    model_.after_update(tape_);
    seconds_ += seconds_now() - start;
    loss_ = tokens_ > 0 ? 0.98 * loss_ + 0.02 * loss : loss;
    tokens_ += static_cast<double>(batch.input.size()) * static_cast<double>(team_.part().count);
  }

  /// Memory of the gradients and of what the optimizers remember, in bytes, after an update.
  Index training_bytes() {
    Index numbers = parameters_;
    for_each_optimizer([&](const char*, auto& optimizer, auto& module) {
      optimizer.for_each_state(module, [&](const std::string&, const auto& state) {
        if constexpr (requires { state.rows(); }) numbers += state.size();
      });
    });
    return numbers * static_cast<Index>(sizeof(float));
  }

  /// Adds everything that the next updates depend on, under names that begin with `prefix`: the model, the
  /// optimizers, what the LSTMs carry on, and the figures. It is not copied, and must stay until the file
  /// is written. Of several processes, this one's. `Writer` is a moe::SafetensorsWriter, which not all who
  /// train need.
  template <class Writer>
  void save(Writer& writer, const std::string& prefix) {
    progress_ << seconds_, tokens_, loss_;
    writer.add_parameters(model_, prefix + "model.");
    for_each_optimizer([&](const std::string& name, auto& optimizer, auto& module) {
      writer.add_optimizer(optimizer, module, prefix + name);
    });
    for_each_number(
        [&](const std::string& name, const auto& numbers) { writer.add(prefix + name, numbers); });
  }

  /// Takes up what save() added, for updates of the same bits. Throws std::runtime_error where something is
  /// missing or has another size; then the contestant is not to be trained. `File` is a
  /// moe::SafetensorsFile.
  template <class File>
  void load(const File& file, const std::string& prefix) {
    file.read_parameters(model_, prefix + "model.");
    for_each_optimizer([&](const std::string& name, auto& optimizer, auto& module) {
      file.read_optimizer(optimizer, module, prefix + name);
    });
    for_each_number(
        [&](const std::string& name, auto& numbers) { file.read(prefix + name, numbers); });
    seconds_ = progress_(0, 0);
    tokens_ = progress_(0, 1);
    loss_ = progress_(0, 2);
  }

 private:
  /// What is saved besides model and optimizers.
  template <class F>
  void for_each_number(F&& f) {
    Model<Middle>::for_each_of_state(
        state_, [&](const char* name, auto& matrix) { f(std::string("state.") + name, matrix); });
    f("progress", progress_);
  }

  void set_rates() {
    const auto groups = [expert = config_.expert_rate, noise = config_.noise_rate,
                         threshold = config_.threshold_rate,
                         gate = config_.gate_rate](std::string_view name) -> moe::ParameterGroup {
      return {.rate_factor = is_of_expert(name)               ? expert
                             : !is_of_gate(name)              ? 1.0
                             : name.ends_with("noise_weight") ? noise
                             : name.ends_with("threshold")    ? threshold
                                                              : gate};
    };
    adam_.set_groups(groups);
    factored_adam_.set_groups(groups);
  }

  /// Calls f(name, optimizer, the parameters that it is for) for each.
  template <class F>
  void for_each_optimizer(F&& f) {
    const auto is_factored = [this](std::string_view name) {
      return config_.factored && is_of_expert(name);
    };
    ParametersWhere factored(model_, is_factored);
    ParametersWhere others(model_, std::not_fn(is_factored));
    if (config_.factored) f("factored_adam.", factored_adam_, factored);
    f("adam.", adam_, others);
  }

  Config config_;
  Team team_;
  Model<Middle> model_;
  Index parameters_;
  moe::Adam<float> adam_{moe::Adam<float>::Config{.beta2 = 0.99}};
  moe::FactoredAdam<float> factored_adam_{
      moe::FactoredAdam<float>::Config{.beta2 = 0.99, .updates = moe::Updates::lazy}};
  typename Model<Middle>::State state_;
  typename Model<Middle>::Tape tape_;
  double seconds_ = 0;
  double tokens_ = 0;
  double loss_ = 0;
  moe::Matrix<double> progress_{1, 3};  ///< the last three, to be saved
};

/// What the options say of every contestant; name and middle are left.
template <class Middle>
ContestantConfig<Middle> contestant_config(const Options& o, std::vector<double> frequencies) {
  ContestantConfig<Middle> config{.sequences = o.sequences,
                                  .factored = o.factored,
                                  .clip = o.clip,
                                  .gate_rate = o.gate_rate,
                                  .noise_rate = o.noise_rate,
                                  .threshold_rate = o.threshold_rate,
                                  .expert_rate = o.expert_rate,
                                  .frequencies = std::move(frequencies)};
  config.model.vocabulary = static_cast<Index>(config.frequencies.size());
  config.model.width = o.width;
  config.model.memory = o.memory;
  config.model.pre_norm = o.pre_norm;
  config.model.cutoffs = o.cutoffs;
  config.model.shrink = o.shrink;
  config.model.embedding_deviation = o.embedding_deviation;
  config.model.dropout = o.dropout;
  config.model.seed = o.seed;
  return config;
}

/// A model with a mixture behind a gate.
template <class Middle>
ContestantConfig<Middle> mixture_config(const Options& o, std::vector<double> frequencies,
                                        std::string name,
                                        const decltype(Middle::Config::gate)& gate) {
  ContestantConfig<Middle> config = contestant_config<Middle>(o, std::move(frequencies));
  config.name = std::move(name);
  config.model.middle = {.gate = gate, .hidden = o.hidden};
  config.model.mixtures = o.mixtures;
  set_style(config.model.middle, o);
  return config;
}

/// The sparse model of the options, with the gate of the paper.
template <class Middle>
ContestantConfig<Middle> sparse_config(const Options& o, std::vector<double> frequencies) {
  return mixture_config<Middle>(o, std::move(frequencies), "sparse",
                                {.experts = o.experts,
                                 .top_k = o.top_k,
                                 .noise = has_noise(o),
                                 .importance_weight = o.importance_weight,
                                 .load_weight = o.load_weight});
}

/// A sparse model behind a hierarchical gate, which chooses two groups.
template <class Middle>
ContestantConfig<Middle> hierarchical_config(const Options& o, std::vector<double> frequencies) {
  return mixture_config<Middle>(o, std::move(frequencies), "hierarchical",
                                {.groups = o.groups,
                                 .group_experts = o.group_experts,
                                 .top_k_groups = 2,
                                 .top_k = o.top_k / 2,
                                 .noise = has_noise(o),
                                 .importance_weight = o.importance_weight,
                                 .load_weight = o.load_weight});
}

/// `count` words or characters drawn from the model, one after the other, from the start of a document on.
template <class Middle>
std::string sample(const Model<Middle>& model, const Vocabulary& vocabulary, Index count,
                   std::uint64_t seed) {
  constexpr double temperature = 0.8;
  typename Model<Middle>::Tape tape;
  typename Model<Middle>::State state = model.initial_state(1);
  std::string text;
  Index word = Vocabulary::end;
  std::vector<double> mass(static_cast<std::size_t>(vocabulary.size()));
  for (Index i = 0; i < count; ++i) {
    const Matrix log_probabilities = model.log_probabilities(std::vector<Index>{word}, state, tape);
    double total = 0;
    for (Index v = 0; v < vocabulary.size(); ++v) {
      const bool allowed = v != Vocabulary::unknown;
      total += allowed ? std::exp(log_probabilities(0, v) / temperature) : 0;
      mass[static_cast<std::size_t>(v)] = total;
    }
    const auto bits = moe::philox({static_cast<std::uint32_t>(i), 0, 0, 0}, seed)[0];
    const double dice = static_cast<double>(moe::uniform(bits)) * total;
    word = static_cast<Index>(std::upper_bound(mass.begin(), mass.end(), dice) - mass.begin());
    word = std::min(word, vocabulary.size() - 1);
    text += vocabulary.written(word, vocabulary.unit() == Unit::word ? ";" : "\n");
  }
  if (vocabulary.unit() == Unit::word) text.erase(0, 1);  // the blank before the first
  return text;
}

}  // namespace language_model
