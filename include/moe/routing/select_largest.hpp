#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "moe/matrix.hpp"

/// \file
/// The choice that every top-k gate makes.

namespace moe::detail {

/// The scores of one token, ordered: larger first, ties to the lower expert, NaN last.
template <class Scalar>
class ByScore {
 public:
  explicit ByScore(const Scalar* scores) : scores_(scores) {}
  bool operator()(Index a, Index b) const {
    const Scalar sa = key(a);
    const Scalar sb = key(b);
    return sa > sb || (sa == sb && a < b);
  }
  // A NaN compares false with everything, which would leave the order to the sorting algorithm.
  Scalar key(Index i) const {
    return std::isnan(scores_[i]) ? -std::numeric_limits<Scalar>::infinity() : scores_[i];
  }

 private:
  const Scalar* scores_;
};

/// Puts the indices of the `count` largest of `size` scores into `best`, the largest first; ties go
/// to the lower index, NaN counts as -infinity. O(size + count·log(count)·log(size / count)) for
/// scores in random order.
template <class Scalar>
void select_largest(const Scalar* scores, Index size, Index count, Index* best) {
  if (count == 0) return;
  const ByScore<Scalar> before(scores);
  for (Index i = 0; i < count; ++i) best[i] = i;
  std::make_heap(best, best + count, before);  // the worst of the best at the front
  Scalar worst = before.key(best[0]);
  for (Index i = count; i < size; ++i) {
    // No later index wins a tie, and a NaN wins nothing, so most scores take this comparison alone.
    if (!(scores[i] > worst)) continue;
    std::pop_heap(best, best + count, before);
    best[count - 1] = i;
    std::push_heap(best, best + count, before);
    worst = before.key(best[0]);
  }
  std::sort_heap(best, best + count, before);
}

}  // namespace moe::detail
