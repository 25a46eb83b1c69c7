#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>

#include "moe/routing/select_largest.hpp"

/// \file
/// Limits a token's experts to a few groups of experts, so that they are on few machines.
///
/// [D2] DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language
/// Model", 2024 (arXiv 2405.04434), section 2.2.2.
/// [D3] DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (arXiv 2412.19437), section 2.1.2.

namespace moe {

/// The score of a group of experts for a token, by which its groups are chosen.
enum class GroupScore {
  best,     ///< that of its best expert [D2]
  two_best  ///< the sum of its two best ones [D3]; if it has one expert, that one's score
};
constexpr std::array<std::string_view, 2> enumerator_names(GroupScore) {
  return {"best", "two_best"};
}

namespace detail {

/// The score of one group; NaN counts as -infinity.
template <class Scalar>
Scalar group_score(GroupScore how, const Scalar* scores, Index size) {
  Scalar first = -std::numeric_limits<Scalar>::infinity();
  Scalar second = first;
  for (Index i = 0; i < size; ++i) {
    if (scores[i] > first) {
      second = first;
      first = scores[i];
    } else if (scores[i] > second) {
      second = scores[i];
    }
  }
  return how == GroupScore::two_best && size > 1 ? first + second : first;
}

/// Replaces the scores of all groups but the `top_k` best by -infinity; ties go to the lower group.
/// A group consists of consecutive experts, experts / groups of them. (Some published code sets 0
/// instead, which chooses other experts once a bias makes scores negative.) `group` and `best` are
/// scratch for `groups` numbers and `top_k` indices. O(experts + groups·log(groups)).
template <class Scalar>
void limit_to_groups(GroupScore how, Index experts, Index groups, Index top_k, Scalar* scores,
                     Scalar* group, Index* best) {
  const Index size = experts / groups;
  for (Index g = 0; g < groups; ++g) group[g] = group_score(how, scores + g * size, size);
  select_largest(group, groups, top_k, best);
  sort_indices(best, top_k);
  Index next = 0;
  for (Index g = 0; g < groups; ++g) {
    if (next < top_k && best[next] == g) {
      ++next;
    } else {
      std::fill_n(scores + g * size, size, -std::numeric_limits<Scalar>::infinity());
    }
  }
}

}  // namespace detail
}  // namespace moe
