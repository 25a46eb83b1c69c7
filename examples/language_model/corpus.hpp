#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "documents.hpp"
#include "gcide.hpp"
#include "options.hpp"
#include "vocabulary.hpp"

/// \file
/// The three parts of the data as streams of numbers, and the batches that are cut from them.
///
/// Which part a document belongs to depends on its hash alone, so it is the same on every machine
/// and for every seed.

namespace language_model {

/// Training, validation and test part, each one stream of words or characters with an end after every document.
struct Corpus {
  Vocabulary vocabulary;
  std::vector<Index> train;
  std::vector<Index> validation;
  std::vector<Index> test;
};

/// The share of each word in a stream; one that never comes counts as if it came once.
inline std::vector<double> frequencies_of(const std::vector<Index>& stream, Index vocabulary) {
  std::vector<double> frequencies(static_cast<std::size_t>(vocabulary), 0.0);
  for (const Index word : stream) ++frequencies[static_cast<std::size_t>(word)];
  for (double& frequency : frequencies) {
    frequency = std::max(frequency, 1.0) / static_cast<double>(stream.size());
  }
  return frequencies;
}

/// The documents of each part: four of a hundred are for validation, four for the test.
struct Parts {
  std::vector<const Document*> train, validation, test;
};

/// The documents must outlive the result.
inline Parts split(const std::vector<Document>& documents) {
  Parts parts;
  for (const Document& document : documents) {
    const std::uint64_t bucket = document.hash % 25;
    (bucket == 0 ? parts.validation : bucket == 1 ? parts.test : parts.train).push_back(&document);
  }
  return parts;
}

/// A text by a vocabulary that may be another text's.
inline Corpus make_corpus(Vocabulary vocabulary, const Parts& parts) {
  Corpus corpus{std::move(vocabulary), {}, {}, {}};
  const auto append = [&](const std::vector<const Document*>& documents,
                          std::vector<Index>& stream) {
    for (const Document* document : documents) {
      const std::size_t before = stream.size();
      for_each_unit(corpus.vocabulary.unit(), document->text,
                    [&](const std::string& text) { stream.push_back(corpus.vocabulary.id(text)); });
      if (stream.size() > before) stream.push_back(Vocabulary::end);
    }
  };
  append(parts.train, corpus.train);
  append(parts.validation, corpus.validation);
  append(parts.test, corpus.test);
  return corpus;
}

/// A text by the vocabulary of its own training part.
inline Corpus make_corpus(Unit unit, const std::vector<Document>& documents,
                          Index vocabulary_size) {
  const Parts parts = split(documents);
  return make_corpus(Vocabulary(unit, parts.train, vocabulary_size), parts);
}

inline Corpus read_corpus(const Options& o) {
  return make_corpus(o.unit,
                     !o.data.empty()        ? read_text(o.data)
                     : o.unit == Unit::word ? read_wordnet(o.wordnet)
                                            : read_gcide(o.gcide),
                     o.vocabulary);
}

/// A name for the text, " text=" and 16 digits, for the configuration of what is trained on it.
inline std::string name_of(const Corpus& corpus) {
  std::string all;
  for (const auto* part : {&corpus.train, &corpus.validation, &corpus.test}) {
    for (const Index word : *part) all += std::to_string(word) + " ";
    all += "\n";
  }
  std::array<char, 32> name{};
  const std::uintmax_t hash = hash_of(all);
  std::snprintf(name.data(), name.size(), " text=%016jx", hash);
  return name.data();
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
                               std::to_string(stream.size()) +
                               " words or characters, and a batch takes " +
                               std::to_string(sequences) + " x " + std::to_string(steps));
    }
  }

  Index count() const { return length_ / steps_; }
  /// Of all batches together.
  Index tokens() const { return count() * sequences_ * steps_; }

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
