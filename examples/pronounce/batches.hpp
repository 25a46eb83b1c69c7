#pragma once

#include <algorithm>
#include <cstdint>
#include <moe/moe.hpp>
#include <utility>
#include <vector>

#include "dictionary.hpp"
#include "model.hpp"

/// \file
/// The training words in batches.

namespace pronounce {

/// What one update reads.
struct Batch {
  std::vector<Word> words;
  std::vector<Phonemes> references;  ///< one listed pronunciation for each word
};

inline Word word_of(const Entry& entry) { return {entry.letters, entry.pronunciations}; }

/// Every listed pronunciation comes once an epoch. Words of similar length stand together, which
/// leaves little padding; which they are, and in what order the batches come, is drawn anew for each
/// epoch, as a function of the seed and the number of the batch alone.
class Batches {
 public:
  Batches(const std::vector<Entry>& entries, Index words, std::uint64_t seed)
      : entries_(entries), words_(words), seed_(seed) {
    for (std::size_t e = 0; e < entries.size(); ++e) {
      for (std::size_t p = 0; p < entries[e].pronunciations.size(); ++p) pairs_.push_back({e, p});
    }
    moe::detail::require(words >= 1, "Batches: words = ", words, ", must be at least 1");
  }

  /// Batches in an epoch; the last few words of its order are left out.
  Index count() const { return std::max<Index>(1, static_cast<Index>(pairs_.size()) / words_); }

  /// The batch of an update, counted from 1.
  void get(Index update, Batch& batch) {
    const Index epoch = (update - 1) / count();
    if (epoch != epoch_) start_epoch(epoch);
    const auto words = std::min(static_cast<std::size_t>(words_), pairs_.size());
    const Index first = order_[static_cast<std::size_t>((update - 1) % count())] * words_;
    batch.words.clear();
    batch.references.clear();
    for (std::size_t i = 0; i < words; ++i) {
      const Pair& pair = shuffled_[static_cast<std::size_t>(first) + i];
      batch.words.push_back(word_of(entries_[pair.entry]));
      batch.references.push_back(entries_[pair.entry].pronunciations[pair.pronunciation]);
    }
  }

 private:
  struct Pair {
    std::size_t entry;
    std::size_t pronunciation;
  };

  void start_epoch(Index epoch) {
    epoch_ = epoch;
    const std::uint64_t seed = moe::derive_seed(seed_, static_cast<std::uint64_t>(epoch));
    shuffled_ = pairs_;
    moe::shuffle(shuffled_, seed);
    // Sorted by length within some batches' worth of words, so that no batch is of one kind only.
    const std::size_t pool = 32 * static_cast<std::size_t>(words_);
    for (std::size_t first = 0; first < shuffled_.size(); first += pool) {
      const auto from = shuffled_.begin() + static_cast<std::ptrdiff_t>(first);
      const auto to =
          shuffled_.begin() + static_cast<std::ptrdiff_t>(std::min(first + pool, shuffled_.size()));
      std::stable_sort(from, to, [&](const Pair& a, const Pair& b) {
        return entries_[a.entry].letters.size() < entries_[b.entry].letters.size();
      });
    }
    order_.resize(static_cast<std::size_t>(count()));
    for (std::size_t i = 0; i < order_.size(); ++i) order_[i] = static_cast<Index>(i);
    moe::shuffle(order_, moe::derive_seed(seed, 1));
  }

  const std::vector<Entry>& entries_;
  Index words_;
  std::uint64_t seed_;
  std::vector<Pair> pairs_;
  std::vector<Pair> shuffled_;
  std::vector<Index> order_;
  Index epoch_ = -1;
};

}  // namespace pronounce
