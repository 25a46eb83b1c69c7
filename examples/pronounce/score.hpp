#pragma once

#include <algorithm>
#include <moe/moe.hpp>
#include <span>
#include <vector>

#include "dictionary.hpp"

/// \file
/// How far a pronunciation is from those that are listed, and what that earns.

namespace pronounce {

/// The Levenshtein distance: insertions, deletions and replacements. O(|a|·|b|).
inline Index edit_distance(std::span<const Index> a, std::span<const Index> b) {
  std::vector<Index> row(b.size() + 1);
  for (std::size_t j = 0; j < row.size(); ++j) row[j] = static_cast<Index>(j);
  for (std::size_t i = 1; i <= a.size(); ++i) {
    Index diagonal = row[0];
    row[0] = static_cast<Index>(i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const Index replaced = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({replaced, row[j] + 1, row[j - 1] + 1});
    }
  }
  return row.back();
}

/// The listed pronunciation with the smallest distance, relative to its length.
struct Closest {
  Index distance = 0;
  Index length = 1;
};
inline Closest closest(std::span<const Index> phonemes, std::span<const Phonemes> listed) {
  Closest best;
  bool any = false;
  for (const Phonemes& pronunciation : listed) {
    const Closest candidate{edit_distance(phonemes, pronunciation),
                            static_cast<Index>(pronunciation.size())};
    if (!any || candidate.distance * best.length < best.distance * candidate.length) {
      best = candidate;
    }
    any = true;
  }
  return best;
}

/// The phonemes of a finished sequence, without its end if it has one.
inline std::span<const Index> without_end(std::span<const Index> sequence) {
  return !sequence.empty() && sequence.back() == end_symbol ? sequence.first(sequence.size() - 1)
                                                            : sequence;
}

/// 1 - distance / length for the closest pronunciation, and `exact_bonus` for a listed one that ends
/// where it should.
inline double reward_of(std::span<const Index> sequence, std::span<const Phonemes> listed,
                        double exact_bonus) {
  const Closest best = closest(without_end(sequence), listed);
  const bool exact = best.distance == 0 && sequence.back() == end_symbol;
  return 1 - static_cast<double>(best.distance) / static_cast<double>(best.length) +
         (exact ? exact_bonus : 0);
}

/// Error rates over words, in percent.
struct ErrorRates {
  Index words = 0;
  Index wrong_closest = 0;  ///< words that match none of the listed pronunciations
  Index wrong_first = 0;    ///< words that do not match the first listed
  Index distance = 0;       ///< to the closest
  Index length = 0;         ///< of the closest

  void add(std::span<const Index> sequence, std::span<const Phonemes> listed) {
    const std::span<const Index> phonemes = without_end(sequence);
    const Closest best = closest(phonemes, listed);
    ++words;
    wrong_closest += best.distance > 0;
    wrong_first += edit_distance(phonemes, listed.front()) > 0;
    distance += best.distance;
    length += best.length;
  }

  static double percent(Index part, Index whole) {
    return 100.0 * static_cast<double>(part) / static_cast<double>(std::max<Index>(1, whole));
  }
  double phoneme_error_rate() const { return percent(distance, length); }
  double word_error_rate() const { return percent(wrong_closest, words); }
  double word_error_rate_first() const { return percent(wrong_first, words); }
};

}  // namespace pronounce
