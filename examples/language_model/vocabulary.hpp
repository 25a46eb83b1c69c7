#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "documents.hpp"
#include "options.hpp"

/// \file
/// What the model reads and predicts: characters or words, as numbers.

namespace language_model {

/// Calls f(word) for every word of a text: a run of letters, made lower case where it is ASCII.
/// Everything else only separates words. Bytes of UTF-8 beyond ASCII are letters.
template <class F>
void for_each_word(std::string_view text, F&& f) {
  std::string word;
  for (const char c : text) {
    const bool upper = c >= 'A' && c <= 'Z';
    if (upper || (c >= 'a' && c <= 'z') || static_cast<unsigned char>(c) >= 0x80) {
      word += upper ? static_cast<char>(c - 'A' + 'a') : c;
    } else if (!word.empty()) {
      f(word);
      word.clear();
    }
  }
  if (!word.empty()) f(word);
}

/// Calls f(character) for every character of a text in UTF-8.
template <class F>
void for_each_character(std::string_view text, F&& f) {
  for (std::size_t i = 0; i < text.size();) {
    std::size_t end = i + 1;
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) ++end;
    f(std::string(text.substr(i, end - i)));
    i = end;
  }
}

template <class F>
void for_each_unit(Unit unit, std::string_view text, F&& f) {
  if (unit == Unit::word) return for_each_word(text, f);
  for_each_character(text, f);
}

/// The most frequent words or characters of the training part, behind two that stand for others.
class Vocabulary {
 public:
  static constexpr Index end = 0;      ///< of a document
  static constexpr Index unknown = 1;  ///< any that is not in the vocabulary

  Vocabulary(Unit unit, const std::vector<const Document*>& documents, Index size) : unit_(unit) {
    std::unordered_map<std::string, Index> counts;
    for (const Document* document : documents) {
      for_each_unit(unit, document->text, [&](const std::string& text) { ++counts[text]; });
    }
    std::vector<std::pair<Index, std::string>> ranked;
    for (auto& [text, count] : counts) ranked.emplace_back(-count, text);
    std::sort(ranked.begin(), ranked.end());  // ties by the alphabet, so the order is always one
    texts_ = {"<end>", "<unknown>"};
    for (std::size_t i = 0; i < ranked.size() && static_cast<Index>(texts_.size()) < size; ++i) {
      texts_.push_back(ranked[i].second);
    }
    for (std::size_t i = 0; i < texts_.size(); ++i) ids_[texts_[i]] = static_cast<Index>(i);
  }

  Unit unit() const { return unit_; }
  Index size() const { return static_cast<Index>(texts_.size()); }
  Index id(const std::string& text) const {
    const auto found = ids_.find(text);
    return found == ids_.end() ? unknown : found->second;
  }

  /// What to write for one, to be put behind those before it.
  std::string written(Index id, std::string_view for_end) const {
    const std::string text =
        id == end ? std::string(for_end) : texts_[static_cast<std::size_t>(id)];
    return unit_ == Unit::word ? " " + text : text;
  }

 private:
  Unit unit_;
  std::vector<std::string> texts_;
  std::unordered_map<std::string, Index> ids_;
};

}  // namespace language_model
