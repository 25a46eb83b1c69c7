#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <moe/moe.hpp>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "adaptive_softmax.hpp"
#include "corpus.hpp"
#include "recurrent.hpp"
#include "residual.hpp"

/// \file
/// The language model of N. Shazeer et al. 2017, App. C.1: embedding, LSTM, mixture of experts, LSTM
/// and softmax. Each of the layers in the middle is followed by dropout and added to its own
/// input; the mixture works on all time steps of a batch at once. The paper's mixture has a sigmoid on
/// its output. Today's models have none, normalise the input of each layer and of the softmax, and many have a
/// mixture behind every layer that mixes time steps: here, with ModelConfig.mixtures = 2, another one behind the second LSTM.

namespace language_model {

using Matrix = moe::Matrix<float>;

template <class MiddleConfig>
struct ModelConfig {
  Index vocabulary = 0;
  Index width = 0;        ///< D, of the embedding and of what each layer takes and gives
  Index memory = 0;       ///< hidden width of the first and the last LSTM; 0 stands for `width`
  bool pre_norm = false;  ///< whether inputs are normalised
  MiddleConfig middle{};
  Index mixtures = 1;  ///< 1, or 2: another like the one in the middle behind the second LSTM
  std::vector<Index> cutoffs{};  ///< of AdaptiveSoftmax, as is shrink
  Index shrink = 2;
  double embedding_deviation = 0;  ///< of the normal distribution that embeddings start from
  double dropout = 0;
  std::uint64_t seed = 0;
};

/// `Middle` is the layer between the LSTMs: a Mixture, or the RecurrentStack that it is compared
/// with. `Linear` are the linear maps beside it: moe::Linear, or
/// moe::NarrowLinear to serve.
template <class Middle, class Linear = moe::Linear<float>>
class Model {
  using Recurrent = language_model::Recurrent<float, Linear>;
  using Softmax = AdaptiveSoftmax<float, Linear>;

 public:
  using Config = ModelConfig<typename Middle::Config>;

  /// What is carried from one batch to the next.
  struct State {
    typename Recurrent::State first;
    typename Middle::State middle;
    typename Recurrent::State second;
    typename Middle::State last;
  };

  struct Tape {
    moe::Embedding<float>::Tape embedding;
    moe::Dropout<float>::Tape drop_embedding;
    typename Residual<Recurrent>::Tape first, second;
    typename Residual<Middle>::Tape middle, last;
    OptionalNorm<float>::Tape norm;
    typename Softmax::Tape softmax;
    moe::Balance<float> of_both;
    bool has_both = false;

    /// Of two mixtures, as if all experts were one layer's: first those of the mixture between the LSTMs.
    const auto& balance() const { return has_both ? of_both : middle.layer.balance(); }
  };

  /// `surroundings`: what else the layer in the middle takes.
  template <class... Surroundings>
  explicit Model(const Config& config, const Surroundings&... surroundings)
      : config_(config),
        embedding_({.vocabulary = config.vocabulary,
                    .width = config.width,
                    .init_stddev = config.embedding_deviation},
                   seed(0)),
        drop_embedding_({.rate = config.dropout}, seed(5)),
        first_(residual(), seed(6), lstm(), seed(1)),
        middle_(residual(), seed(7), config.middle, config.width, seed(2), surroundings...),
        second_(residual(), seed(8), lstm(), seed(3)),
        norm_(config.pre_norm, config.width),
        softmax_({.vocabulary = config.vocabulary,
                  .width = config.width,
                  .cutoffs = config.cutoffs,
                  .shrink = config.shrink},
                 seed(4)) {
    moe::detail::require(config.mixtures == 1 || config.mixtures == 2,
                         "ModelConfig.mixtures = ", config.mixtures, ", must be 1 or 2");
    if (config.mixtures == 2) {
      last_.emplace(residual(), seed(10), config.middle, config.width, seed(9), surroundings...);
    }
  }

  /// One that was trained, its weights rounded, to evaluate. Throws std::invalid_argument, which names
  /// the weight, where one cannot be rounded.
  template <class Trained>
  Model(const Model<Trained>& trained, const moe::NarrowOptions& options)
      : config_(trained.config_),
        embedding_(trained.embedding_),
        drop_embedding_(trained.drop_embedding_),
        first_(trained.first_, options),
        middle_(trained.middle_, options),
        second_(trained.second_, options),
        norm_(trained.norm_),
        softmax_(trained.softmax_, options) {
    if (trained.last_) last_.emplace(*trained.last_, options);
  }

  /// One that was trained, with another layer in the middle. Throws std::invalid_argument where it has two
  /// mixtures.
  template <class Trained>
  Model(const Model<Trained, Linear>& trained, Middle middle)
      : config_(trained.config_),
        embedding_(trained.embedding_),
        drop_embedding_(trained.drop_embedding_),
        first_(trained.first_),
        middle_(trained.middle_, std::move(middle)),
        second_(trained.second_),
        norm_(trained.norm_),
        softmax_(trained.softmax_) {
    moe::detail::require(!trained.last_,
                         "a model of two mixtures gets no other layer in its middle");
  }

  const Config& config() const { return config_; }
  const Middle& middle() const { return middle_.layer(); }

  /// Calls f(mixture) for the layer in the middle and the one behind the second LSTM, if there is one.
  template <class F>
  void for_each_mixture(F&& f) const {
    f(middle());
    if (last_) f(last_->layer());
  }

  /// Of all mixtures.
  Index experts() const {
    return sum_of_mixtures([](const Middle& mixture) { return mixture.experts(); });
  }
  /// How many of them a token goes to.
  Index top_k() const {
    return sum_of_mixtures([](const Middle& mixture) { return mixture.top_k(); });
  }

  /// Starts the biases of the softmax at the words' frequencies in the training part.
  void start_from_frequencies(std::span<const double> frequencies) {
    softmax_.start_from_frequencies(frequencies);
  }

  State initial_state(Index sequences) const {
    return {first_.layer().initial_state(sequences), middle().initial_state(sequences),
            second_.layer().initial_state(sequences), middle().initial_state(sequences)};
  }

  /// Calls f(name, matrix) for all that a state carries.
  template <class F>
  static void for_each_of_state(State& state, F&& f) {
    static_assert(std::is_empty_v<typename Middle::State>,
                  "only what the LSTMs carry is known here");
    f("first.hidden", state.first.hidden);
    f("first.cell", state.first.cell);
    f("second.hidden", state.second.hidden);
    f("second.cell", state.second.cell);
  }

  /// Multiply-adds a token in the layers between embedding and softmax, which is how the paper
  /// counts operations: two LSTMs, the gates with their noise, and the experts that are used.
  Index operations() const {
    return first_.layer().operations() + second_.layer().operations() +
           sum_of_mixtures([](const Middle& mixture) { return mixture.operations(); });
  }

  /// Mean cross-entropy of a batch in nats, without the balance loss, which is in tape.balance().
  /// Adds the gradient of both to the parameters. Of a part, the cross-entropy is its own, and the
  /// gradient that by the mean over the parts: add up what all of them have.
  double train(std::span<const Index> input, std::span<const Index> target, State& state,
               Tape& tape, const moe::NoiseKey& key, const BatchPart& part = {}) {
    // The middle layer, if it knows of other parts, counts their tokens itself.
    moe::NoiseKey dropout = key;
    dropout.first_token +=
        static_cast<std::uint32_t>(part.index * static_cast<Index>(input.size()));
    const Matrix& x = drop_embedding_.forward(embedding_.forward(input, tape.embedding),
                                              tape.drop_embedding, dropout);
    const Matrix& after_first = first_.forward(x, state.first, tape.first, key, dropout);
    const Matrix& after_middle =
        middle_.forward(after_first, state.middle, tape.middle, key, dropout);
    const Matrix& after_second =
        second_.forward(after_middle, state.second, tape.second, key, dropout);
    const Matrix& after_last =
        last_ ? last_->forward(after_second, state.last, tape.last, key, dropout) : after_second;
    const double loss =
        softmax_.forward(norm_.forward(after_last, tape.norm), target, tape.softmax);
    join_balances(tape);

    const Matrix& of_softmax = softmax_.backward(tape.softmax, 1 / static_cast<double>(part.count));
    const Matrix& of_norm = norm_.backward(of_softmax, tape.norm);
    const Matrix& of_last = last_ ? last_->backward(of_norm, tape.last) : of_norm;
    const Matrix& of_second = second_.backward(of_last, tape.second);
    const Matrix& of_middle = middle_.backward(of_second, tape.middle);
    // Where only what comes later is trained, no gradient is needed here.
    if (!moe::detail::is_trained(first_) && !moe::detail::is_trained(embedding_)) return loss;
    const Matrix& of_first = first_.backward(of_middle, tape.first);
    embedding_.backward(drop_embedding_.backward(of_first, tape.drop_embedding), tape.embedding);
    return loss;
  }

  /// Mean cross-entropy of a batch in nats, without dropout and noise; leaves the balance in
  /// tape.balance().
  double evaluate(std::span<const Index> input, std::span<const Index> target, State& state,
                  Tape& tape) const {
    const double loss =
        softmax_.evaluate(evaluate_layers(input, state, tape), target, tape.softmax);
    join_balances(tape);
    return loss;
  }

  /// Multiplies the noise of the gates in train(), from now on.
  void set_noise(double factor) {
    if constexpr (requires { middle_.layer().set_noise(factor); }) {
      middle_.layer().set_noise(factor);
      if (last_) last_->layer().set_noise(factor);
    }
  }

  /// To be called after every update of the parameters, with the tape of train().
  void after_update(const Tape& tape) {
    middle_.layer().after_update(tape.middle.layer);
    if (last_) last_->layer().after_update(tape.last.layer);
  }

  /// The logarithm of the probability of every word to follow each of `input`.
  Matrix log_probabilities(std::span<const Index> input, State& state, Tape& tape) const {
    return softmax_.log_probabilities(evaluate_layers(input, state, tape));
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("embedding", self.embedding_);
    visit("first", self.first_);
    visit("middle", self.middle_);
    visit("second", self.second_);
    if (self.last_) visit("last", *self.last_);
    visit("norm", self.norm_);
    visit("softmax", self.softmax_);
  }

 private:
  template <class, class>
  friend class Model;

  /// What the softmax reads.
  const Matrix& evaluate_layers(std::span<const Index> input, State& state, Tape& tape) const {
    const Matrix& x = embedding_.evaluate(input, tape.embedding);
    const Matrix& after_first = first_.evaluate(x, state.first, tape.first);
    const Matrix& after_middle = middle_.evaluate(after_first, state.middle, tape.middle);
    const Matrix& after_second = second_.evaluate(after_middle, state.second, tape.second);
    return norm_.evaluate(
        last_ ? last_->evaluate(after_second, state.last, tape.last) : after_second, tape.norm);
  }

  template <class F>
  Index sum_of_mixtures(F&& f) const {
    Index sum = 0;
    for_each_mixture([&](const Middle& mixture) { sum += f(mixture); });
    return sum;
  }

  void join_balances(Tape& tape) const {
    tape.has_both = last_.has_value();
    if (!last_) return;
    const moe::Balance<float>& middle = tape.middle.layer.balance();
    const moe::Balance<float>& last = tape.last.layer.balance();
    const auto join = [](const auto& a, const auto& b, auto& both) {
      both.resize(a.size() + b.size());
      std::copy(a.begin(), a.end(), both.begin());
      std::copy(b.begin(), b.end(), both.begin() + static_cast<std::ptrdiff_t>(a.size()));
    };
    join(middle.importance, last.importance, tape.of_both.importance);
    join(middle.load, last.load, tape.of_both.load);
    join(middle.tokens_per_expert, last.tokens_per_expert, tape.of_both.tokens_per_expert);
    tape.of_both.losses = middle.losses;
    tape.of_both.losses += last.losses;
    tape.of_both.loss = middle.loss + last.loss;
  }

  ResidualConfig residual() const { return {config_.width, config_.pre_norm, config_.dropout}; }
  RecurrentConfig lstm() const {
    return {config_.width, config_.memory > 0 ? config_.memory : config_.width};
  }
  std::uint64_t seed(std::uint64_t part) const { return moe::derive_seed(config_.seed, part); }

  Config config_;
  moe::Embedding<float> embedding_;
  moe::Dropout<float> drop_embedding_;
  Residual<Recurrent> first_;
  Residual<Middle> middle_;
  Residual<Recurrent> second_;
  std::optional<Residual<Middle>> last_;
  OptionalNorm<float> norm_;
  Softmax softmax_;
};

}  // namespace language_model
