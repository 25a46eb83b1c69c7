#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "moe/reinforce/config.hpp"
#include "moe/reinforce/rollout.hpp"
#include "moe/reinforce/schedule.hpp"

/// \file
/// The rows of a batch, and which of their symbols are forced to be those of a reference.

namespace moe::detail {

/// The rows of an input: `samples` sampled ones, then one of the reference if it is trained.
struct Plan {
  Plan(const Objective& objective, Index samples_of_input)
      : prefix(objective.prefix),
        samples(objective.reinforce > 0 ? samples_of_input : 0),
        has_reference(objective.reinforce < 1),
        sampled_weight(objective.reinforce),
        reference_weight(1 - objective.reinforce) {}

  Index rows_of_input() const { return samples + (has_reference ? 1 : 0); }
  bool is_reference(Index row) const { return row % rows_of_input() == samples; }

  Index prefix;
  Index samples;
  bool has_reference;
  double sampled_weight;
  double reference_weight;
};

/// Throws std::invalid_argument for an objective out of range, for a number of references that is not
/// that of the inputs, and for a reference that is too long, contains the end symbol, or has a number that
/// is not a symbol.
template <class Baseline>
void check_references(const ReinforceConfig<Baseline>& config, Index symbols, std::size_t inputs,
                      std::span<const std::vector<Index>> references, const Objective& objective) {
  require(objective.reinforce >= 0 && objective.reinforce <= 1,
          "Objective.reinforce = ", objective.reinforce, ", must be in [0, 1]");
  require(objective.prefix >= 0, "Objective.prefix = ", objective.prefix, ", must be at least 0");
  const bool unused = objective.reinforce == 1 && objective.prefix == 0;
  require(references.size() == inputs || (unused && references.empty()),
          "Reinforce: ", references.size(), " references for ", inputs, " inputs");
  for (std::size_t i = 0; i < references.size(); ++i) {
    require(static_cast<Index>(references[i].size()) < config.max_length, "Reinforce: reference ",
            i, " has ", references[i].size(),
            " symbols and an end, must be at most Config.max_length = ", config.max_length);
    for (const Index symbol : references[i]) {
      require(symbol >= 0 && symbol < symbols && symbol != config.end, "Reinforce: reference ", i,
              " has symbol ", symbol, "; there are ", symbols, " symbols, of which ", config.end,
              " is the end");
    }
  }
}

/// Writes to a row the first `count` symbols of a reference followed by the end symbol.
inline void force(std::span<const Index> reference, Index count, Index end, Index row,
                  Rollout& rollout) {
  const auto length = static_cast<Index>(reference.size()) + 1;
  const Index forced = std::min(count, length);
  rollout.forced[to_size(row)] = forced;
  for (Index t = 0; t < forced; ++t) {
    rollout.symbols[rollout.at(row, t)] = t + 1 < length ? reference[to_size(t)] : end;
  }
}

/// Whether a row has a symbol that is not forced.
inline bool has_sampled(const Rollout& rollout, Index row) {
  return rollout.length[to_size(row)] > rollout.forced[to_size(row)];
}

}  // namespace moe::detail
