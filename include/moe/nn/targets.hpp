#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "moe/matrix.hpp"

/// \file
/// Which tokens have a target, for all that compares logits with targets.

namespace moe::detail {

/// The target of row t, negative where the row is ignored: its target is negative, or it is padding.
inline Index target_of(std::span<const Index> targets, std::span<const std::uint8_t> valid,
                       Index t) {
  const bool ignored = !valid.empty() && valid[to_size(t)] == 0;
  return ignored ? -1 : targets[to_size(t)];
}

/// Returns the number of rows that are not ignored. Throws std::invalid_argument, whose message
/// begins with `name`, unless there is one target for each row of logits, `valid` is empty or has
/// one entry for each row, and the targets of valid rows are below the number of classes.
inline Index count_targets(std::string_view name, Index rows, Index classes,
                           std::span<const Index> targets, std::span<const std::uint8_t> valid) {
  const auto count = static_cast<Index>(targets.size());
  require(count == rows, name, ": ", count, " targets for ", rows, " rows of logits");
  require(valid.empty() || valid.size() == targets.size(), name, ": valid has ", valid.size(),
          " entries for ", rows, " rows of logits");
  Index counted = 0;
  for (Index t = 0; t < count; ++t) {
    const Index target = target_of(targets, valid, t);
    require(target < classes, name, ": target ", target, " is outside the ", classes, " classes");
    counted += target >= 0;
  }
  return counted;
}

}  // namespace moe::detail
