#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/adapt/lora_config.hpp"
#include "moe/io/pretrained/model_config.hpp"
#include "moe/io/safetensors/messages.hpp"

/// \file
/// Reads and writes adapter_config.json, PEFT's file of the settings of adapters.

namespace moe::detail {

inline constexpr std::string_view plain_names = "letters, digits, '_', '-' and '.' only";
/// Whether a name means itself in PEFT's patterns, which are regular expressions.
inline bool is_plain_name(std::string_view name) {
  constexpr std::string_view plain_characters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.";
  return !name.empty() && name.find_first_not_of(plain_characters) == std::string_view::npos;
}

/// The settings of adapters in a file. Settings that are missing or null have PEFT's defaults;
/// peft_type, and the rank and the alpha of each map, must not be missing.
class AdapterConfig {
 public:
  /// Throws std::runtime_error, which names the key, for a setting that the library does not
  /// support.
  explicit AdapterConfig(const std::string& path) : settings_(path) {
    if (settings_.text("peft_type") != "LORA") settings_.refuse("peft_type", "\"LORA\"");
    if (settings_.text("bias", "none") != "none") settings_.refuse("bias", "\"none\"");
    for (const char* key : {"use_dora", "use_qalora", "fan_in_fan_out", "lora_bias"}) {
      if (settings_.flag(key, false)) settings_.refuse(key, "false");
    }
    for (const char* key : {"modules_to_save", "layer_replication", "target_parameters",
                            "alora_invocation_tokens", "trainable_token_indices", "use_bdlora",
                            "arrow_config", "kasa_config", "monteclora_config"}) {
      if (!settings_.is_empty(key)) settings_.refuse(key, "null or empty");
    }
    // With other initial values PEFT subtracts the initial adapter from the frozen weight.
    if (settings_.is_text("init_lora_weights")) {
      const std::string start = settings_.text("init_lora_weights");
      if (start != "gaussian" && start != "orthogonal" && start != "eva") {
        settings_.refuse("init_lora_weights",
                         "true, false, \"gaussian\", \"orthogonal\" or \"eva\"");
      }
    }
    is_stabilized_ = settings_.flag("use_rslora", false);
    rank_patterns_ = patterns("rank_pattern");
    alpha_patterns_ = patterns("alpha_pattern");
  }

  /// The settings of a map.
  LoraGateConfig of(const std::string& map) const {
    const auto [ranks, rank_key] = place(map, "r", rank_patterns_);
    const auto [alphas, alpha_key] = place(map, "lora_alpha", alpha_patterns_);
    const Index rank = ranks->count(rank_key);
    if (rank == 0) ranks->refuse(rank_key, "at least 1");
    return {.rank = rank, .alpha = alphas->number(alpha_key), .rank_stabilized = is_stabilized_};
  }

  const std::string& path() const { return settings_.path(); }

 private:
  std::optional<io::ModelConfig> patterns(const std::string& key) const {
    if (settings_.is_empty(key)) return std::nullopt;
    io::ModelConfig patterns = settings_.part(key);
    for (const std::string& pattern : patterns.keys()) {
      const std::string_view name = std::string_view(pattern).substr(pattern.starts_with('^'));
      if (is_plain_name(name)) continue;
      fail_file(path(), '"', key, "\" has \"", plain(pattern), "\", must have ", plain_names);
    }
    return patterns;
  }

  /// The object and the key that have the setting of a map: its pattern, or `key` if it has none. A
  /// pattern matches the module with this name and all whose names end in a dot and this name; with
  /// ^ it matches the first only.
  std::pair<const io::ModelConfig*, std::string> place(
      const std::string& map, const char* key,
      const std::optional<io::ModelConfig>& patterns) const {
    if (!patterns.has_value()) return {&settings_, key};
    std::string found;
    const auto look_for = [&](const std::string& pattern) {
      if (!patterns->has(pattern)) return;
      // Of several patterns PEFT uses the first in the file, but nlohmann::json does not keep their
      // order.
      if (!found.empty()) {
        fail_file(path(), "\"", found, "\" and \"", pattern, "\" are both patterns of ",
                  plain(map));
      }
      found = pattern;
    };
    look_for('^' + map);
    look_for(map);
    for (std::size_t dot = map.find('.'); dot != std::string::npos; dot = map.find('.', dot + 1)) {
      look_for(map.substr(dot + 1));
    }
    if (found.empty()) return {&settings_, key};
    return {&*patterns, found};
  }

  io::ModelConfig settings_;
  bool is_stabilized_ = false;
  std::optional<io::ModelConfig> rank_patterns_{};
  std::optional<io::ModelConfig> alpha_patterns_{};
};

/// A number as JSON; a whole number without a fraction, 16 and not 16.0, as in PEFT.
inline nlohmann::json plain_number(double value) {
  if (value != std::round(value) || std::abs(value) > 1e15) return value;
  return static_cast<std::int64_t>(value);
}

/// The most frequent value of a setting; of equally frequent ones the smallest.
template <class Value>
Value commonest(const std::map<Value, Index>& counts) {
  const auto most =
      std::max_element(counts.begin(), counts.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return most->first;
}

/// The contents of adapter_config.json for adapters, given as (map, settings).
inline nlohmann::json adapter_config(
    const std::vector<std::pair<std::string, LoraGateConfig>>& maps) {
  // PEFT has one flag for all adapters.
  const bool is_stabilized = std::all_of(
      maps.begin(), maps.end(), [](const auto& map) { return map.second.rank_stabilized; });
  const auto alpha_of = [&](const LoraGateConfig& lora) {
    if (lora.rank_stabilized == is_stabilized) return lora.alpha;
    return lora_factor(lora) * static_cast<double>(lora.rank);
  };
  std::map<Index, Index> ranks;
  std::map<double, Index> alphas;
  for (const auto& [map, lora] : maps) {
    ++ranks[lora.rank];
    ++alphas[alpha_of(lora)];
    require(std::isfinite(alpha_of(lora)), "save_adapters: alpha of ", map, " is ", alpha_of(lora),
            ", must be finite");
  }
  const Index rank = commonest(ranks);
  const double alpha = commonest(alphas);

  nlohmann::json targets = nlohmann::json::array();
  nlohmann::json rank_pattern = nlohmann::json::object();
  nlohmann::json alpha_pattern = nlohmann::json::object();
  std::string expression;
  bool is_ambiguous = false;
  for (const auto& [map, lora] : maps) {
    targets.push_back(map);
    // A name in the list matches all modules whose names end in a dot and it: "gate" would match
    // "experts.0.gate" of gated experts too. A regular expression matches whole names only.
    is_ambiguous = is_ambiguous || map.find('.') == std::string::npos;
    if (!expression.empty()) expression += '|';
    for (const char c : map) expression += c == '.' ? std::string("\\.") : std::string(1, c);
    if (lora.rank != rank) rank_pattern['^' + map] = lora.rank;
    if (alpha_of(lora) != alpha) alpha_pattern['^' + map] = plain_number(alpha_of(lora));
  }
  return {{"peft_type", "LORA"},
          {"task_type", nullptr},
          {"base_model_name_or_path", nullptr},
          {"inference_mode", true},
          {"bias", "none"},
          {"fan_in_fan_out", false},
          {"use_rslora", is_stabilized},
          {"lora_dropout", 0.0},
          {"r", rank},
          {"lora_alpha", plain_number(alpha)},
          {"target_modules", is_ambiguous ? nlohmann::json(expression) : targets},
          {"rank_pattern", rank_pattern},
          {"alpha_pattern", alpha_pattern}};
}

}  // namespace moe::detail
