#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include "moe/kernels/softmax.hpp"
#include "moe/nn/packed_rows.hpp"
#include "moe/parallel.hpp"
#include "moe/reinforce/plan.hpp"
#include "moe/reinforce/rollout.hpp"

/// \file
/// The gradient of the objective with respect to the logits.

namespace moe::detail {

/// The weights and counts of the objective, the same for all rows.
struct LogitsObjective {
  double temperature = 1;
  double entropy_bonus = 0;
  double sampled_weight = 0;    ///< of a sampled sequence's terms
  double reference_weight = 0;  ///< of a reference's terms
  double sequences = 1;         ///< N of the mean over sampled sequences
  double references = 1;        ///< the same for the mean over references
};

/// The gradient at a sampled step: that of REINFORCE minus that of the entropy,
/// ∂H/∂z = -(1/τ)·p ⊙ (log p + H). On entry dx has the exponentials of the softmax.
template <class Scalar>
void sampled_row_gradient(const LogitsObjective& objective, const SoftmaxRow<Scalar>& softmax,
                          Index symbols, const Scalar* x, Index symbol, double advantage,
                          double& entropy, Scalar* dx) {
  const double count = objective.sequences * objective.temperature;
  const double normaliser = static_cast<double>(softmax.shift) + std::log(softmax.sum);
  const auto for_each_probability = [&](auto&& f) {
    for (Index v = 0; v < symbols; ++v) {
      const double p = static_cast<double>(dx[v]) / softmax.sum;
      const double log_p = static_cast<double>(x[v]) / objective.temperature - normaliser;
      if (std::isfinite(log_p)) f(v, p, log_p);  // a forbidden symbol has p = 0 and no logarithm
    }
  };
  for_each_probability([&](Index, double p, double log_p) { entropy -= p * log_p; });
  const double weighted = objective.sampled_weight * advantage;
  if (objective.entropy_bonus == 0) {
    softmax_row_backward(symbols, softmax, symbol, weighted, count, dx);
    return;
  }
  const double bonus = objective.entropy_bonus * objective.sampled_weight;
  for_each_probability([&](Index v, double p, double log_p) {
    const double d = weighted * p + bonus * p * (log_p + entropy);
    dx[v] = static_cast<Scalar>(d / count);
  });
  dx[symbol] -= static_cast<Scalar>(weighted / count);
}

/// Computes dlogits, (steps·R) x V, and for the statistics log_probability and entropy, R x max_length.
/// `advantages` has an entry for each of `sampled`. Rows of padding are not read, and dlogits is 0
/// there. Throws std::invalid_argument if a row has a logit that is NaN or +infinity or only logits
/// of -infinity, or if a symbol has probability 0.
template <class Scalar>
void make_dlogits(const LogitsObjective& objective, const Plan& plan, const Rollout& rollout,
                  const PackedRows& sampled, std::span<const double> advantages,
                  const Matrix<Scalar>& logits, std::vector<double>& log_probability,
                  std::vector<double>& entropy, Matrix<Scalar>& dlogits) {
  const Index rows = rollout.rows();
  const Index symbols = logits.cols();
  resize_to_zero(dlogits, logits.rows(), symbols);
  assign(log_probability, static_cast<Index>(rollout.symbols.size()), 0.0);
  assign(entropy, static_cast<Index>(rollout.symbols.size()), 0.0);
  const Index block = std::max<Index>(1, (Index{1} << 13) / symbols);
  parallel_for_blocks(
      logits.rows(), block, function_work(logits.size()), [&](Index first, Index count) {
        // Advantages are listed in the order of the rows, sampled ones only.
        auto advantage = static_cast<std::size_t>(
            std::lower_bound(sampled.rows.begin(), sampled.rows.end(), first) -
            sampled.rows.begin());
        for (Index i = first; i < first + count; ++i) {
          const Index row = i % rows;
          const Index t = i / rows;
          if (t >= rollout.length[to_size(row)]) continue;
          const std::size_t at = rollout.at(row, t);
          const bool forced = t < rollout.forced[to_size(row)];
          const double temperature = forced ? 1 : objective.temperature;
          const Scalar* x = row_data(logits, i);
          Scalar* dx = row_data(dlogits, i);
          const auto softmax = softmax_row_at(temperature, symbols, x, dx);
          require(std::isfinite(softmax.sum) && std::isfinite(softmax.shift),
                  "Reinforce: the logits of row ", row, " at step ", t, " are not finite");
          const Index symbol = rollout.symbols[at];
          log_probability[at] = log_probability_at(temperature, softmax, x[symbol]);
          require(std::isfinite(log_probability[at]), "Reinforce: symbol ", symbol, " of row ", row,
                  " at step ", t, " has probability 0");
          if (forced) {
            const bool whole = plan.is_reference(row);
            softmax_row_backward(symbols, softmax, symbol,
                                 whole ? objective.reference_weight : objective.sampled_weight,
                                 whole ? objective.references : objective.sequences, dx);
          } else {
            sampled_row_gradient(objective, softmax, symbols, x, symbol, advantages[advantage],
                                 entropy[at], dx);
            ++advantage;
          }
        }
      });
}

}  // namespace moe::detail
