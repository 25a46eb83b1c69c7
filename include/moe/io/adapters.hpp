#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/adapt/lora.hpp"
#include "moe/io/pretrained/model_config.hpp"
#include "moe/io/safetensors.hpp"

/// \file
/// Low-rank adapters in the files of Hugging Face's PEFT: a folder with adapter_config.json and
/// adapter_model.safetensors. The adapter of "experts.3.up.weight" has the tensors
///
///     base_model.model.experts.3.up.lora_A.weight   [r, inputs], A transposed
///     base_model.model.experts.3.up.lora_B.weight   [outputs, r], B transposed
///
/// which PEFT adds to a torch.nn.Linear named experts.3.up; PEFT 0.15 was the first that reads a rank or an
/// alpha of a whole name ("^gate"). CMake: link moe::io.

namespace moe {

namespace detail {

inline constexpr std::string_view adapter_config_file = "adapter_config.json";
inline constexpr std::string_view adapter_tensors_file = "adapter_model.safetensors";
inline constexpr std::string_view adapter_key = "base_model.model.";

inline std::string file_in(const std::string& folder, std::string_view name) {
  return (std::filesystem::path(folder) / name).string();
}

template <class Type>
inline constexpr bool is_lora_weight = false;
template <class Scalar, class Base>
inline constexpr bool is_lora_weight<LoraWeight<Scalar, Base>> = true;
template <class Type>
inline constexpr bool is_lora_gate = false;
template <class Gate>
inline constexpr bool is_lora_gate<LoraGate<Gate>> = true;

template <class Type>
inline constexpr bool is_lora_network = false;
template <class Stored>
inline constexpr bool is_lora_network<LoraFeedForward<Stored>> = true;

/// Throws std::invalid_argument if a part with adapters has other trained parameters, which the files of
/// adapters do not have.
template <class Module>
void check_only_adapters_trained(const Module& module, const ParameterName& name) {
  if constexpr (is_lora_network<Module> || is_lora_gate<Module>) {
    walk_parameters(module, [&](const ParameterName& of, const auto& parameter) {
      const std::string text = of.string();
      const bool is_adapter = text.ends_with("lora_A.weight") || text.ends_with("lora_B.weight");
      require(is_adapter || !parameter.trained,
              "save_adapters: ", ParameterName(name, text).string(),
              " is trained and no part of an adapter; save_parameters() saves it");
    });
  } else if constexpr (is_vector<Module>) {
    Index index = 0;
    for (const auto& element : module) {
      check_only_adapters_trained(element, ParameterName(name, index++));
    }
  } else if constexpr (requires { module.network(); }) {
    check_only_adapters_trained(module.network(), name);
  } else if constexpr (!is_parameter<Module>) {
    Module::visit_parameters(module, [&](std::string_view part, const auto& member) {
      check_only_adapters_trained(member, ParameterName(name, part));
    });
  }
}

/// A map's name after a prefix. Throws std::invalid_argument where the two would run together.
inline std::string prefixed_map(const std::string& prefix, const std::string& name) {
  require(name.empty() || prefix.empty() || prefix.back() == '.', "adapters: the prefix \"",
          plain(prefix), "\" must end in '.'");
  return prefix + name;
}

/// What adapters were made with: that of an expert's maps, or of a gate.
inline LoraGateConfig settings_of(const LoraGateConfig& config) { return config; }
inline LoraGateConfig settings_of(const LoraConfig& config) {
  return {.rank = config.rank, .alpha = config.alpha, .rank_stabilized = config.rank_stabilized};
}

/// Calls f(name of the map, LowRank, LoraGateConfig) for every adapter in a module whose rank is not 0;
/// `settings` are those of the module that it is a part of.
template <class Module, class F>
void walk_adapters(Module& module, const ParameterName& name, const LoraGateConfig& settings,
                   F& f) {
  using Type = std::remove_const_t<Module>;
  if constexpr (is_lora_weight<Type>) {
    if (module.low_rank.rank() > 0) f(name.string(), module.low_rank, settings);
  } else if constexpr (is_lora_gate<Type>) {
    Type::visit_adapters(module, [&](std::string_view part, auto& low_rank) {
      if (low_rank.rank() == 0) return;
      f(part.empty() ? name.string() : ParameterName(name, part).string(), low_rank,
        module.config().lora);
    });
  } else if constexpr (is_vector<Type>) {
    Index index = 0;
    for (auto& element : module) walk_adapters(element, ParameterName(name, index++), settings, f);
  } else if constexpr (!is_parameter<Type>) {
    const auto walk = [&](const LoraGateConfig& of_parts) {
      Type::visit_parameters(module, [&](std::string_view part, auto& member) {
        walk_adapters(member, ParameterName(name, part), of_parts, f);
      });
    };
    if constexpr (requires { settings_of(module.network().config().lora); }) {
      walk(settings_of(module.network().config().lora));
    } else if constexpr (requires { settings_of(module.config().lora); }) {
      walk(settings_of(module.config().lora));
    } else {
      walk(settings);
    }
  }
}
template <class Module, class F>
void for_each_adapter(Module& module, F&& f) {
  walk_adapters(module, ParameterName(), LoraGateConfig(), f);
}

/// The tensors of a map's adapter.
inline std::pair<std::string, std::string> adapter_tensors(const std::string& map) {
  const std::string begin = std::string(adapter_key) + map;
  return {begin + ".lora_A.weight", begin + ".lora_B.weight"};
}

/// [inputs, outputs] of PyTorch's transposed matrix.
template <class Scalar>
std::vector<std::uint64_t> transposed_shape(const Matrix<Scalar>& matrix) {
  return {static_cast<std::uint64_t>(matrix.cols()), static_cast<std::uint64_t>(matrix.rows())};
}

inline constexpr std::string_view plain_names = "letters, digits, '_', '-' and '.' only";
/// Whether PEFT, to which names in its patterns are regular expressions, takes a text for itself.
inline bool is_plain_name(std::string_view name) {
  constexpr std::string_view plain_characters =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.";
  return !name.empty() && name.find_first_not_of(plain_characters) == std::string_view::npos;
}

/// The settings of adapters in a file. Settings that are missing or null have PEFT's defaults; rank and alpha
/// must not be missing.
class AdapterConfig {
 public:
  /// Throws std::runtime_error, which names the key, for a setting that the library does not have.
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
    // Others subtract from the frozen weight what the adapter starts with.
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

  /// The pattern of a map. A pattern is for the module with this name and for those whose name ends in it after
  /// a dot; with ^ it is for the first only.
  std::pair<const io::ModelConfig*, std::string> place(
      const std::string& map, const char* key,
      const std::optional<io::ModelConfig>& patterns) const {
    if (!patterns.has_value()) return {&settings_, key};
    std::string found;
    const auto look_for = [&](const std::string& pattern) {
      if (!patterns->has(pattern)) return;
      // PEFT takes the one that the file has first.
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

/// The value of a setting that most maps have.
template <class Value>
Value commonest(const std::map<Value, Index>& counts) {
  const auto most =
      std::max_element(counts.begin(), counts.end(),
                       [](const auto& a, const auto& b) { return a.second < b.second; });
  return most->first;
}

/// adapter_config.json of adapters by their maps.
inline nlohmann::json adapter_config(
    const std::vector<std::pair<std::string, LoraGateConfig>>& maps) {
  // PEFT has one flag for all.
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
    // A module in the list stands for all whose names end in it after a dot: "gate" for the gated experts'
    // "experts.0.gate" too. An expression stands for whole names.
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

/// What all adapters of a folder have whose map is_one(). Throws std::runtime_error, which calls them those
/// of `owner`, if they differ or there are none.
template <class F>
LoraGateConfig common_settings(const std::string& folder, std::string_view owner, F&& is_one) {
  const AdapterConfig config(file_in(folder, adapter_config_file));
  const SafetensorsFile file(file_in(folder, adapter_tensors_file));
  const std::string_view end = ".lora_A.weight";
  std::optional<LoraGateConfig> common;
  for (const auto& [name, tensor] : file.tensors()) {
    if (!name.starts_with(adapter_key) || !name.ends_with(end)) continue;
    const std::string map =
        name.substr(adapter_key.size(), name.size() - adapter_key.size() - end.size());
    if (!is_one(map)) continue;
    const LoraGateConfig found = config.of(map);
    if (!common.has_value()) common = found;
    if (common->rank != found.rank || common->alpha != found.alpha) {
      fail_file(config.path(), "the adapters of ", owner, " have several ranks or alphas");
    }
  }
  if (!common.has_value()) fail_file(file.path(), "has no adapters of ", owner);
  return *common;
}

}  // namespace detail

/// Saves the adapters of a module, a layer or a whole model, and nothing else: a folder, made if it is not
/// there, that load_adapters() and PEFT read. Each of its two files is replaced whole or not at all. The
/// names in the file are those of the module after `prefix`; a gate alone has none of its own, so that
/// `prefix` must be its name. "r" and "lora_alpha" are those of most adapters, "rank_pattern" and
/// "alpha_pattern" have those of the others.
///
/// Nothing else is saved: a parameter that is trained outside of adapted parts, or a selection bias that
/// moved, must be saved by other means. Throws std::invalid_argument if the module has no adapters, an
/// adapted expert or gate has a trained parameter that is no adapter's, the prefix of a name does not end in
/// a dot, a name is empty or has anything but letters,
/// digits, '_', '-' and '.', or an alpha is too large for the file, and std::runtime_error, which says why,
/// if a file cannot be written.
template <class Module>
void save_adapters(const std::string& folder, const Module& module,
                   const std::string& prefix = {}) {
  SafetensorsWriter writer;
  std::vector<std::pair<std::string, LoraGateConfig>> maps;
  detail::check_shapes(module, "save_adapters");
  detail::check_only_adapters_trained(module, ParameterName());
  detail::for_each_adapter(
      module, [&]<class Scalar>(const std::string& name, const detail::LowRank<Scalar>& adapter,
                                const LoraGateConfig& lora) {
        const std::string map = detail::prefixed_map(prefix, name);
        detail::require(detail::is_plain_name(map), "save_adapters: \"", detail::plain(map),
                        "\" must have ", detail::plain_names);
        maps.emplace_back(map, lora);
        const auto add = [&](const std::string& tensor, const Matrix<Scalar>& matrix) {
          writer.add_made<Scalar>(tensor, detail::transposed_shape(matrix),
                                  [&matrix] { return Matrix<Scalar>(matrix.transpose()); });
        };
        const auto tensors = detail::adapter_tensors(map);
        add(tensors.first, adapter.a.value);
        add(tensors.second, adapter.b.value);
      });
  detail::require(!maps.empty(), "save_adapters: the module has no adapters");
  const std::string config = detail::adapter_config(maps).dump(2) + '\n';

  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) detail::fail_file(folder, "cannot be made: ", error.message());
  writer.write(detail::file_in(folder, detail::adapter_tensors_file));
  detail::AtomicFile file(detail::file_in(folder, detail::adapter_config_file));
  file.write(config.data(), config.size());
  file.commit();
}

/// Loads the adapters of a module, converted to its Scalar. Every adapter of the module must be in the folder
/// with the same rank, factor and shapes, and the folder must have no others under `prefix`.
///
/// Throws std::runtime_error, which names the file and what does not fit, and std::invalid_argument if the
/// module has no adapters; nothing is changed then.
template <class Module>
void load_adapters(const std::string& folder, Module& module, const std::string& prefix = {}) {
  const detail::AdapterConfig config(detail::file_in(folder, detail::adapter_config_file));
  const SafetensorsFile file(detail::file_in(folder, detail::adapter_tensors_file));
  // Of a gate alone the prefix is its whole name.
  const bool is_whole_name = !prefix.empty() && prefix.back() != '.';
  const std::string begin = std::string(detail::adapter_key) + prefix + (is_whole_name ? "." : "");
  std::set<std::string> left;
  for (const auto& [name, tensor] : file.tensors()) {
    if (name.starts_with(begin)) left.insert(name);
  }
  bool is_any = false;
  // All is looked at, and read, before the first is taken.
  std::vector<std::function<void()>> take;
  detail::for_each_adapter(
      module, [&]<class Scalar>(const std::string& name, detail::LowRank<Scalar>& adapter,
                                const LoraGateConfig&) {
        is_any = true;
        const std::string map = detail::prefixed_map(prefix, name);
        const LoraGateConfig lora = config.of(map);
        if (lora.rank != adapter.rank()) {
          detail::fail_file(config.path(), "the rank of ", detail::plain(map), " is ", lora.rank,
                            ", the module has ", adapter.rank());
        }
        const double factor = detail::lora_factor(lora);
        if (std::abs(factor - adapter.factor) > 1e-9 * std::abs(factor)) {
          detail::fail_file(config.path(), "the factor of ", detail::plain(map), " is ", factor,
                            ", the module has ", adapter.factor);
        }
        const auto read = [&](const std::string& tensor, Matrix<Scalar>& into) {
          const std::vector<std::uint64_t> shape = detail::transposed_shape(into);
          if (file.tensor(tensor).shape != shape) {
            detail::fail_file(file.path(), detail::tensor_named(tensor), " has shape ",
                              detail::to_string(file.tensor(tensor).shape), ", needed is ",
                              detail::to_string(shape));
          }
          left.erase(tensor);
          take.push_back([values = Matrix<Scalar>(file.matrix<Scalar>(tensor).transpose()),
                          &into]() mutable { into.swap(values); });
        };
        const auto tensors = detail::adapter_tensors(map);
        read(tensors.first, adapter.a.value);
        read(tensors.second, adapter.b.value);
      });
  detail::require(is_any, "load_adapters: the module has no adapters");
  if (!left.empty()) {
    detail::fail_file(file.path(), detail::tensor_named(*left.begin()),
                      " is of an adapter that the module does not have");
  }
  for (const auto& of_adapter : take) of_adapter();
}

/// The configuration for adapt() that makes experts with the adapters of a folder: those of its maps named
/// "gate", "up" and "down" under "experts." after `prefix`. Throws std::runtime_error, which names the file,
/// if their ranks or alphas differ, or there are none.
inline LoraConfig load_lora_config(const std::string& folder, const std::string& prefix = {}) {
  LoraConfig lora{.gate = false, .up = false, .down = false};
  const std::string begin = prefix + "experts.";
  const LoraGateConfig found =
      detail::common_settings(folder, "experts", [&](const std::string& map) {
        if (!map.starts_with(begin)) return false;
        const std::string last = map.substr(map.rfind('.') + 1);
        lora.gate = lora.gate || last == "gate";
        lora.up = lora.up || last == "up";
        lora.down = lora.down || last == "down";
        return last == "gate" || last == "up" || last == "down";
      });
  lora.rank = found.rank;
  lora.alpha = found.alpha;
  lora.rank_stabilized = found.rank_stabilized;
  return lora;
}

/// The same of a gate, whose maps are "gate" and those under "gate." after `prefix`.
inline LoraGateConfig load_lora_gate_config(const std::string& folder,
                                            const std::string& prefix = {}) {
  return detail::common_settings(folder, "a gate", [&](const std::string& map) {
    return map == prefix + "gate" || map.starts_with(prefix + "gate.");
  });
}

}  // namespace moe
