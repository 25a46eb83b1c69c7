#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
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

/// A token that was routed to an expert, in brackets between what was read before and what follows.
struct Surrounded {
  double weight = 0;  ///< the gate's, of the expert
  std::string text;
};

/// The contexts of an expert.
struct Contexts {
  std::size_t expert = 0;
  double share = 0;                   ///< of all slots, the expert's
  std::vector<Ending> endings;        ///< the most frequent ones, the most frequent first
  std::vector<Surrounded> strongest;  ///< those of the largest weights, the largest first
};

/// The last `count` words or characters of what was read, in UTF-8; fewer if there are not as many.
inline std::string last_units(const std::string& read, Unit unit, std::size_t count) {
  std::size_t from = read.size();
  if (unit == Unit::character) {
    for (; count > 0 && from > 0; --count) {
      --from;
      // Bytes of this form go on with the character that began before them.
      while (from > 0 && (static_cast<unsigned char>(read[from]) & 0xc0) == 0x80) --from;
    }
    return read.substr(from);
  }
  for (; count > 0 && from > 0; --count) from = read.rfind(' ', from - 1);
  return from < read.size() ? read.substr(from + 1) : "";
}

/// Keeps the `most` contexts of the largest weights, of equal ones the first, and each text once. Makes
/// the text only of one that is among them.
template <class MakeText>
void keep_strongest(std::vector<Surrounded>& kept, std::size_t most, double weight,
                    MakeText&& make_text) {
  if (kept.size() == most && !(weight > kept.back().weight)) return;
  Surrounded added{weight, make_text()};
  const auto known = std::find_if(
      kept.begin(), kept.end(), [&](const Surrounded& other) { return other.text == added.text; });
  if (known != kept.end()) {
    if (known->weight >= weight) return;
    kept.erase(known);
  }
  const auto place = std::find_if(kept.begin(), kept.end(),
                                  [&](const Surrounded& other) { return weight > other.weight; });
  kept.insert(place, std::move(added));
  if (kept.size() > most) kept.pop_back();
}

/// The contexts of up to `count` experts of the mixture between the LSTMs that have the fewest, so that one
/// sees what each is for: those whose five most frequent endings are the largest share of their tokens, but of
/// experts that are mostly used after the same only one. Reads `batches` of a text.
template <class Middle>
std::vector<Contexts> typical_contexts(const Model<Middle>& model, const Batches& text,
                                       const Vocabulary& vocabulary, Index sequences, Index batches,
                                       std::size_t count) {
  constexpr std::size_t endings_shown = 5;
  constexpr std::size_t strongest_shown = 3;
  const Unit unit = vocabulary.unit();
  const std::size_t units_of_ending = unit == Unit::word ? 1 : 4;
  const std::size_t units_before = unit == Unit::word ? 4 : 16;
  const auto experts = static_cast<std::size_t>(model.middle().experts());
  std::vector<std::map<std::string, double>> weights(experts);
  std::vector<std::vector<Surrounded>> strongest(experts);
  std::vector<double> slots_of(experts, 0);
  double all_slots = 0;
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
      const std::size_t length = before.size();
      before += vocabulary.written(batch.input[token], "\n");
      const std::string ending = last_units(before, unit, units_of_ending);
      const auto surrounded = [&] {
        const std::string earlier = before.substr(0, length);
        const std::string own = before.substr(length);
        const std::size_t gap = unit == Unit::word ? 1 : 0;  // the blank before a word
        return last_units(earlier, unit, units_before) + own.substr(0, gap) + "[" +
               own.substr(gap) + "]" + vocabulary.written(batch.target[token], "\n");
      };
      const moe::Range slots = routing.slots_of_token(static_cast<Index>(token));
      for (Index slot = slots.first; slot < slots.first + slots.count; ++slot) {
        const auto expert = static_cast<std::size_t>(routing.expert[slot]);
        const auto weight = static_cast<double>(routing.weight[slot]);
        weights[expert][ending] += weight;
        keep_strongest(strongest[expert], strongest_shown, weight, surrounded);
        ++slots_of[expert];
        ++all_slots;
      }
    }
  }

  std::vector<std::pair<double, Contexts>> ranked;
  for (std::size_t expert = 0; expert < weights.size(); ++expert) {
    if (weights[expert].empty()) continue;
    Contexts contexts{expert, slots_of[expert] / all_slots, {}, std::move(strongest[expert])};
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

/// A text in a cell of a table in Markdown: the end of a document is a paragraph sign.
inline std::string in_cell(const std::string& text) {
  std::string shown;
  for (const char c : text.substr(std::min(text.size(), text.find_first_not_of(' ')))) {
    shown += c == '\n' ? "\u00b6" : c == '|' ? "/" : c == '`' ? "'" : std::string(1, c);
  }
  return "`" + shown + "`";
}

/// A table in Markdown with a line for each expert, as table 9 of the paper.
inline void print_contexts(const std::vector<Contexts>& all) {
  std::puts(
      "| expert | of all slots | after, by frequency | tokens of its largest weights |\n"
      "| -----: | -----------: | ------------------- | ----------------------------- |");
  for (const Contexts& contexts : all) {
    std::string endings;
    for (const Ending& ending : contexts.endings) {
      std::string blanks_shown = ending.text;
      std::replace(blanks_shown.begin(), blanks_shown.end(), ' ', '_');
      char share[32];
      std::snprintf(share, sizeof share, " %.0f %%", 100 * ending.share);
      endings += (endings.empty() ? "" : ", ") + in_cell(blanks_shown) + share;
    }
    std::string strongest;
    for (const Surrounded& context : contexts.strongest) {
      strongest += (strongest.empty() ? "" : ", ") + in_cell(context.text);
    }
    std::printf("| %6zu | %10.2f %% | %s | %s |\n", contexts.expert, 100 * contexts.share,
                endings.c_str(), strongest.c_str());
  }
}

}  // namespace language_model
