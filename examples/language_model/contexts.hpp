#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "corpus.hpp"
#include "model.hpp"

/// \file
/// What the experts have divided among themselves, as in table 9 of the paper.

namespace language_model {

/// What a model has read when a token is routed to an expert: the last character and three before it, or the
/// last word.
struct Ending {
  std::string text;
  double share = 0;  ///< of the expert's tokens, each counted by its weight
};

/// The most frequent endings of an expert's contexts, the most frequent first.
struct Contexts {
  std::size_t expert = 0;
  std::vector<Ending> endings;
};

/// The contexts of up to `count` experts that have the fewest, so that one sees what each is for: those
/// whose five most frequent endings are the largest share of their tokens, but of experts that are
/// mostly used after the same only one. Reads `batches` of a text.
template <class Middle>
std::vector<Contexts> typical_contexts(const Model<Middle>& model, const Batches& text,
                                       const Vocabulary& vocabulary, Index sequences, Index batches,
                                       std::size_t count) {
  constexpr std::size_t endings_shown = 5;
  const auto ending_of = [&](const std::string& read) {
    if (vocabulary.unit() == Unit::word) return read.substr(read.rfind(' ') + 1);
    return read.substr(read.size() - std::min<std::size_t>(read.size(), 4));
  };
  std::vector<std::map<std::string, double>> weights(
      static_cast<std::size_t>(model.middle().experts()));
  std::vector<std::string> read(static_cast<std::size_t>(sequences));
  auto state = model.initial_state(sequences);
  typename Model<Middle>::Tape tape;
  Batches::Batch batch;
  for (Index i = 0; i < std::min(batches, text.count()); ++i) {
    text.get(i, batch);
    model.evaluate(batch.input, batch.target, state, tape);
    const moe::Routing<float>& routing = tape.middle.layer.routing();
    for (std::size_t token = 0; token < batch.input.size(); ++token) {
      std::string& before = read[token % read.size()];
      before += vocabulary.written(batch.input[token], "\n");
      const std::string ending = ending_of(before);
      const moe::Range slots = routing.slots_of_token(static_cast<Index>(token));
      for (Index slot = slots.first; slot < slots.first + slots.count; ++slot) {
        weights[static_cast<std::size_t>(routing.expert[slot])][ending] +=
            static_cast<double>(routing.weight[slot]);
      }
    }
  }

  std::vector<std::pair<double, Contexts>> ranked;
  for (std::size_t expert = 0; expert < weights.size(); ++expert) {
    if (weights[expert].empty()) continue;
    Contexts contexts{expert, {}};
    double total = 0;
    for (const auto& [ending, weight] : weights[expert]) {
      contexts.endings.push_back({ending, weight});
      total += weight;
    }
    std::stable_sort(contexts.endings.begin(), contexts.endings.end(),
                     [](const Ending& a, const Ending& b) { return a.share > b.share; });
    contexts.endings.resize(std::min(contexts.endings.size(), endings_shown));
    double shown = 0;
    for (Ending& ending : contexts.endings) shown += ending.share /= total;
    ranked.emplace_back(-shown, std::move(contexts));
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<Contexts> result;
  std::set<std::string> shown;
  for (auto& [order, contexts] : ranked) {
    if (result.size() == count) break;
    if (shown.insert(contexts.endings.front().text).second) result.push_back(std::move(contexts));
  }
  return result;
}

/// A line for each expert.
inline void print_contexts(const std::vector<Contexts>& all) {
  for (const Contexts& contexts : all) {
    std::printf("expert %4zu after", contexts.expert);
    for (const Ending& ending : contexts.endings) {
      std::string shown;
      for (const char c : ending.text) shown += c == ' ' ? '_' : c == '\n' ? '|' : c;
      std::printf("  %s %.0f%%", shown.c_str(), 100 * ending.share);
    }
    std::puts("");
  }
}

}  // namespace language_model
