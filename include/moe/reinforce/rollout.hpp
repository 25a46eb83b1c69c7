#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "moe/kernels/softmax.hpp"
#include "moe/parallel.hpp"
#include "moe/reinforce/policy.hpp"

/// \file
/// Sequences written by a policy, symbol by symbol.

namespace moe {

/// The sequences of a batch, R = inputs·samples rows. Each has the symbols as they were written. The
/// last is the end symbol, unless the sequence was truncated at the length limit.
struct Rollout {
  Index samples = 0;     ///< rows of an input
  Index max_length = 0;  ///< the length limit
  Index steps = 0;       ///< length of the longest sequence

  std::vector<Index> length;  ///< R, the end symbol included
  std::vector<Index> forced;  ///< R, the number of symbols at the beginning that are forced
  std::vector<std::uint8_t> truncated;  ///< R, 1 or 0
  std::vector<Index> symbols;           ///< R x max_length
  std::vector<double> log_probability;  ///< R x max_length, of each sampled symbol
  std::vector<Index> previous;  ///< steps x R, the symbols the policy read; negative: padding

  Index rows() const { return static_cast<Index>(length.size()); }  ///< R

  /// The index of step t of a row in `symbols` and `log_probability`.
  std::size_t at(Index row, Index t) const { return detail::to_size(row * max_length + t); }

  /// The symbols of a row.
  std::span<const Index> sequence(Index row) const {
    return std::span(symbols).subspan(at(row, 0), detail::to_size(length[detail::to_size(row)]));
  }
};

namespace detail {

/// The softmax of a row of logits at a temperature: exponentials in `terms`.
template <class Scalar>
SoftmaxRow<Scalar> softmax_row_at(double temperature, Index classes, const Scalar* x,
                                  Scalar* terms) {
  if (temperature == 1) return softmax_row(classes, x, terms);
  const auto scale = broadcast(static_cast<Scalar>(1 / temperature));
  map(
      classes, terms, [scale](const Packet<Scalar>& v) { return Eigen::internal::pmul(v, scale); },
      x);
  return softmax_row(classes, terms, terms);
}

/// The logarithm of a symbol's probability, x being its logit.
template <class Scalar>
double log_probability_at(double temperature, const SoftmaxRow<Scalar>& row, Scalar x) {
  return -row.loss(temperature == 1 ? x : x * static_cast<Scalar>(1 / temperature));
}

/// The class at which the running sum of `terms` exceeds `fraction` (in [0, 1)) of the whole sum.
template <class Scalar>
Index draw(Index classes, const Scalar* terms, double fraction) {
  double total = 0;
  Index largest = 0;
  for (Index i = 0; i < classes; ++i) {
    total += static_cast<double>(terms[i]);
    if (terms[i] > terms[largest]) largest = i;
  }
  const double mark = fraction * total;
  double sum = 0;
  for (Index i = 0; i < classes; ++i) {
    sum += static_cast<double>(terms[i]);
    if (sum > mark) return i;
  }
  return largest;  // if the product was rounded up to the whole sum
}

/// Uniform in [0, 1) with 53 random bits.
inline double uniform_double(std::uint32_t high, std::uint32_t low) {
  return (static_cast<double>(high >> 5) * 0x1p26 + static_cast<double>(low >> 6)) * 0x1p-53;
}

/// How symbols are chosen.
struct Sampling {
  bool greedy = false;  ///< the most probable one, ties to the lower number
  double temperature = 1;
  std::uint64_t seed = 0;
  /// The key of the draws: sample s of input i is token first_token + i·samples + s.
  NoiseKey key{.step = 0};
  Index samples = 1;  ///< of an input; a row of the reference may follow
  Index start = 0;
  Index end = 0;
};

/// Empties a rollout of `rows` rows, none of whose symbols is forced.
inline void reset(Rollout& rollout, Index rows, Index samples, Index max_length) {
  rollout.samples = samples;
  rollout.max_length = max_length;
  rollout.steps = 0;
  assign(rollout.length, rows, Index{0});
  assign(rollout.forced, rows, Index{0});
  assign(rollout.truncated, rows, std::uint8_t{0});
  assign(rollout.symbols, rows * max_length, Index{-1});
  assign(rollout.log_probability, rows * max_length, 0.0);
  rollout.previous.clear();
}

/// Whether a row goes on at step t.
inline bool is_live(const Rollout& rollout, Index row, Index t, Index end) {
  return rollout.length[to_size(row)] == t &&
         (t == 0 || rollout.symbols[rollout.at(row, t - 1)] != end);
}

/// Appends the symbols that the rows read at step t to rollout.previous. Returns whether any row goes on.
inline bool read_previous(Rollout& rollout, Index t, const Sampling& sampling) {
  if (t == rollout.max_length) return false;
  bool any = false;
  for (Index row = 0; row < rollout.rows(); ++row) {
    const bool live = is_live(rollout, row, t, sampling.end);
    any = any || live;
    rollout.previous.push_back(!live    ? -1
                               : t == 0 ? sampling.start
                                        : rollout.symbols[rollout.at(row, t - 1)]);
  }
  if (!any) rollout.previous.resize(to_size(t * rollout.rows()));
  return any;
}

/// Updates the length of a row whose symbol of step t was written.
inline void write(Rollout& rollout, Index row, Index t, Index end) {
  rollout.length[to_size(row)] = t + 1;
  rollout.steps = std::max(rollout.steps, t + 1);
  rollout.truncated[to_size(row)] =
      t + 1 == rollout.max_length && rollout.symbols[rollout.at(row, t)] != end;
}

/// Completes a rollout whose symbols are all forced and written.
inline void read_all(Rollout& rollout, const Sampling& sampling) {
  for (Index t = 0; read_previous(rollout, t, sampling); ++t) {
    for (Index row = 0; row < rollout.rows(); ++row) {
      if (is_live(rollout, row, t, sampling.end)) write(rollout, row, t, sampling.end);
    }
  }
}

/// Lets the policy write all rows, whose forced symbols are written. `terms` is scratch.
template <Policy P>
void write_all(const P& policy, std::span<const typename P::Input> inputs,
               const std::optional<NoiseKey>& noise, const Sampling& sampling, Rollout& rollout,
               typename P::State& state, Matrix<typename P::Scalar>& terms) {
  using Scalar = typename P::Scalar;
  const Index rows = rollout.rows();
  const Index symbols = policy.symbols();
  policy.begin(inputs, rollout.samples, noise, state);
  resize(terms, rows, symbols);
  for (Index t = 0; read_previous(rollout, t, sampling); ++t) {
    const Matrix<Scalar>& logits =
        policy.step(std::span<const Index>(rollout.previous).last(to_size(rows)), state);
    require(logits.rows() == rows && logits.cols() == symbols, "Reinforce: the policy's step gave ",
            logits.rows(), " x ", logits.cols(), " logits for ", rows, " rows and ", symbols,
            " symbols");
    const Index block = std::max<Index>(1, (Index{1} << 13) / symbols);
    parallel_for_blocks(rows, block, function_work(rows * symbols), [&](Index first, Index count) {
      for (Index row = first; row < first + count; ++row) {
        if (!is_live(rollout, row, t, sampling.end)) continue;
        const Scalar* x = row_data(logits, row);
        Scalar* e = row_data(terms, row);
        const SoftmaxRow<Scalar> softmax = softmax_row_at(sampling.temperature, symbols, x, e);
        require(std::isfinite(softmax.sum) && std::isfinite(softmax.shift),
                "Reinforce: the logits of row ", row, " at step ", t, " are not finite");
        if (t < rollout.forced[to_size(row)]) continue;
        const Index dice = row / rollout.samples * sampling.samples + row % rollout.samples;
        const auto words = noise_words(sampling.seed, sampling.key, dice, t);
        const Index symbol = sampling.greedy ? std::max_element(x, x + symbols) - x
                                             : draw(symbols, e, uniform_double(words[0], words[1]));
        rollout.symbols[rollout.at(row, t)] = symbol;
        rollout.log_probability[rollout.at(row, t)] =
            log_probability_at(sampling.temperature, softmax, x[symbol]);
      }
    });
    for (Index row = 0; row < rows; ++row) {
      if (rollout.previous[to_size(t * rows + row)] >= 0) write(rollout, row, t, sampling.end);
    }
  }
}

}  // namespace detail
}  // namespace moe
