#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "documents.hpp"

/// \file
/// The Collaborative International Dictionary of English (Webster's of 1913, and more), as Debian's
/// package dict-gcide has it: 127,000 entries, 27 million characters when only letters, blanks and
/// .,;:- are left of them.

namespace language_model {

/// Where the parenthesis or bracket that is open at `from` closes; npos if it does not.
inline std::size_t closing(std::string_view text, std::size_t from, char open, char close) {
  int depth = 0;
  for (std::size_t i = from; i < text.size(); ++i) {
    depth += text[i] == open ? 1 : text[i] == close ? -1 : 0;
    if (depth == 0) return i;
  }
  return std::string_view::npos;
}

/// The end of a mark at `from` that is no text, `from` if none is there: a \pronunciation\ or one in
/// parentheses, the source in brackets ([1913 Webster]), and --Author.
inline std::size_t skip_mark(std::string_view text, std::size_t from) {
  const auto has = [](std::string_view part, std::initializer_list<std::string_view> marks) {
    for (const std::string_view mark : marks) {
      if (part.find(mark) != std::string_view::npos) return true;
    }
    return false;
  };
  const std::string_view rest = text.substr(from);
  std::size_t end = std::string_view::npos;
  if (rest[0] == '\\') {
    end = text.find('\\', from + 1);
  } else if (rest[0] == '[') {
    end = text.find(']', from);
    const std::string_view inside = text.substr(from, end - from);
    if (!has(inside, {"Webster", "WordNet", "PJC", "Century"})) return from;
  } else if (rest[0] == '(') {
    end = closing(text, from, '(', ')');
    if (!has(text.substr(from, end - from), {"*", "`", "\"", "^]", "[="})) return from;
  } else if (rest.size() > 2 && rest.starts_with("--") && rest[2] >= 'A' && rest[2] <= 'Z') {
    end = text.find('.', from);
  }
  return end == std::string_view::npos ? from : end + 1;
}

/// Letters in lower case, single blanks and .,;:- of an entry; marks go, and what is left becomes
/// a blank.
inline std::string clean(std::string_view entry) {
  std::string text;
  for (std::size_t i = 0; i < entry.size();) {
    const std::size_t after = skip_mark(entry, i);
    char c = after > i ? ' ' : entry[i];
    i = after > i ? after : i + 1;
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
    const bool stop = c == '.' || c == ',' || c == ';' || c == ':';
    if (!stop && c != '-' && !(c >= 'a' && c <= 'z')) c = ' ';
    const bool blank = !text.empty() && text.back() == ' ';
    if (c == ' ' && (blank || text.empty())) continue;
    if (stop && blank) text.pop_back();
    text += c;
  }
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

/// The entries of the dictionary, cleaned. An entry begins with a line that is not indented. The hash
/// is that of its first word, so that all entries of a word are in one part.
inline std::vector<Document> read_gcide(const std::string& path) {
  std::vector<Document> documents;
  std::string entry;
  const auto finish = [&] {
    std::string text = entry.starts_with("00-database") ? "" : clean(entry);
    entry.clear();
    if (text.empty()) return;
    const std::uint64_t hash = hash_of(text.substr(0, text.find_first_of(" .,;:-")));
    documents.push_back({hash, std::move(text)});
  };
  const std::string file = examples::read_gzip(path);
  for (std::size_t from = 0; from < file.size();) {
    const std::size_t end = std::min(file.find('\n', from), file.size());
    const std::string_view line = std::string_view(file).substr(from, end - from);
    from = end + 1;
    if (line.empty()) continue;
    if (line[0] != ' ') finish();
    entry.append(line) += ' ';
  }
  finish();
  return documents;
}

}  // namespace language_model
