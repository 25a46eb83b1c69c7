#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>
#include <utility>

#include "moe/indexed_vector.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The largest scores of each expert among the tokens of several processes, found by counting.

namespace moe::detail {

template <class Scalar>
using OrderedBits = std::conditional_t<sizeof(Scalar) == 4, std::uint32_t, std::uint64_t>;

/// A score as an unsigned number in the order of ByScore: NaN becomes -infinity, and -0 becomes 0.
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
/// A radix select: a score is a number of a few digits, and the search begins with the most significant
/// one. For each digit the processes count, for each expert, the candidates with each value of the
/// digit, and sum the counts. This gives the value that the digit of the count-th largest score has;
/// larger candidates are taken, and the search goes on among those with that value. An expert is
/// finished when all remaining candidates are taken. Candidates with equal scores are taken in the
/// order of processes, then of tokens.
///
/// When few candidates remain, the processes send each other their lists of them (each different score
/// and how often it occurs), which ends the search. They do so as soon as the lists are sure to fit
/// into a message. If that is not sure, they try it once, after three digits; for an expert of
/// which some process has too many different scores, the search then goes on digit by digit.
///
/// So messages and memory are O(E·bins), whatever the number of processes and tokens: E·bins·8 bytes,
/// with as many bins as fit into 1 MiB, from 256 to 2048. For scores of 32 bits and up to 64 experts the
/// collective calls are a sum of counts and at most three more. Otherwise it takes no more than that
/// if no process has more than a few different scores (up to 64, see most_scores()) of an expert that
/// agree with its count-th largest in three digits; if one does, a call for each digit and two more.
template <class Scalar>
class SharedSelection {
 public:
  /// for_each(visit) calls visit(expert, score) for every candidate of this process, in any order, but
  /// not from two threads at once for one expert; it is called for each digit and a few times more.
  /// Collective: `experts` and `count` are the same in all processes.
  template <class ForEach>
  void find(Index experts, Index count, const SharedBatch& batch, ForEach&& for_each) {
    bounds_.assign(to_size(experts), {0, std::numeric_limits<Bits>::max(), count});
    resize(open_, experts);
    resize(row_, experts);
    std::iota(open_.begin(), open_.end(), Index{0});
    std::iota(row_.begin(), row_.end(), Index{0});
    // After the first sum nothing allocates or can fail in another way.
    reserve(shown_, batch.processes() * most_scores(first_call(experts).numbers, 1, batch));
    const int most = digit_bits(experts);
    int shift = width;
    for (int digit = 1; shift > 0 && !open_.empty(); ++digit) {
      const int bits = std::min(most, shift);
      shift -= bits;
      count_candidates(Index{1} << bits, shift, for_each);
      const std::span<Index> counts(counts_);
      digit == 1 ? batch.sum(counts) : batch.sum_agreed(counts);
      const Index candidates = narrow(Index{1} << bits, shift);
      if (open_.empty() || shift == 0) break;
      const auto open = static_cast<Index>(open_.size());
      const Index scores = most_scores(first_call(experts).numbers, open, batch);
      if (scores > 0 && (candidates <= scores || digit == 3)) show(scores, batch, for_each);
    }
    if (open_.empty()) return;
    count_candidates(1, 0, for_each);
    batch.prefix_agreed(std::span<Index>(counts_));
    for (std::size_t i = 0; i < open_.size(); ++i) bounds_[open_[i]].left -= counts_[i];
  }

  /// The first call of a SharedBatch that find() makes.
  static SharedCall first_call(Index experts) {
    return {SharedCall::sum_of_counts, experts << digit_bits(experts)};
  }

  /// Whether a candidate is among the `count` largest. Call it once for each, in the order of the tokens.
  bool takes(Index expert, Scalar score) {
    const Bits bits = ordered_bits(score);
    Bound& bound = bounds_[expert];
    if (bits > bound.highest) return true;
    return bits >= bound.lowest && bound.left-- > 0;
  }

 private:
  using Bits = OrderedBits<Scalar>;
  static constexpr int width = 8 * sizeof(Bits);

  /// The number of values in a message of Communicator::most_bytes.
  static constexpr Index message = Index{1} << 17;
  /// The number of bins: as many as fit into one message, since more bins need fewer sums.
  static int digit_bits(Index experts) {
    int bits = 11;
    while (bits > 8 && experts << bits > message) --bits;
    return bits;
  }

  /// The largest number of different scores of an expert in the list of a process. The list is
  /// searched for each candidate, so it is short.
  static constexpr Index few_scores = 64;
  /// The largest number of scores for which there is room: in a message, and in the memory of the
  /// first digit's counts.
  static Index most_scores(Index counts, Index experts, const SharedBatch& batch) {
    return std::min(few_scores, std::min(message, counts) / (2 * batch.processes() * experts));
  }
  static constexpr Index all = std::numeric_limits<Index>::max();

  /// Candidates above `highest` are taken, and of those from `lowest` to `highest` the first `left`.
  struct Bound {
    Bits lowest;
    Bits highest;
    Index left;
  };

  /// Calls f(row, bound, bits) for the candidates of the open experts that are within the bounds.
  template <class ForEach, class F>
  void for_each_open(ForEach&& for_each, F&& f) const {
    for_each([&](Index expert, Scalar score) {
      const Index row = row_[expert];
      if (row < 0) return;
      const Bits bits = ordered_bits(score);
      const Bound& bound = bounds_[expert];
      if (bits >= bound.lowest && bits <= bound.highest) f(row, bound, bits);
    });
  }

  /// Sets counts (open experts x bins) to the number of candidates within the bounds with each value of the
  /// digit.
  template <class ForEach>
  void count_candidates(Index bins, int shift, ForEach&& for_each) {
    assign(counts_, static_cast<Index>(open_.size()) * bins, Index{0});
    for_each_open(for_each, [&](Index row, const Bound& bound, Bits bits) {
      const Index bin = bins == 1 ? 0 : static_cast<Index>((bits - bound.lowest) >> shift);
      ++counts_[row * bins + bin];
    });
  }

  /// Narrows the bounds of the open experts to the digit of the last candidate that they take. Returns the
  /// largest number of candidates of an expert within its bounds.
  Index narrow(Index bins, int shift) {
    std::size_t open = 0;
    Index most = 0;
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
      most = std::max(most, counts[bin]);
      row_[expert] = static_cast<Index>(open);
      open_[open++] = expert;
    }
    open_.resize(open);
    return most;
  }

  /// The processes exchange lists of the candidates within the bounds. Finishes the experts of which no
  /// process has more than `scores` different scores.
  template <class ForEach>
  void show(Index scores, const SharedBatch& batch, ForEach&& for_each) {
    // counts: processes x open experts x scores pairs of a score's bits and the number of its candidates.
    // That number is 0 after the last pair, and -1 in the first pair if there were too many scores.
    const Index list = 2 * scores;
    const Index block = static_cast<Index>(open_.size()) * list;
    assign(counts_, batch.processes() * block, Index{0});
    Index* const own = counts_.data() + batch.process() * block;
    for_each_open(for_each, [&](Index row, const Bound&, Bits bits) {
      Index* const pairs = own + row * list;
      if (pairs[1] < 0) return;
      for (Index i = 0; i < list; i += 2) {
        if (pairs[i + 1] == 0) pairs[i] = static_cast<Index>(bits);
        if (pairs[i] != static_cast<Index>(bits)) continue;
        ++pairs[i + 1];
        return;
      }
      pairs[1] = -1;
    });
    batch.gather_agreed(std::span<Index>(counts_));
    std::size_t open = 0;
    for (std::size_t row = 0; row < open_.size(); ++row) {
      const Index expert = open_[row];
      const Index* const lists = counts_.data() + static_cast<Index>(row) * list;
      const bool is_finished = take_shown(lists, block, scores, batch, bounds_[expert]);
      row_[expert] = is_finished ? -1 : static_cast<Index>(open);
      if (!is_finished) open_[open++] = expert;
    }
    open_.resize(open);
  }

  /// Sets the bound of an expert to the score of the last candidate that it takes; its lists are `block` apart.
  /// Returns false, with nothing changed, if a list is not complete.
  bool take_shown(const Index* lists, Index block, Index scores, const SharedBatch& batch,
                  Bound& bound) {
    shown_.clear();
    for (Index process = 0; process < batch.processes(); ++process) {
      const Index* const pairs = lists + process * block;
      if (pairs[1] < 0) return false;
      for (Index i = 0; i < scores && pairs[2 * i + 1] > 0; ++i) {
        shown_.push_back({static_cast<Bits>(pairs[2 * i]), pairs[2 * i + 1], process});
      }
    }
    std::sort(shown_.begin(), shown_.end(),
              [](const Shown& a, const Shown& b) { return a.bits > b.bits; });
    Index taken = 0;
    for (const Shown& shown : shown_) {
      bound.lowest = shown.bits;
      taken += shown.count;
      if (taken >= bound.left) break;
    }
    bound.highest = bound.lowest;
    for (const Shown& shown : shown_) {
      const bool is_equal = shown.bits == bound.lowest;
      if (shown.bits > bound.lowest || (is_equal && shown.process < batch.process())) {
        bound.left -= shown.count;
      }
    }
    return true;
  }

  /// The lists that the processes exchange.
  struct Shown {
    Bits bits;
    Index count;
    Index process;
  };

  IndexedVector<Bound> bounds_;  ///< E
  IndexedVector<Index> open_;    ///< the experts whose search goes on, ascending
  IndexedVector<Index> row_;     ///< E, their places in open_, -1 for the others
  IndexedVector<Index> counts_;
  IndexedVector<Shown> shown_;
};

}  // namespace moe::detail
