#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../language_model/corpus.hpp"
#include "../language_model/documents.hpp"
#include "../language_model/gcide.hpp"
#include "options.hpp"

/// \file
/// The King James Bible as Debian's packages bible-kjv and bible-kjv-text have it: 1,189 chapters,
/// 4.0 million characters when only letters, blanks and .,;:- are left of them.

namespace adapt {

using language_model::Document;

/// The chapters of a text with a verse a line, "Ge1:1 In the beginning", cleaned as the dictionary
/// is. The hash is that of the chapter's name, "Ge1".
inline std::vector<Document> chapters_of(std::string_view verses) {
  std::vector<Document> documents;
  std::string_view current;
  std::string chapter;
  const auto finish = [&] {
    std::string text = language_model::clean(chapter);
    chapter.clear();
    if (!text.empty()) documents.push_back({language_model::hash_of(current), std::move(text)});
  };
  for (std::size_t from = 0; from < verses.size();) {
    const std::size_t end = std::min(verses.find('\n', from), verses.size());
    const std::string_view line = verses.substr(from, end - from);
    from = end + 1;
    if (line.empty()) continue;
    const std::size_t blank = std::min(line.find(' '), line.size());
    const std::string_view name = line.substr(0, line.substr(0, blank).find(':'));
    if (name != current) {
      finish();
      current = name;
    }
    chapter.append(line.substr(blank)) += ' ';
  }
  finish();
  return documents;
}

/// Throws std::runtime_error where the program `bible` is missing or fails.
inline std::vector<Document> read_bible() {
  return chapters_of(language_model::output_of(
      "bible -f gen1:1-rev22:21",
      "cannot run `bible` for the new text: Debian's package bible-kjv has it, or name other text "
      "with --new-data"));
}

/// The new text of the options by the vocabulary of the old one.
inline language_model::Corpus read_new(const Options& o,
                                       const language_model::Vocabulary& vocabulary) {
  const std::vector<Document> documents =
      o.new_data.empty() ? read_bible() : language_model::read_text(o.new_data);
  return language_model::make_corpus(vocabulary, language_model::split(documents));
}

}  // namespace adapt
