#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../common/gzip_file.hpp"

/// \file
/// Texts of many documents: the glosses of WordNet, or the lines of files. gcide.hpp has another.

namespace language_model {

/// `hash` decides which part of the data a document belongs to.
struct Document {
  std::uint64_t hash;
  std::string text;
};

/// FNV-1a.
inline std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0xcbf29ce484222325u;
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  }
  return hash ^ (hash >> 32);
}

using examples::open;
using examples::output_of;
using examples::shell_word;

/// The definitions of WordNet: on a line of data.noun and its sisters, what follows "| ". The hash
/// is that of the synset's part of speech and offset.
inline std::vector<Document> read_wordnet(const std::filesystem::path& folder) {
  std::vector<Document> documents;
  for (const char* part : {"noun", "verb", "adj", "adv"}) {
    std::ifstream file = open(folder / (std::string("data.") + part));
    for (std::string line; std::getline(file, line);) {
      const std::size_t bar = line.find("| ");
      if (line.starts_with("  ") || bar == std::string::npos) continue;  // the licence
      documents.push_back({hash_of(part + line.substr(0, 8)), line.substr(bar + 2)});
    }
  }
  return documents;
}

inline std::vector<Document> read_text(const std::vector<std::string>& paths) {
  std::vector<Document> documents;
  for (const std::string& path : paths) {
    std::ifstream file = open(path);
    for (std::string line; std::getline(file, line);) {
      const std::uint64_t hash = hash_of(line);
      documents.push_back({hash, std::move(line)});
    }
    if (file.bad()) throw std::runtime_error("reading " + path + " failed half-way");
  }
  return documents;
}

}  // namespace language_model
