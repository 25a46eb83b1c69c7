#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "moe/kernels/simd.hpp"

/// \file
/// The indices of the K largest scores.

namespace moe {
namespace detail {

/// An order of indices: larger scores first, of equal ones the lower index; NaN counts as
/// -infinity.
template <class Scalar>
class ByScore {
 public:
  explicit ByScore(const Scalar* scores) : scores_(scores) {}
  bool operator()(Index a, Index b) const {
    const Scalar sa = key(a);
    const Scalar sb = key(b);
    return sa > sb || (sa == sb && a < b);
  }
  // A NaN compares false with everything, so the result would depend on the sorting algorithm.
  Scalar key(Index i) const {
    return std::isnan(scores_[i]) ? -std::numeric_limits<Scalar>::infinity() : scores_[i];
  }

 private:
  const Scalar* scores_;
};

/// The largest K for which insertion is used, and the number of lanes into which scores are divided.
inline constexpr Index select_few = 8;
inline constexpr Index select_lanes = 16;
static_assert(select_few <= select_lanes);

/// The largest of scores lane, lane + select_lanes, ... for each lane.
template <class Scalar>
void lane_maxima(const Scalar* scores, Index size, Scalar* maxima) {
  using namespace Eigen::internal;
  constexpr Index packet = packet_size<Scalar>;
  static_assert(select_lanes % packet == 0);
  const ByScore<Scalar> before(scores);
  const Packet<Scalar> lowest = broadcast(-std::numeric_limits<Scalar>::infinity());
  const Index whole = size / select_lanes * select_lanes;
  for (Index part = 0; part < select_lanes; part += packet) {
    Packet<Scalar> maximum = lowest;
    for (Index i = part; i < whole; i += select_lanes) {
      const Packet<Scalar> score = load(scores + i);
      // A NaN is not equal to itself; what a maximum makes of one depends on the processor.
      maximum = pmax(maximum, pselect(pcmp_eq(score, score), score, lowest));
    }
    store(maxima + part, maximum);
  }
  for (Index i = whole; i < size; ++i) {
    maxima[i - whole] = std::max(maxima[i - whole], before.key(i));
  }
}

/// The `count`-th largest of some values.
template <class Scalar>
Scalar nth_largest(Index count, const Scalar* values, Index size) {
  Scalar largest[to_size(select_few)];  // the first is the largest of all
  std::fill_n(largest, count, -std::numeric_limits<Scalar>::infinity());
  for (Index i = 0; i < size; ++i) {
    Scalar value = values[i];
    for (Index place = 0; place < count; ++place) {  // without a branch that could be mispredicted
      const Scalar held = largest[place];
      largest[place] = std::max(held, value);
      value = std::min(held, value);
    }
  }
  return largest[count - 1];
}

/// select_largest() for a count of at most select_few, in O(size + count·size / select_lanes) for many
/// scores. `bound` is the count-th largest of the lanes' maxima, so at least `count` scores reach it,
/// and all that do are in lanes whose maximum does. Only these few lanes are read again.
template <class Scalar>
void select_few_largest(const Scalar* scores, Index size, Index count, Index* best) {
  const ByScore<Scalar> before(scores);
  Index found = 0;
  const auto consider = [&](Index i) {
    if (found == count && !before(i, best[count - 1])) return;
    Index place = found < count ? found++ : count - 1;
    for (; place > 0 && before(i, best[place - 1]); --place) best[place] = best[place - 1];
    best[place] = i;
  };
  if (size < 2 * select_lanes) {
    for (Index i = 0; i < size; ++i) consider(i);
    return;
  }
  Scalar maxima[to_size(select_lanes)];
  lane_maxima(scores, size, maxima);
  const Scalar bound = nth_largest(count, maxima, select_lanes);
  for (Index lane = 0; lane < select_lanes; ++lane) {
    if (maxima[lane] < bound) continue;
    for (Index i = lane; i < size; i += select_lanes) {
      if (!(scores[i] < bound)) consider(i);  // a NaN may be needed too
    }
  }
}

/// Sorts indices in ascending order. A heap compiles faster than std::sort, and is as good for the few
/// of a token.
inline void sort_indices(Index* first, Index count) {
  std::make_heap(first, first + count);
  std::sort_heap(first, first + count);
}

}  // namespace detail

/// Writes the indices of the `count` largest of `size` scores to `best`, the largest first; ties go to
/// the lower index, NaN counts as -infinity. 0 <= count <= size. O(size +
/// count·log(count)·log(size / count)) for scores in random order.
template <class Scalar>
void select_largest(const Scalar* scores, Index size, Index count, Index* best) {
  MOE_ASSERT(count >= 0 && count <= size);
  if (count == 0) return;
  if (count <= detail::select_few) return detail::select_few_largest(scores, size, count, best);
  const detail::ByScore<Scalar> before(scores);
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

}  // namespace moe
