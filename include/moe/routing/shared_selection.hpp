#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <span>
#include <type_traits>

#include "moe/indexed_vector.hpp"
#include "moe/parallel.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The largest scores of each expert among the tokens of several processes, found by counts and quantiles.

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

/// Sorted candidates of which a process shows some: all if they are no more than `quantiles`, otherwise
/// that many, equally spaced.
struct ShownQuantiles {
  Index candidates = 0;
  Index quantiles = 1;

  Index count() const { return std::min(candidates, quantiles); }
  /// The number of candidates before the i-th that is shown, 0 <= i < count().
  Index place(Index i) const {
    return candidates <= quantiles ? i : (i + 1) * candidates / (quantiles + 1);
  }

  /// The largest number of candidates that can be left to a search after a gather, if `candidates`
  /// were left before it. With g = candidates / (quantiles + 1), rounded down: between two
  /// neighbouring shown candidates, before the first one and after the last, the processes have at
  /// most g others in all. The search goes on between a shown candidate at most g + 1 before the
  /// one that is searched for and one at most g + 1 after it.
  static Index remaining(Index candidates, Index quantiles) {
    return 2 * (candidates / (quantiles + 1)) + 1;
  }
  /// The smallest number of quantiles with which a search ends after this number of gathers, at least 1.
  static Index needed(Index candidates, Index gathers) {
    const auto is_enough = [&](Index number) {
      Index left = candidates;
      for (Index i = 1; i < gathers && left > number; ++i) left = remaining(left, number);
      return left <= number;
    };
    Index quantiles = 1;
    while (!is_enough(quantiles)) ++quantiles;
    return quantiles;
  }
};

/// The `count` largest candidates of each of E experts over all processes of a batch, ties going to
/// the lower token, NaN counting as -infinity. Candidates with equal scores are in the order of
/// processes, then of tokens, so the candidates of an expert are totally ordered, and the search is for
/// the `count`-th.
///
/// First the processes sum, for each expert, how many candidates have each value of the leading bits of
/// their scores. This shows which leading bits the last candidate has that is taken; those with larger
/// ones are taken, and the search goes on among those with the same ones. An expert is finished when all of
/// these are taken.
///
/// Then each process sorts its candidates and sends some of them, equally spaced, to all other
/// processes, with the number of its candidates. From these each process knows, for each candidate
/// that is shown, the smallest and the largest number of candidates before it, and the search goes
/// on between the last one that cannot come after the candidate searched for and the first one that
/// cannot come before it. A process that has few candidates left shows all; when all processes do,
/// the search ends. Scores that differ in their last bits alone, or not at all, take no more
/// gathers than others.
///
/// The collective calls are a sum and at most three gathers, for any scores. The sum is of E·bins
/// numbers, with 2048 bins, or as many as fit into 1 MiB, at least 2. A gather is of as
/// many numbers as the sum, up to 1 MiB, and more only where three gathers would not be enough otherwise: of
/// N tokens of R processes at most about R·E·(4N)^(1/3). Each process also stores its own candidates
/// once more, those with the same leading bits.
template <class Scalar>
class SharedSelection {
 public:
  /// for_each(visit) calls visit(expert, score) for every candidate of this process, in any order, but
  /// not from two threads at once for one expert; it is called at most three times. No expert has
  /// more candidates in all processes than the batch has tokens. Collective: `experts` and `count`
  /// are the same in all processes.
  template <class ForEach>
  void find(Index experts, Index count, const SharedBatch& batch, ForEach&& for_each) {
    const int digit = digit_bits(experts);
    const int shift = width - digit;
    const Index room =
        std::max(first_call(experts).numbers,
                 experts * numbers_of(ShownQuantiles::needed(batch.tokens(), gathers), batch));
    bounds_.assign(to_size(experts), {0, highest, count});
    resize(row_, experts);
    reserve(open_, experts);
    reserve(lists_, experts);
    reserve(heads_, batch.processes());
    reserve(numbers_, room);
    batch.make_room_to_gather(room);
    assign(numbers_, first_call(experts).numbers, Index{0});
    for_each([&](Index expert, Scalar score) {
      ++numbers_[(expert << digit) + static_cast<Index>(ordered_bits(score) >> shift)];
    });
    reserve(own_, std::accumulate(numbers_.begin(), numbers_.end(), Index{0}));
    batch.sum(std::span<Index>(numbers_));
    // From here on nothing allocates or can fail in another way.
    Index candidates = narrow_by_digit(digit, shift);
    if (open_.empty()) return;
    sort_own(for_each);
    for (Index left = gathers; !open_.empty(); --left) {
      const auto open = static_cast<Index>(open_.size());
      const Index numbers = std::min(message, first_call(experts).numbers);
      const Index that_fit = numbers / (open * batch.processes()) - 2;
      const Index quantiles =
          std::max(ShownQuantiles::needed(candidates, left), std::min(candidates, that_fit));
      candidates = narrow_by_quantiles(quantiles, candidates, batch);
    }
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
  static constexpr Bits highest = std::numeric_limits<Bits>::max();  ///< above all scores
  static constexpr Index all = std::numeric_limits<Index>::max();

  /// The largest number of gathers.
  static constexpr Index gathers = 3;
  /// The number of values in a message of Communicator::most_bytes.
  static constexpr Index message = Index{1} << 17;
  /// The number of leading bits: 11, or as many as fit into one message if these are fewer, at
  /// least 1.
  static int digit_bits(Index experts) {
    int bits = 11;
    while (bits > 1 && experts << bits > message) --bits;
    return bits;
  }
  /// The numbers that all processes show of an expert.
  static Index numbers_of(Index quantiles, const SharedBatch& batch) {
    return batch.processes() * (quantiles + 2);
  }

  /// Candidates above `highest` are taken, and of those from `lowest` to `highest` the first `left`.
  struct Bound {
    Bits lowest;
    Bits highest;
    Index left;
  };
  /// This process's candidates within the bounds, in own_, the largest first.
  struct List {
    Index begin;  ///< of all of them
    Index first;  ///< from here on to `last` the search goes on
    Index last;
  };
  /// A candidate that is shown. In the heap: the next of each process.
  struct Head {
    Bits bits;
    Index process;
    Index shown;  ///< its number among those that the process shows

    bool operator==(const Head&) const = default;
    static bool is_later(const Head& a, const Head& b) {
      return a.bits != b.bits ? a.bits < b.bits : a.process > b.process;
    }
  };
  /// What a process shows of an expert.
  struct Shown {
    const Index* numbers;
    Index quantiles;

    Index passed() const { return numbers[0]; }  ///< candidates before the search's
    ShownQuantiles places() const { return {numbers[1], quantiles}; }
    Bits bits(Index i) const { return static_cast<Bits>(numbers[2 + i]); }
  };

  /// Narrows the bounds to the leading bits of the last candidate that an expert takes, and lists the experts
  /// for which that is not enough. Returns the largest number of candidates of an expert within its bounds.
  Index narrow_by_digit(int digit, int shift) {
    const Index bins = Index{1} << digit;
    Index most = 0;
    open_.clear();
    for (Index expert = 0; expert < static_cast<Index>(bounds_.size()); ++expert) {
      const Index* const counts = numbers_.data() + expert * bins;
      Bound& bound = bounds_[expert];
      row_[expert] = -1;
      if (bound.left == 0) {
        bound.lowest = highest;
        continue;
      }
      if (std::accumulate(counts, counts + bins, Index{0}) <= bound.left) {
        bound.left = all;
        continue;
      }
      Index bin = bins - 1;
      for (; counts[bin] < bound.left; --bin) bound.left -= counts[bin];
      bound.lowest = static_cast<Bits>(bin) << shift;
      bound.highest = bound.lowest + ((Bits{1} << shift) - 1);
      if (counts[bin] == bound.left) {
        bound.left = all;
        continue;
      }
      most = std::max(most, counts[bin]);
      row_[expert] = static_cast<Index>(open_.size());
      open_.push_back(expert);
    }
    return most;
  }

  /// Calls f(row, bits) for the candidates of the open experts that are within the bounds.
  template <class ForEach, class F>
  void for_each_open(ForEach&& for_each, F&& f) const {
    for_each([&](Index expert, Scalar score) {
      const Index row = row_[expert];
      if (row < 0) return;
      const Bits bits = ordered_bits(score);
      const Bound& bound = bounds_[expert];
      if (bits >= bound.lowest && bits <= bound.highest) f(row, bits);
    });
  }

  /// Sets the lists of the open experts.
  template <class ForEach>
  void sort_own(ForEach&& for_each) {
    lists_.assign(open_.size(), {0, 0, 0});
    for_each_open(for_each, [&](Index row, Bits) { ++lists_[row].last; });
    Index end = 0;
    for (List& list : lists_) {
      list.begin = list.first = end;
      end += list.last;
      list.last = list.begin;
    }
    resize(own_, end);
    for_each_open(for_each, [&](Index row, Bits bits) { own_[lists_[row].last++] = bits; });
    parallel_for(static_cast<Index>(lists_.size()), function_work(end), [&](Index row, Index) {
      std::sort(own_.begin() + lists_[row].begin, own_.begin() + lists_[row].last,
                std::greater<>());
    });
  }

  /// The processes show each other some candidates, or all. Finishes the experts of which they then know the
  /// last one that is taken. Returns the largest number of candidates among which the search of an expert
  /// goes on.
  Index narrow_by_quantiles(Index quantiles, Index candidates, const SharedBatch& batch) {
    // numbers: processes x open experts x (2 + quantiles)
    const Index block = 2 + quantiles;
    const Index stride = static_cast<Index>(open_.size()) * block;
    assign(numbers_, batch.processes() * stride, Index{0});
    Index* own = numbers_.data() + batch.process() * stride;
    for (const List& list : lists_) {
      const ShownQuantiles places{list.last - list.first, quantiles};
      own[0] = list.first - list.begin;
      own[1] = places.candidates;
      for (Index i = 0; i < places.count(); ++i) {
        own[2 + i] = static_cast<Index>(own_[list.first + places.place(i)]);
      }
      own += block;
    }
    batch.gather_agreed(std::span<Index>(numbers_));
    Index most = 0;
    std::size_t open = 0;
    for (std::size_t row = 0; row < open_.size(); ++row) {
      const Index expert = open_[row];
      const auto shown_by = [&](Index process) {
        return Shown{numbers_.data() + process * stride + static_cast<Index>(row) * block,
                     quantiles};
      };
      const Index left = narrow(shown_by, candidates, batch, bounds_[expert], lists_[row]);
      if (left == 0) continue;
      most = std::max(most, left);
      lists_[open] = lists_[row];
      open_[open++] = expert;
    }
    open_.resize(open);
    lists_.resize(open);
    return most;
  }

  /// Narrows the list of an expert to the candidates among which its search goes on, and returns the largest
  /// number they can be in all processes, where they were at most `candidates`. If the last candidate that is
  /// taken is found, it returns 0 and has set the bound.
  template <class ShownBy>
  Index narrow(ShownBy&& shown_by, Index candidates, const SharedBatch& batch, Bound& bound,
               List& list) {
    // Counted among the candidates on which the search goes on: the one that is searched for has
    // `target` others before it, the one at the head of the heap at least `least` and at most
    // `most`.
    Index target = bound.left - 1;
    Index least = 0;
    Index most = 0;
    Index found = 0;
    heads_.clear();
    for (Index process = 0; process < batch.processes(); ++process) {
      const Shown shown = shown_by(process);
      const ShownQuantiles places = shown.places();
      target -= shown.passed();
      found += places.candidates;
      if (places.count() == 0) continue;
      most += places.place(0);
      heads_.push_back({shown.bits(0), process, 0});
    }
    MOE_ASSERT(found <= candidates);
    candidates = found;
    std::make_heap(heads_.begin(), heads_.end(), Head::is_later);
    const Head none{0, -1, 0};
    Head from = none;
    Head to = none;
    Index before_from = 0;
    while (!heads_.empty()) {
      std::pop_heap(heads_.begin(), heads_.end(), Head::is_later);
      Head& head = heads_.back();
      const Shown shown = shown_by(head.process);
      const ShownQuantiles places = shown.places();
      const Index place = places.place(head.shown);
      least += place - (head.shown == 0 ? 0 : places.place(head.shown - 1) + 1);
      if (most <= target) {
        from = head;
        before_from = least;
      }
      if (least >= target) {
        to = head;
        candidates = most + 1;
        break;
      }
      ++least;
      if (++head.shown == places.count()) {
        most += places.candidates - place;
        heads_.pop_back();
      } else {
        most += places.place(head.shown) - place;
        head.bits = shown.bits(head.shown);
        std::push_heap(heads_.begin(), heads_.end(), Head::is_later);
      }
    }
    const ShownQuantiles own = shown_by(batch.process()).places();
    const List before = list;
    if (from != none) list.first = end_before(from, before, own, batch.process());
    if (to != none) {
      list.last = end_before(to, before, own, batch.process());
      if (to.process == batch.process()) ++list.last;
    }
    if (from != to) return candidates - before_from;
    bound.lowest = bound.highest = to.bits;
    // Larger ones are taken by the bound alone.
    bound.left = list.last - first_at_most(to.bits, list.begin, list.last);
    return 0;
  }

  /// The end of this process's candidates that come before one that is shown.
  Index end_before(const Head& head, const List& list, const ShownQuantiles& own,
                   Index process) const {
    if (head.process == process) return list.first + own.place(head.shown);
    if (process > head.process) return first_at_most(head.bits, list.first, list.last);
    return std::upper_bound(own_.begin() + list.first, own_.begin() + list.last, head.bits,
                            std::greater<>()) -
           own_.begin();
  }
  /// The place of the first candidate from `first` to `last` that is not larger.
  Index first_at_most(Bits bits, Index first, Index last) const {
    return std::lower_bound(own_.begin() + first, own_.begin() + last, bits, std::greater<>()) -
           own_.begin();
  }

  IndexedVector<Bound> bounds_;   ///< E
  IndexedVector<Index> row_;      ///< E, the places in open_ after the sum, -1 for the others
  IndexedVector<Index> open_;     ///< the experts whose search goes on, ascending
  IndexedVector<List> lists_;     ///< of these
  IndexedVector<Bits> own_;       ///< this process's candidates with the leading bits
  IndexedVector<Head> heads_;     ///< at most one of each process
  IndexedVector<Index> numbers_;  ///< that are summed or gathered
};

}  // namespace moe::detail
