#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <map>
#include <moe/moe.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

/// \file
/// The CMU pronouncing dictionary: words, and how each may be pronounced.

namespace pronounce {

using moe::Index;
using Phonemes = std::vector<Index>;

/// The symbols of a spelling or of a pronunciation and their numbers.
class Alphabet {
 public:
  Alphabet() = default;
  explicit Alphabet(std::vector<std::string> symbols) : symbols_(std::move(symbols)) {}

  Index size() const { return static_cast<Index>(symbols_.size()); }
  const std::string& symbol(Index number) const {
    return symbols_.at(static_cast<std::size_t>(number));
  }

  /// -1 if there is no such symbol.
  Index number(std::string_view symbol) const {
    const auto found = std::find(symbols_.begin(), symbols_.end(), symbol);
    return found == symbols_.end() ? -1 : found - symbols_.begin();
  }

 private:
  std::vector<std::string> symbols_;
};

/// What CMUdict spells with.
inline Alphabet letters() {
  std::vector<std::string> symbols{"'", "-", "."};
  for (char digit = '0'; digit <= '9'; ++digit) symbols.emplace_back(1, digit);
  for (char letter = 'a'; letter <= 'z'; ++letter) symbols.emplace_back(1, letter);
  return Alphabet(symbols);
}

/// The end of a pronunciation, then the 39 phonemes of American English, ARPAbet without stress.
inline constexpr Index end_symbol = 0;
inline Alphabet phonemes() {
  return Alphabet({"<end>", "AA", "AE", "AH", "AO", "AW", "AY", "B",  "CH", "D",
                   "DH",    "EH", "ER", "EY", "F",  "G",  "HH", "IH", "IY", "JH",
                   "K",     "L",  "M",  "N",  "NG", "OW", "OY", "P",  "R",  "S",
                   "SH",    "T",  "TH", "UH", "UW", "V",  "W",  "Y",  "Z",  "ZH"});
}

/// A word of the dictionary. The first pronunciation is the first listed.
struct Entry {
  std::string word;
  std::vector<Index> letters;
  std::vector<Phonemes> pronunciations;
};

/// Numbers of the letters of a word, in any case; throws std::runtime_error for other characters.
inline std::vector<Index> spell(const Alphabet& alphabet, std::string_view word) {
  std::vector<Index> numbers;
  for (const char c : word) {
    const char lower = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    const Index number = alphabet.number(std::string_view(&lower, 1));
    if (number < 0) {
      throw std::runtime_error("cannot spell \"" + std::string(word) +
                               "\": only a to z, 0 to 9, ', - and . are known");
    }
    numbers.push_back(number);
  }
  if (numbers.empty()) throw std::runtime_error("a word needs a letter");
  return numbers;
}

struct Dictionary {
  std::vector<Entry> train;
  std::vector<Entry> validation;
  std::vector<Entry> test;
};

/// FNV-1a, 64 bits: the same on every platform, so the parts are too.
inline std::uint64_t hash(std::string_view text) {
  std::uint64_t value = 0xCBF29CE484222325u;
  for (const char c : text) {
    value = (value ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  }
  return value;
}

/// Reads lines of "word PH PH ...", further pronunciations being "word(2) PH PH ...", and deals the
/// words to the parts by their hash: one in twenty for validation, one in twenty for the test.
/// Throws std::runtime_error naming the line that is not so.
inline Dictionary read_dictionary(const std::string& path) {
  std::ifstream file(path);
  if (!file) {
    throw std::runtime_error("cannot read " + path +
                             " (Debian: apt-get install pocketsphinx-en-us, or --dictionary FILE)");
  }
  const Alphabet spelling = letters();
  const Alphabet sounds = phonemes();
  std::vector<Entry> entries;
  std::map<std::string, std::size_t, std::less<>> known;
  std::string line;
  for (Index number = 1; std::getline(file, line); ++number) {
    const auto complain = [&](const std::string& what) {
      throw std::runtime_error(path + ":" + std::to_string(number) + ": " + what);
    };
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.empty()) continue;
    std::vector<std::string_view> fields;
    for (std::size_t at = 0; at < line.size();) {
      const std::size_t stop = std::min(line.find(' ', at), line.size());
      if (stop > at) fields.push_back(std::string_view(line).substr(at, stop - at));
      at = stop + 1;
    }
    if (fields.size() < 2) complain("a word without phonemes");
    const std::string_view word = fields.front().substr(0, fields.front().find('('));
    Phonemes pronunciation;
    for (std::size_t i = 1; i < fields.size(); ++i) {
      const Index phoneme = sounds.number(fields[i]);
      if (phoneme <= end_symbol) complain("unknown phoneme " + std::string(fields[i]));
      pronunciation.push_back(phoneme);
    }
    const auto [place, is_new] = known.try_emplace(std::string(word), entries.size());
    if (is_new) {
      try {
        entries.push_back({std::string(word), spell(spelling, word), {}});
      } catch (const std::runtime_error& error) {
        complain(error.what());
      }
    }
    std::vector<Phonemes>& all = entries[place->second].pronunciations;
    if (std::find(all.begin(), all.end(), pronunciation) == all.end()) all.push_back(pronunciation);
  }

  Dictionary dictionary;
  for (Entry& entry : entries) {
    const std::uint64_t part = hash(entry.word) % 20;
    (part == 0   ? dictionary.test
     : part == 1 ? dictionary.validation
                 : dictionary.train)
        .push_back(std::move(entry));
  }
  if (dictionary.train.empty() || dictionary.validation.empty() || dictionary.test.empty()) {
    throw std::runtime_error(path + " has too few words for three parts");
  }
  return dictionary;
}

}  // namespace pronounce
