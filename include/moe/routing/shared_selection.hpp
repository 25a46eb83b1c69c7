#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>

#include "moe/indexed_vector.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The largest scores of each expert among the tokens of several processes, found by counting.

namespace moe::detail {

template <class Scalar>
using OrderedBits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;

/// The score as an unsigned number in the order of ByScore: NaN is -infinity, and -0 is 0.
template <class Scalar>
OrderedBits<Scalar> ordered_bits(Scalar score) {
  using Bits = OrderedBits<Scalar>;
  static_assert(sizeof(Bits) == sizeof(Scalar));
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
  if (std::isnan(score)) score = -std::numeric_limits<Scalar>::infinity();
  if (score == Scalar{0}) score = Scalar{0};
  const auto bits = std::bit_cast<Bits>(score);
  return (bits & sign) != 0 ? ~bits : bits | sign;
}

/// The `count` largest candidates of each of E experts over all processes of a batch, ties going to
/// the lower token, NaN counting as -infinity.
///
/// A radix select: every score is a number of a few digits, the most significant first. For each
/// digit the processes count how many of an expert's candidates have which value and sum the counts;
/// the one that the count-th largest has is known then, and only candidates with that go on. An
/// expert is finished when all that are left are needed. Candidates that are equal in all digits go
/// by the processes before this one, and then by token. So what travels and what is kept is O(E·bins),
/// whatever the number of processes and of their tokens.
template <class Scalar>
class SharedSelection {
 public:
  /// for_each(visit) calls visit(expert, score) for every candidate of this process, in any order,
  /// but never two of an expert at once; it is called once a digit. Collective: `experts` and `count`
  /// are the same in all processes.
  template <class ForEach>
  void find(Index experts, Index count, const SharedBatch& batch, ForEach&& for_each) {
    bounds_.assign(to_size(experts), {0, std::numeric_limits<Bits>::max(), count});
    resize(open_, experts);
    resize(row_, experts);
    std::iota(open_.begin(), open_.end(), Index{0});
    std::iota(row_.begin(), row_.end(), Index{0});
    const int most = experts <= few_experts ? 11 : 8;
    for (int shift = width; shift > 0 && !open_.empty();) {
      const int digits = std::min(most, shift);
      shift -= digits;
      count_candidates(Index{1} << digits, shift, for_each);
      // Nothing after the first sum takes memory, or could fail otherwise.
      const std::span<Index> counts(counts_);
      shift + digits == width ? batch.sum(counts) : batch.sum_agreed(counts);
      narrow(Index{1} << digits, shift);
    }
    if (open_.empty()) return;
    count_candidates(1, 0, for_each);
    batch.prefix_agreed(std::span<Index>(counts_));
    for (std::size_t i = 0; i < open_.size(); ++i) bounds_[open_[i]].left -= counts_[i];
  }

  /// Whether a candidate is among them. To be called once for each, in the order of the tokens.
  bool takes(Index expert, Scalar score) {
    const Bits bits = ordered_bits(score);
    Bound& bound = bounds_[expert];
    if (bits > bound.highest) return true;
    return bits >= bound.lowest && bound.left-- > 0;
  }

 private:
  using Bits = OrderedBits<Scalar>;
  static constexpr int width = 8 * sizeof(Bits);

  /// More bins for fewer sums, as long as the counts fit into one message of a Communicator.
  static constexpr Index few_experts = 64;
  static constexpr Index all = std::numeric_limits<Index>::max();

  /// Candidates above `highest` are taken, and of those from `lowest` on the first `left`.
  struct Bound {
    Bits lowest;
    Bits highest;
    Index left;
  };

  /// counts (open experts x bins): how many candidates within the bounds have which digit.
  template <class ForEach>
  void count_candidates(Index bins, int shift, ForEach&& for_each) {
    assign(counts_, static_cast<Index>(open_.size()) * bins, Index{0});
    for_each([&](Index expert, Scalar score) {
      const Index row = row_[expert];
      if (row < 0) return;
      const Bits bits = ordered_bits(score);
      const Bound& bound = bounds_[expert];
      if (bits < bound.lowest || bits > bound.highest) return;
      const Index bin = bins == 1 ? 0 : static_cast<Index>((bits - bound.lowest) >> shift);
      ++counts_[row * bins + bin];
    });
  }

  /// Moves the bounds of the open experts to the digit of the last that they take.
  void narrow(Index bins, int shift) {
    std::size_t open = 0;
    for (std::size_t i = 0; i < open_.size(); ++i) {
      const Index expert = open_[i];
      const Index* const counts = counts_.data() + static_cast<Index>(i) * bins;
      Bound& bound = bounds_[expert];
      row_[expert] = -1;
      if (std::accumulate(counts, counts + bins, Index{0}) <= bound.left) {
        bound.left = all;
        continue;
      }
      Index bin = bins - 1;
      for (; counts[bin] < bound.left; --bin) bound.left -= counts[bin];
      bound.lowest += static_cast<Bits>(bin) << shift;
      bound.highest = bound.lowest + ((Bits{1} << shift) - 1);
      if (counts[bin] == bound.left) {
        bound.left = all;
        continue;
      }
      row_[expert] = static_cast<Index>(open);
      open_[open++] = expert;
    }
    open_.resize(open);
  }

  IndexedVector<Bound> bounds_;  ///< E
  IndexedVector<Index> open_;    ///< the experts whose last one is not known yet, ascending
  IndexedVector<Index> row_;     ///< E, their places in open_, -1 for the others
  IndexedVector<Index> counts_;
};

}  // namespace moe::detail
