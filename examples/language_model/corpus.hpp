#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <moe/moe.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "options.hpp"

/// \file
/// Text as numbers: documents, the vocabulary, and the three parts of the data.
///
/// A document is a gloss of WordNet, or a line of a text file. A word is a run of letters, made
/// lower case where it is ASCII; everything else only separates words. Which part a document belongs
/// to depends on a hash of itself alone, so it is the same on every machine and for every seed.

namespace language_model {

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

inline std::ifstream open(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return file;
}

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

/// Calls f(word) for every word of a text, in lower case. Bytes of UTF-8 beyond ASCII are letters.
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

/// The most frequent words of the training part, behind two that stand for others.
class Vocabulary {
 public:
  static constexpr Index end = 0;      ///< of a document
  static constexpr Index unknown = 1;  ///< any word that is not in the vocabulary

  Vocabulary(const std::vector<const Document*>& documents, Index size) {
    std::unordered_map<std::string, Index> counts;
    for (const Document* document : documents) {
      for_each_word(document->text, [&](const std::string& word) { ++counts[word]; });
    }
    std::vector<std::pair<Index, std::string>> ranked;
    for (auto& [word, count] : counts) ranked.emplace_back(-count, word);
    std::sort(ranked.begin(), ranked.end());  // ties by the alphabet, so the order is always one
    words_ = {"<end>", "<unknown>"};
    for (std::size_t i = 0; i < ranked.size() && static_cast<Index>(words_.size()) < size; ++i) {
      words_.push_back(ranked[i].second);
    }
    for (std::size_t i = 0; i < words_.size(); ++i) ids_[words_[i]] = static_cast<Index>(i);
  }

  Index size() const { return static_cast<Index>(words_.size()); }
  const std::string& word(Index id) const { return words_[static_cast<std::size_t>(id)]; }
  Index id(const std::string& word) const {
    const auto found = ids_.find(word);
    return found == ids_.end() ? unknown : found->second;
  }

 private:
  std::vector<std::string> words_;
  std::unordered_map<std::string, Index> ids_;
};

/// Training, validation and test part, each one stream of words with an end after every document.
struct Corpus {
  Vocabulary vocabulary;
  std::vector<Index> train;
  std::vector<Index> validation;
  std::vector<Index> test;
};

/// The share of each word in a stream; a word that never comes counts as if it came once.
inline std::vector<double> frequencies_of(const std::vector<Index>& stream, Index vocabulary) {
  std::vector<double> frequencies(static_cast<std::size_t>(vocabulary), 0.0);
  for (const Index word : stream) ++frequencies[static_cast<std::size_t>(word)];
  for (double& frequency : frequencies) {
    frequency = std::max(frequency, 1.0) / static_cast<double>(stream.size());
  }
  return frequencies;
}

inline Corpus make_corpus(const std::vector<Document>& documents, Index vocabulary_size) {
  // Four documents of a hundred for validation, four for the test.
  std::vector<const Document*> parts[3];
  for (const Document& document : documents) {
    const std::uint64_t bucket = document.hash % 25;
    parts[bucket == 0 ? 1 : bucket == 1 ? 2 : 0].push_back(&document);
  }
  Corpus corpus{Vocabulary(parts[0], vocabulary_size), {}, {}, {}};
  std::vector<Index>* streams[3] = {&corpus.train, &corpus.validation, &corpus.test};
  for (std::size_t part = 0; part < 3; ++part) {
    for (const Document* document : parts[part]) {
      const std::size_t before = streams[part]->size();
      for_each_word(document->text, [&](const std::string& word) {
        streams[part]->push_back(corpus.vocabulary.id(word));
      });
      if (streams[part]->size() > before) streams[part]->push_back(Vocabulary::end);
    }
  }
  return corpus;
}

inline Corpus read_corpus(const Options& o) {
  return make_corpus(o.data.empty() ? read_wordnet(o.wordnet) : read_text(o.data), o.vocabulary);
}

/// Which part of every batch is read here, where several processes share it: they are numbered from 0
/// on, and each has as many sequences as the others.
struct BatchPart {
  Index index = 0;
  Index count = 1;
};

/// A stream cut into `sequences` pieces of equal length that are read side by side, `steps` words at
/// a time, so that a recurrent state can be carried from one batch to the next.
class Batches {
 public:
  struct Batch {
    std::vector<Index> input;   ///< steps x sequences words, time-major; the sequences of the part
    std::vector<Index> target;  ///< the word that follows each
  };

  /// The stream must outlive this. Throws std::runtime_error when it is too short for one batch, and
  /// when the sequences cannot be divided into such parts.
  Batches(const std::vector<Index>& stream, Index sequences, Index steps,
          const BatchPart& part = {})
      : stream_(stream), sequences_(sequences / part.count), steps_(steps) {
    if (sequences % part.count != 0) {
      throw std::runtime_error("a batch of " + std::to_string(sequences) +
                               " sequences cannot be divided among " + std::to_string(part.count) +
                               " processes");
    }
    first_ = part.index * sequences_;
    length_ = (static_cast<Index>(stream.size()) - 1) / sequences;
    if (length_ < steps) {
      throw std::runtime_error("the text is too short: a part of it has " +
                               std::to_string(stream.size()) + " words, and a batch takes " +
                               std::to_string(sequences) + " x " + std::to_string(steps));
    }
  }

  Index count() const { return length_ / steps_; }

  void get(Index index, Batch& batch) const {
    const auto size = static_cast<std::size_t>(sequences_ * steps_);
    batch.input.resize(size);
    batch.target.resize(size);
    for (Index t = 0; t < steps_; ++t) {
      for (Index b = 0; b < sequences_; ++b) {
        const auto from = static_cast<std::size_t>((first_ + b) * length_ + index * steps_ + t);
        const auto to = static_cast<std::size_t>(t * sequences_ + b);
        batch.input[to] = stream_[from];
        batch.target[to] = stream_[from + 1];
      }
    }
  }

 private:
  const std::vector<Index>& stream_;
  Index first_;
  Index sequences_;
  Index steps_;
  Index length_;
};

}  // namespace language_model
