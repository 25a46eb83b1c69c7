#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <moe/moe.hpp>
#include <string>
#include <vector>

#include "options.hpp"
#include "recurrent.hpp"

/// \file
/// What the study trains: the rows of its tables, and the runs that they need.

namespace language_model {

enum class Kind { noisy_top_k, hierarchical, product_keys, balanced, loss_free, recurrent };

inline const char* name_of(Kind kind) {
  switch (kind) {
    case Kind::noisy_top_k:
      return "noisy_top_k";
    case Kind::hierarchical:
      return "hierarchical";
    case Kind::product_keys:
      return "product_keys";
    case Kind::balanced:
      return "balanced";
    case Kind::loss_free:
      return "loss_free";
    case Kind::recurrent:
      return "recurrent";
  }
  return "";
}

/// One training; the options say the rest. What does not concern its kind stays 0.
struct Run {
  Kind kind = Kind::noisy_top_k;
  Index experts = 0;       ///< E, all groups' together
  Index top_k = 0;         ///< K, all groups' together
  Index hidden = 0;        ///< of an expert, or of an LSTM in the middle
  Index groups = 0;        ///< hierarchical, or the row keys of product keys
  Index top_k_groups = 0;  ///< hierarchical
  Index layers = 0;        ///< recurrent: LSTMs in the middle
  Index memory = 0;        ///< recurrent: hidden width of the first and the last LSTM, if another
  double importance_weight = 0;
  double load_weight = 0;
  std::uint64_t seed = 1;
  Index updates = 0;  ///< 0: as many as the options say
};

inline Index updates_of(const Run& run, const Options& o) {
  return run.updates > 0 ? run.updates : o.updates;
}

/// The shortest digits that give the number back.
inline std::string digits(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

/// Everything that decides the figures of a run but the text: two runs of different figures never
/// share it. Without commas or quotes.
inline std::string configuration_of(const Run& run, const Options& o) {
  std::string text = std::string("middle=") + name_of(run.kind);
  const auto add = [&](const char* name, double value) {
    text += std::string(" ") + name + "=" + digits(value);
  };
  const auto count = [&](const char* name, std::uint64_t value) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  };
  const auto size = [&](const char* name, Index value) {
    count(name, static_cast<std::uint64_t>(value));
  };
  size("experts", run.experts);
  size("top_k", run.top_k);
  size("hidden", run.hidden);
  size("groups", run.groups);
  size("top_k_groups", run.top_k_groups);
  size("layers", run.layers);
  size("memory", run.memory);
  add("importance_weight", run.importance_weight);
  add("load_weight", run.load_weight);
  count("seed", run.seed);
  if (o.unit == Unit::character) text += " unit=character";
  size("lstm_hidden", o.memory);
  size("mixtures", o.mixtures);
  size("pre_norm", o.pre_norm ? 1 : 0);
  add("gate_deviation", o.gate_deviation);
  size("gated", o.gated ? 1 : 0);
  add("noise", o.noise);
  add("noise_until", o.noise_until);
  size("factored", o.factored ? 1 : 0);
  size("updates", updates_of(run, o));
  size("vocabulary", o.vocabulary);
  for (const Index cutoff : o.cutoffs) size("cutoff", cutoff);
  size("shrink", o.shrink);
  size("width", o.width);
  size("sequences", o.sequences);
  size("steps", o.steps);
  add("learning_rate", o.learning_rate);
  size("warm_up", o.warm_up);
  add("gate_rate", o.gate_rate);
  add("noise_rate", o.noise_rate);
  add("threshold_rate", o.threshold_rate);
  add("bias_rate", o.bias_rate);
  add("expert_rate", o.expert_rate);
  add("dense_expert_rate", o.dense_expert_rate);
  add("embedding_deviation", o.embedding_deviation);
  add("dropout", o.dropout);
  add("clip", o.clip);
  return text;
}

/// A row of a table: one run for each seed.
struct Row {
  std::string label;
  Run run;
  std::string series;              ///< of the plot
  std::vector<std::string> paper;  ///< the paper's figures, one for each of the table's columns
};

struct Table {
  std::string name;
  std::string label;  ///< head of the first column
  std::vector<std::string> paper;
  std::vector<Row> rows;
};

/// [S17 table 6], with 64 experts where the paper has 256.
inline Table loss_weight_table(const Options& o) {
  Table table{"loss_weights",
              "w_importance, w_load",
              {"paper: perplexity", "CV(imp.)", "CV(load)", "max/mean"},
              {}};
  const auto add = [&](double importance, double load, std::vector<std::string> paper) {
    const std::string label = digits(importance) + ", " + digits(load);
    table.rows.push_back({label,
                          {.experts = 64,
                           .top_k = 4,
                           .hidden = o.hidden,
                           .importance_weight = importance,
                           .load_weight = load},
                          "64 experts",
                          std::move(paper)});
  };
  add(0, 0, {"39.8", "3.04", "3.01", "17.80"});
  add(0.2, 0, {"35.6", "0.06", "0.17", "1.47"});
  add(0, 0.2, {"35.7", "0.22", "0.04", "1.15"});
  add(0.1, 0.1, {"35.6", "0.06", "0.05", "1.14"});
  add(0.01, 0.01, {"35.7", "0.48", "0.11", "1.37"});
  add(1, 1, {"35.7", "0.03", "0.02", "1.07"});
  return table;
}

/// The hidden width of `layers` LSTMs with a projection, 4H(D + H) + HD operations each, that come
/// nearest to `operations`.
inline Index lstm_width(Index operations, Index layers, Index width) {
  const auto of = [&](Index h) { return layers * (4 * h * (width + h) + h * width); };
  Index h = 1;
  while (of(h + 1) <= operations) ++h;
  return operations - of(h) <= of(h + 1) - operations ? h : h + 1;
}

/// Multiply-adds a token of the sparse model that the options describe: of its two LSTMs, of one of its
/// mixtures, and of all together.
inline Index recurrent_operations(const Options& o) {
  return 2 * lstm_operations(o.width, o.memory > 0 ? o.memory : o.width);
}
inline Index mixture_operations(const Options& o) {
  return (has_noise(o) ? 2 : 1) * o.experts * o.width +
         o.top_k * maps_of(o.gated) * o.width * o.hidden;
}
inline Index operations_of_all(const Options& o) {
  return recurrent_operations(o) + o.mixtures * mixture_operations(o);
}

/// [S17 table 7]: ever more experts and the dense models, at the operations of the sparse model that
/// the options describe. A larger gate is paid for by narrower experts. Where there are two mixtures, a row
/// says what is in each.
inline Table expert_table(const Options& o) {
  Table table{"experts", "model", {"paper: perplexity"}, {}};
  const Index width = o.width;
  const Index mixture = mixture_operations(o);
  const Index scores_of_each = has_noise(o) ? 2 : 1;
  const auto hidden = [&](Index scores, Index top_k) {
    const Index unit = top_k * maps_of(o.gated) * width;
    const Index units = (mixture - scores * width + unit / 2) / unit;
    moe::detail::require(units >= 1, "the study needs wider experts than --hidden ", o.hidden,
                         ": a gate of ", scores, " scores takes all operations");
    return units;
  };
  const auto flat = [&](std::string label, Index experts, Index top_k, std::string series,
                        std::string paper) {
    table.rows.push_back({std::move(label),
                          {.experts = experts,
                           .top_k = top_k,
                           .hidden = hidden(scores_of_each * experts, top_k),
                           .importance_weight = o.importance_weight,
                           .load_weight = o.load_weight},
                          std::move(series),
                          {std::move(paper)}});
  };
  const auto hierarchical = [&](Index groups, Index group_experts, std::string paper) {
    const Index experts = groups * group_experts;
    table.rows.push_back({std::to_string(experts) + " experts, hierarchical",
                          {.kind = Kind::hierarchical,
                           .experts = experts,
                           .top_k = 4,
                           .hidden = hidden(scores_of_each * (groups + 2 * group_experts), 4),
                           .groups = groups,
                           .top_k_groups = 2,
                           .importance_weight = o.importance_weight,
                           .load_weight = o.load_weight},
                          "hierarchical",
                          {std::move(paper)}});
  };
  const auto product_keys = [&](Index keys) {
    const Index experts = keys * keys;
    table.rows.push_back({std::to_string(experts) + " experts, product keys",
                          {.kind = Kind::product_keys,
                           .experts = experts,
                           .top_k = 4,
                           .hidden = hidden(scores_of_each * 2 * keys, 4),
                           .groups = keys,
                           .importance_weight = o.importance_weight,
                           .load_weight = o.load_weight},
                          "product keys",
                          {""}});
  };
  table.rows.push_back(
      {"no experts, 4 LSTMs",
       {.kind = Kind::recurrent, .hidden = lstm_width(o.mixtures * mixture, 2, width), .layers = 2},
       "4 LSTMs",
       {"46.0"}});
  table.rows.push_back(
      {"no experts, 2 wider LSTMs",
       {.kind = Kind::recurrent, .memory = lstm_width(operations_of_all(o), 2, width)},
       "2 wider LSTMs",
       {""}});
  flat("1 wide expert", 1, 1, "1 wide expert", "");
  flat("4 experts, all used", 4, 4, "flat", "45.0");
  flat("16 experts", 16, 4, "flat", "");
  flat("64 experts", 64, 4, "flat", "");
  flat("256 experts", 256, 4, "flat", "35.7");
  if (o.unit == Unit::word) {
    hierarchical(16, 16, "");
    hierarchical(32, 32, "34.6");
    return table;
  }
  // On the validation part 4 groups of 64 were 0.8 % ahead of 16 groups of 16, and 0.2 % of 64 groups of 4.
  hierarchical(4, 64, "");
  hierarchical(16, 64, "34.6");
  hierarchical(64, 64, "34.1");
  product_keys(32);
  product_keys(64);
  return table;
}

/// What more experts bring after a ninth, a third and all of the updates: those of expert_table().
inline Table scaling_table(const Options& o) {
  Table table{"scaling", "model", {}, {}};
  for (const Index share : {9, 3, 1}) {
    const Index updates = std::max<Index>(1, o.updates / share);
    for (const Row& row : expert_table(o).rows) {
      const bool is_flat = row.run.kind == Kind::noisy_top_k && row.run.top_k > 1;
      const bool is_next = row.run.kind == Kind::hierarchical && row.run.experts == 1024;
      if (!is_flat && !is_next) continue;
      Row scaled = row;
      scaled.label += ", " + std::to_string(updates) + " updates";
      scaled.run.updates = share == 1 ? 0 : updates;
      scaled.series = std::to_string(updates) + " updates";
      scaled.paper.clear();
      table.rows.push_back(std::move(scaled));
    }
  }
  return table;
}

/// Models without experts, of LSTMs of one width, at the operations of the sparse model.
inline Table recurrent_table(const Options& o) {
  Table table{"recurrent", "model", {}, {}};
  for (const Index layers : {2, 3, 4}) {
    const Index hidden = lstm_width(operations_of_all(o), layers, o.width);
    table.rows.push_back(
        {std::to_string(layers) + " LSTMs of " + std::to_string(hidden),
         {.kind = Kind::recurrent, .hidden = hidden, .layers = layers - 2, .memory = hidden},
         "no experts",
         {}});
  }
  return table;
}

/// Other ways to balance the load of 64 experts.
inline Table balance_table(const Options& o) {
  Table table{"balance", "gate", {}, {}};
  const auto add = [&](std::string label, Kind kind, double importance, double load) {
    table.rows.push_back({std::move(label),
                          {.kind = kind,
                           .experts = 64,
                           .top_k = 4,
                           .hidden = o.hidden,
                           .importance_weight = importance,
                           .load_weight = load},
                          "64 experts",
                          {}});
  };
  add(has_noise(o) ? "noisy top-k, balance losses" : "top-k, importance loss", Kind::noisy_top_k,
      o.importance_weight, o.load_weight);
  add("strictly balanced", Kind::balanced, 0, 0);
  add("sigmoid top-k, loss-free balance", Kind::loss_free, 0, 0);
  return table;
}

/// Those that the options name, without the models that have too many experts for them.
inline std::vector<Table> tables_of(const Options& o) {
  std::vector<Table> tables;
  for (Table& table : std::vector{loss_weight_table(o), expert_table(o), balance_table(o),
                                  recurrent_table(o), scaling_table(o)}) {
    if (std::find(o.tables.begin(), o.tables.end(), table.name) != o.tables.end()) {
      moe::detail::require(
          table.name != "loss_weights" || has_noise(o),
          "--study-tables loss_weights needs --noise above 0: without noise the load "
          "loss has no gradient");
      std::erase_if(table.rows, [&](const Row& row) { return row.run.experts > o.most_experts; });
      if (!table.rows.empty()) tables.push_back(std::move(table));
    }
  }
  moe::detail::require(!tables.empty(), "--study-most-experts ", o.most_experts,
                       " leaves none of the models of --study-tables");
  return tables;
}

/// Every run of the tables once: all of the first seed, then all of the second, so that a study
/// that was stopped has whole rows; within a seed those that take longest first, so that at the end
/// no thread waits long for another.
inline std::vector<Run> runs_of(const std::vector<Table>& tables, const Options& o) {
  std::vector<Run> runs;
  std::vector<std::string> known;
  for (std::uint64_t seed = 1; seed <= static_cast<std::uint64_t>(o.seeds); ++seed) {
    const auto first = static_cast<std::ptrdiff_t>(runs.size());
    for (const Table& table : tables) {
      for (const Row& row : table.rows) {
        Run run = row.run;
        run.seed = seed;
        const std::string configuration = configuration_of(run, o);
        if (std::find(known.begin(), known.end(), configuration) != known.end()) continue;
        known.push_back(configuration);
        runs.push_back(run);
      }
    }
    std::stable_sort(runs.begin() + first, runs.end(),
                     [](const Run& a, const Run& b) { return a.experts > b.experts; });
  }
  return runs;
}

}  // namespace language_model
