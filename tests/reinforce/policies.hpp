#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "../support.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/embedding.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/lstm.hpp"
#include "moe/nn/packed_rows.hpp"
#include "moe/reinforce/reinforce.hpp"

/// \file
/// A small policy with all that can go wrong in one: a recurrent state that starts from the input,
/// and a mixture of experts, with noise, inside every step. An input is a number, or several: then
/// the state starts from the sum of their embeddings.

namespace moe::test {

template <class Scalar_ = double, class Input_ = Index>
class SmallPolicy {
 public:
  using Scalar = Scalar_;
  using Input = Input_;

  struct Config {
    Index inputs = 4;
    Index symbols = 3;
    Index hidden = 5;
    Index experts = 4;
    Index expert_hidden = 6;
    bool mixture = true;
    double balance = 0.1;         ///< weight of the mixture's losses
    bool nan_in_padding = false;  ///< logits and state of padding are NaN
    std::uint64_t seed = 1;
    double scale = 1;  ///< of all parameters' start
  };

  struct Tape {
    std::vector<Index> owners;  ///< the input that each embedded number is of
    typename Embedding<Scalar>::Tape input, symbol;
    typename LSTM<Scalar>::State start;
    typename LSTM<Scalar>::Tape lstm;
    PackedRows real;
    Matrix<Scalar> packed, mixed, hidden, dpacked, dmixed, dhidden, dstart;
    typename MoELayer<Expert<FeedForward, Scalar>>::Tape mixture;
    typename Linear<Scalar>::Tape logits;
    Matrix<Scalar> result;
    Index samples = 0;
  };
  struct State : Tape {
    std::optional<NoiseKey> noise;
    Index tokens = 0;
  };

  explicit SmallPolicy(const Config& config)
      : config_(config),
        input_({.vocabulary = config.inputs, .width = config.hidden}, 10 * config.seed),
        symbol_({.vocabulary = config.symbols, .width = 4}, 10 * config.seed + 1),
        lstm_({.inputs = 4, .hidden = config.hidden}, 10 * config.seed + 2),
        mixture_({.width = config.hidden,
                  .expert = {.hidden = config.expert_hidden, .activation = Activation::gelu},
                  .gate = {.experts = config.experts,
                           .top_k = 2,
                           .importance_weight = config.balance,
                           .load_weight = config.balance},
                  .seed = 10 * config.seed + 3}),
        logits_({.inputs = config.hidden, .outputs = config.symbols}, 10 * config.seed + 4) {
    std::uint64_t seed = 100 * config.seed;
    for_each_parameter(*this, [&](const ParameterName&, auto& p) {
      p.value = random_matrix<Scalar>(p.value.rows(), p.value.cols(), ++seed, 0.5 * config.scale);
    });
  }

  Index symbols() const { return config_.symbols; }

  void begin(std::span<const Input> inputs, Index samples, const std::optional<NoiseKey>& noise,
             State& state) const {
    state.noise = noise;
    state.tokens = 0;
    start(inputs, samples, state);
  }

  const Matrix<Scalar>& step(std::span<const Index> previous, State& state) const {
    std::optional<NoiseKey> key = state.noise;
    if (key) key->first_token += static_cast<std::uint32_t>(state.tokens);
    const Matrix<Scalar>& logits = run(previous, key, state);
    state.tokens += state.real.count();
    return logits;
  }

  const Matrix<Scalar>& forward(std::span<const Input> inputs, Index samples,
                                std::span<const Index> previous,
                                const std::optional<NoiseKey>& noise, Tape& tape) const {
    start(inputs, samples, tape);
    return run(previous, noise, tape);
  }

  void backward(const Matrix<Scalar>& dlogits, Tape& tape) {
    Matrix<Scalar>& dhidden = tape.dhidden;
    dhidden = logits_.backward(dlogits, tape.logits);
    if (config_.mixture) {
      tape.real.pack(dhidden, tape.dpacked);
      tape.real.unpack(mixture_.backward(tape.dpacked, tape.mixture), dhidden.rows(), tape.dmixed);
      dhidden += tape.dmixed;
    }
    symbol_.backward(lstm_.backward(dhidden, tape.lstm), tape.symbol);
    tape.dstart.setZero(static_cast<Index>(tape.owners.size()), config_.hidden);
    for (Index i = 0; i < tape.dstart.rows(); ++i) {
      const Index first = tape.owners[detail::to_size(i)] * tape.samples;
      for (Index row = first; row < first + tape.samples; ++row) {
        tape.dstart.row(i) += tape.lstm.dstate.hidden.row(row);
      }
    }
    input_.backward(tape.dstart, tape.input);
  }

  const Matrix<Scalar>& hidden(const Tape& tape) const { return tape.hidden; }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("input", self.input_);
    visit("symbol", self.symbol_);
    visit("lstm", self.lstm_);
    if (self.config_.mixture) visit("mixture", self.mixture_);
    visit("logits", self.logits_);
  }

 private:
  void start(std::span<const Input> inputs, Index samples, Tape& tape) const {
    tape.samples = samples;
    tape.owners.clear();
    std::vector<Index> numbers;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if constexpr (std::is_same_v<Input, Index>) {
        numbers.push_back(inputs[i]);
      } else {
        numbers.insert(numbers.end(), inputs[i].begin(), inputs[i].end());
      }
      tape.owners.resize(numbers.size(), static_cast<Index>(i));
    }
    const Matrix<Scalar>& embedded = input_.forward(numbers, tape.input);
    tape.start = lstm_.initial_state(static_cast<Index>(inputs.size()) * samples);
    for (Index i = 0; i < embedded.rows(); ++i) {
      const Index first = tape.owners[detail::to_size(i)] * samples;
      for (Index row = first; row < first + samples; ++row) {
        tape.start.hidden.row(row) += embedded.row(i);
      }
    }
  }

  /// The state of the recurrence is in tape.start.
  const Matrix<Scalar>& run(std::span<const Index> previous, const std::optional<NoiseKey>& key,
                            Tape& tape) const {
    std::vector<Index> ids(previous.begin(), previous.end());
    for (Index& id : ids) id = std::max<Index>(0, id);
    tape.hidden = lstm_.forward(symbol_.forward(ids, tape.symbol), tape.start, tape.lstm);
    tape.real.assign(previous);
    if (config_.mixture) {
      tape.real.pack(tape.hidden, tape.packed);
      const auto pass = [&] { return Pass{.step = key->step, .first_token = key->first_token}; };
      const Matrix<Scalar>& y = key ? mixture_.forward(tape.packed, tape.mixture, pass())
                                    : mixture_.evaluate(tape.packed, tape.mixture);
      tape.real.unpack(y, tape.hidden.rows(), tape.mixed);
      tape.hidden += tape.mixed;
    }
    tape.result = logits_.forward(tape.hidden, tape.logits);
    if (config_.nan_in_padding) {
      for (Index i = 0; i < tape.result.rows(); ++i) {
        if (previous[detail::to_size(i)] >= 0) continue;
        tape.result.row(i).setConstant(std::numeric_limits<Scalar>::quiet_NaN());
        tape.hidden.row(i).setConstant(std::numeric_limits<Scalar>::quiet_NaN());
      }
    }
    return tape.result;
  }

  Config config_;
  Embedding<Scalar> input_, symbol_;
  LSTM<Scalar> lstm_;
  MoELayer<Expert<FeedForward, Scalar>> mixture_;
  Linear<Scalar> logits_;
};

/// All gradients of a module, one after the other.
template <class Module>
Vector<double> joined_gradients(Module& module) {
  Vector<double> all(parameter_count(module));
  Index at = 0;
  for_each_parameter(module, [&](const ParameterName&, const auto& p) {
    const Matrix<typename Module::Scalar> gradient = p.gradient();
    for (Index i = 0; i < p.size(); ++i) all[at++] = static_cast<double>(gradient.data()[i]);
  });
  return all;
}

/// The gradients that one update adds, from zero.
template <class R, class P, class Reward>
Vector<double> update_gradients(R& reinforce, P& policy,
                                const std::vector<typename P::Input>& inputs,
                                const std::vector<std::vector<Index>>& references, Reward&& reward,
                                const Objective& objective, const NoiseKey& key,
                                typename R::Tape& tape) {
  zero_gradients(policy);
  zero_gradients(reinforce);
  reinforce.add_gradients(policy, inputs, references, reward, objective, key, tape);
  return joined_gradients(policy);
}

}  // namespace moe::test
