#pragma once

#include <cstddef>
#include <cstdint>
#include <moe/moe.hpp>
#include <span>
#include <vector>

#include "adaptive_softmax.hpp"
#include "corpus.hpp"
#include "recurrent.hpp"

/// \file
/// The language model of N. Shazeer et al. 2017, App. C.1: embedding, LSTM, mixture of experts, LSTM
/// and softmax. Each of the three layers in the middle is followed by dropout and added to its own
/// input; the mixture has a sigmoid on its output and works on all time steps of a batch at once.

namespace language_model {

using Matrix = moe::Matrix<float>;

/// `Middle` is the layer between the LSTMs: a Mixture, or the RecurrentStack that it is compared
/// with.
template <class Middle>
class Model {
 public:
  struct Config {
    Index vocabulary = 0;
    Index width = 0;   ///< D, of the embedding and of what each layer takes and gives
    Index memory = 0;  ///< hidden width of the first and the last LSTM; 0 stands for `width`
    typename Middle::Config middle{};
    std::vector<Index> cutoffs{};  ///< of AdaptiveSoftmax, as is shrink
    Index shrink = 2;
    double embedding_deviation = 0;  ///< of the normal distribution that embeddings start from
    double dropout = 0;
    std::uint64_t seed = 0;
  };

  /// What is carried from one batch to the next.
  struct State {
    Recurrent<float>::State first;
    typename Middle::State middle;
    Recurrent<float>::State second;
  };

  struct Tape {
    moe::Embedding<float>::Tape embedding;
    Recurrent<float>::Tape first, second;
    typename Middle::Tape middle;
    moe::Dropout<float>::Tape drop_embedding, drop_first, drop_middle, drop_second;
    AdaptiveSoftmax<float>::Tape softmax;
    Matrix after_first, after_middle, after_second;
    Matrix dx;
  };

  /// `surroundings`: what else the layer in the middle takes.
  template <class... Surroundings>
  explicit Model(const Config& config, const Surroundings&... surroundings)
      : config_(config),
        embedding_({.vocabulary = config.vocabulary,
                    .width = config.width,
                    .init_stddev = config.embedding_deviation},
                   seed(0)),
        first_({.width = config.width, .hidden = memory(config)}, seed(1)),
        middle_(config.middle, config.width, seed(2), surroundings...),
        second_({.width = config.width, .hidden = memory(config)}, seed(3)),
        softmax_({.vocabulary = config.vocabulary,
                  .width = config.width,
                  .cutoffs = config.cutoffs,
                  .shrink = config.shrink},
                 seed(4)),
        drop_embedding_({.rate = config.dropout}, seed(5)),
        drop_first_({.rate = config.dropout}, seed(6)),
        drop_middle_({.rate = config.dropout}, seed(7)),
        drop_second_({.rate = config.dropout}, seed(8)) {}

  const Config& config() const { return config_; }
  const Middle& middle() const { return middle_; }

  /// Starts the biases of the softmax at the words' frequencies in the training part.
  void start_from_frequencies(std::span<const double> frequencies) {
    softmax_.start_from_frequencies(frequencies);
  }

  State initial_state(Index sequences) const {
    return {first_.initial_state(sequences), middle_.initial_state(sequences),
            second_.initial_state(sequences)};
  }

  /// Multiply-adds a token in the layers between embedding and softmax, which is how the paper
  /// counts operations: two LSTMs, the gate with its noise, and the experts that are used.
  Index operations() const {
    return first_.operations() + middle_.operations() + second_.operations();
  }

  /// Mean cross-entropy of a batch in nats, without the balance loss, which is in
  /// tape.middle.balance. Adds the gradient of both to the parameters. Of a part, the cross-entropy is
  /// its own, and the gradient that by the mean over the parts: add up what all of them have.
  double train(std::span<const Index> input, std::span<const Index> target, State& state,
               Tape& tape, const moe::NoiseKey& key, const BatchPart& part = {}) {
    // The middle layer, if it knows of other parts, counts their tokens itself.
    moe::NoiseKey dropout = key;
    dropout.first_token +=
        static_cast<std::uint32_t>(part.index * static_cast<Index>(input.size()));
    const Matrix& x = drop_embedding_.forward(embedding_.forward(input, tape.embedding),
                                              tape.drop_embedding, dropout);
    tape.after_first = x + drop_first_.forward(first_.forward(x, state.first, tape.first),
                                               tape.drop_first, dropout);
    tape.after_middle =
        tape.after_first +
        drop_middle_.forward(middle_.forward(tape.after_first, state.middle, tape.middle, key),
                             tape.drop_middle, dropout);
    tape.after_second =
        tape.after_middle +
        drop_second_.forward(second_.forward(tape.after_middle, state.second, tape.second),
                             tape.drop_second, dropout);
    const double loss = softmax_.forward(tape.after_second, target, tape.softmax);

    // Backwards, each residual sum passing its gradient on twice.
    tape.dx = softmax_.backward(tape.softmax, 1 / static_cast<double>(part.count));
    tape.dx += second_.backward(drop_second_.backward(tape.dx, tape.drop_second), tape.second);
    tape.dx += middle_.backward(drop_middle_.backward(tape.dx, tape.drop_middle), tape.middle);
    tape.dx += first_.backward(drop_first_.backward(tape.dx, tape.drop_first), tape.first);
    embedding_.backward(drop_embedding_.backward(tape.dx, tape.drop_embedding), tape.embedding);
    return loss;
  }

  /// Mean cross-entropy of a batch in nats, without dropout and noise; leaves the balance in
  /// tape.middle.balance.
  double evaluate(std::span<const Index> input, std::span<const Index> target, State& state,
                  Tape& tape) const {
    evaluate_layers(input, state, tape);
    return softmax_.evaluate(tape.after_second, target, tape.softmax);
  }

  /// To be called after every update of the parameters, with the tape of train().
  void after_update(const Tape& tape) { middle_.after_update(tape.middle); }

  /// The logarithm of the probability of every word to follow each of `input`.
  Matrix log_probabilities(std::span<const Index> input, State& state, Tape& tape) const {
    evaluate_layers(input, state, tape);
    return softmax_.log_probabilities(tape.after_second);
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("embedding", self.embedding_);
    visit("first", self.first_);
    visit("middle", self.middle_);
    visit("second", self.second_);
    visit("softmax", self.softmax_);
  }

 private:
  /// Leaves in tape.after_second what the softmax reads.
  void evaluate_layers(std::span<const Index> input, State& state, Tape& tape) const {
    const Matrix& x = embedding_.evaluate(input, tape.embedding);
    tape.after_first = x + first_.evaluate(x, state.first, tape.first);
    tape.after_middle =
        tape.after_first + middle_.evaluate(tape.after_first, state.middle, tape.middle);
    tape.after_second =
        tape.after_middle + second_.evaluate(tape.after_middle, state.second, tape.second);
  }

  static Index memory(const Config& config) {
    return config.memory > 0 ? config.memory : config.width;
  }

  std::uint64_t seed(std::uint64_t part) const { return moe::derive_seed(config_.seed, part); }

  Config config_;
  moe::Embedding<float> embedding_;
  Recurrent<float> first_;
  Middle middle_;
  Recurrent<float> second_;
  AdaptiveSoftmax<float> softmax_;
  moe::Dropout<float> drop_embedding_, drop_first_, drop_middle_, drop_second_;
};

}  // namespace language_model
