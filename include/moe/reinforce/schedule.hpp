#pragma once

#include <algorithm>
#include <cmath>
#include <string>

#include "moe/config.hpp"
#include "moe/matrix.hpp"

/// \file
/// Schedules from cross-entropy to REINFORCE. From random weights, REINFORCE finds no sequence with a
/// good reward among the many possible ones [R16].
///
/// M. Ranzato, S. Chopra, M. Auli, W. Zaremba, "Sequence Level Training with Recurrent Neural
/// Networks", ICLR 2016 (arXiv 1511.06732), cited as [R16].
///
/// A schedule is a function of the number of the update, counted from 1, and has no other state: to
/// resume training, only that number is needed.

namespace moe {

/// The objective of one update: the sum of
///
///     (1 - reinforce)·(cross-entropy of the references)
///     reinforce·(REINFORCE for sampled sequences, plus the cross-entropy of their prefix)
///
/// each a mean over sequences. The first `prefix` symbols of a sampled sequence are those of the
/// reference.
struct Objective {
  double reinforce = 0;  ///< in [0, 1]
  Index prefix = 0;      ///< at least 0
};

namespace detail {

inline void check_schedule(const char* name, Index warm_up, Index step) {
  require(warm_up >= 0, name, ".warm_up = ", warm_up, ", must be at least 0");
  require(step >= 1, name, ": step = ", step, ", must be at least 1");
}

inline void check_rise(const char* name, Index rise, double highest) {
  require(rise >= 1, name, ".rise = ", rise, ", must be at least 1");
  require(highest >= 0 && highest <= 1, name, ".highest = ", highest, ", must be in [0, 1]");
}

}  // namespace detail

/// Cross-entropy for `warm_up` updates. Then each update is either one of cross-entropy or one of
/// REINFORCE; the share p of the latter rises from 0 to `highest` in `rise` updates. Update i after the
/// warm-up is one of REINFORCE if the integer part of p(1) + ... + p(i) is larger than that of p(1)
/// + ... + p(i - 1). So the number of updates of REINFORCE up to it is that sum, rounded down.
struct Alternation {
  Index warm_up = 0;   ///< updates of cross-entropy alone, at least 0
  Index rise = 1000;   ///< at least 1
  double highest = 1;  ///< in [0, 1]

  /// p(1) + ... + p(step - warm_up).
  double sum(Index step) const {
    const auto i = static_cast<double>(std::max<Index>(0, step - warm_up));
    const auto r = static_cast<double>(rise);
    return highest * (i <= r ? i * (i + 1) / (2 * r) : (r + 1) / 2 + (i - r));
  }

  /// Throws std::invalid_argument if a member is out of range or the step is below 1.
  Objective operator()(Index step) const {
    detail::check_schedule("Alternation", warm_up, step);
    detail::check_rise("Alternation", rise, highest);
    return {std::floor(sum(step)) > std::floor(sum(step - 1)) ? 1.0 : 0.0, 0};
  }
};

/// MIXER [R16 sec. 3.2.2]: cross-entropy for `warm_up` updates; then stages of `stage` updates each. In
/// stage i = 1, 2, ... sampled sequences begin with max_length - i·shrink symbols of the reference,
/// and from stage max_length / shrink, rounded up, on with none.
struct ShrinkingPrefix {
  Index warm_up = 0;     ///< updates of cross-entropy alone, at least 0
  Index max_length = 0;  ///< symbols of the longest sequence, at least 1
  Index shrink = 1;      ///< [R16]'s Δ, at least 1
  Index stage = 1000;    ///< at least 1

  /// Throws std::invalid_argument if a member is out of range or the step is below 1.
  Objective operator()(Index step) const {
    detail::check_schedule("ShrinkingPrefix", warm_up, step);
    detail::require(max_length >= 1, "ShrinkingPrefix.max_length = ", max_length,
                    ", must be at least 1");
    detail::require(shrink >= 1, "ShrinkingPrefix.shrink = ", shrink, ", must be at least 1");
    detail::require(stage >= 1, "ShrinkingPrefix.stage = ", stage, ", must be at least 1");
    if (step <= warm_up) return {};
    const Index stages =
        std::min((step - warm_up - 1) / stage + 1, (max_length + shrink - 1) / shrink);
    return {1, std::max<Index>(0, max_length - stages * shrink)};
  }
};

/// Cross-entropy for `warm_up` updates; then every update has both objectives: the weight of
/// REINFORCE rises from 0 to `highest` in `rise` updates.
struct Blend {
  Index warm_up = 0;   ///< updates of cross-entropy alone, at least 0
  Index rise = 1000;   ///< at least 1
  double highest = 1;  ///< in [0, 1]

  /// Throws std::invalid_argument if a member is out of range or the step is below 1.
  Objective operator()(Index step) const {
    detail::check_schedule("Blend", warm_up, step);
    detail::check_rise("Blend", rise, highest);
    const auto i = static_cast<double>(std::max<Index>(0, step - warm_up));
    return {highest * std::min(1.0, i / static_cast<double>(rise)), 0};
  }
};

/// What a schedule does, in words.
inline std::string to_string(const Alternation& schedule) {
  return detail::join("alternation: ", schedule.warm_up,
                      " updates of cross-entropy, then a share of REINFORCE up to ",
                      schedule.highest, " within ", schedule.rise);
}
/// What a schedule does, in words.
inline std::string to_string(const ShrinkingPrefix& schedule) {
  return detail::join("shrinking prefix: ", schedule.warm_up, " updates of cross-entropy, then ",
                      schedule.max_length, " symbols less ", schedule.shrink, " every ",
                      schedule.stage, " updates");
}
/// What a schedule does, in words.
inline std::string to_string(const Blend& schedule) {
  return detail::join("blend: ", schedule.warm_up,
                      " updates of cross-entropy, then a weight of REINFORCE up to ",
                      schedule.highest, " within ", schedule.rise);
}

}  // namespace moe
