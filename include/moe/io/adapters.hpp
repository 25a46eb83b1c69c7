#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
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
/// Low-rank adapters in files of their own, those of Hugging Face's PEFT: a folder with adapter_config.json
/// and adapter_model.safetensors. An adapter of "experts.3.up.weight" is there as
///
///     base_model.model.experts.3.up.lora_A.weight   [r, inputs], A transposed
///     base_model.model.experts.3.up.lora_B.weight   [outputs, r], B transposed
///
/// which PEFT adds to a torch.nn.Linear named experts.3.up. CMake: link moe::io.

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

/// Calls f(name of the map, LowRank) for every adapter with a rank in a module.
template <class Module, class F>
void walk_adapters(Module& module, const ParameterName& name, F& f) {
  using Type = std::remove_const_t<Module>;
  if constexpr (is_lora_weight<Type>) {
    if (module.low_rank.rank() > 0) f(name.string(), module.low_rank);
  } else if constexpr (is_lora_gate<Type>) {
    Type::visit_adapters(module, [&](std::string_view part, auto& low_rank) {
      if (low_rank.rank() == 0) return;
      f(part.empty() ? name.string() : ParameterName(name, part).string(), low_rank);
    });
  } else if constexpr (is_vector<Type>) {
    Index index = 0;
    for (auto& element : module) walk_adapters(element, ParameterName(name, index++), f);
  } else if constexpr (!is_parameter<Type>) {
    Type::visit_parameters(module, [&](std::string_view part, auto& member) {
      walk_adapters(member, ParameterName(name, part), f);
    });
  }
}
template <class Module, class F>
void for_each_adapter(Module& module, F&& f) {
  walk_adapters(module, ParameterName(), f);
}

/// The tensors of a map's adapter.
inline std::pair<std::string, std::string> adapter_tensors(const std::string& map) {
  const std::string begin = std::string(adapter_key) + map;
  return {begin + ".lora_A.weight", begin + ".lora_B.weight"};
}

/// A number as JSON, whole where it is so but for rounding.
inline nlohmann::json plain_number(double value) {
  const double whole = std::round(value);
  if (std::abs(value - whole) > 1e-12 * std::abs(value) || std::abs(whole) > 1e15) return value;
  return static_cast<std::int64_t>(whole);
}

/// The settings of adapters as a file says them.
class AdapterConfig {
 public:
  /// Throws std::runtime_error, which names the key, for what this cannot serve.
  explicit AdapterConfig(const std::string& path) : path_(path), settings_(read_json(path)) {
    if (!settings_.is_object()) fail_file(path_, "is no object");
    require_value("peft_type", "LORA");
    require_value("bias", "none");
    for (const char* key : {"use_dora", "use_qalora", "fan_in_fan_out", "lora_bias"}) {
      require_value(key, false);
    }
    for (const char* key : {"modules_to_save", "layer_replication", "target_parameters"}) {
      const auto found = settings_.find(key);
      if (found != settings_.end() && !found->empty()) refuse(key, *found, "empty");
    }
  }

  /// The rank and the factor of a map. PEFT's patterns are expressions; known here are a name, the end
  /// of one after a dot, and ^ before a whole one.
  Index rank(const std::string& map) const {
    const nlohmann::json& value = of(map, "r", "rank_pattern");
    constexpr std::uint64_t most = 1'000'000;
    if (!value.is_number_unsigned() || value.get<std::uint64_t>() < 1 ||
        value.get<std::uint64_t>() > most) {
      refuse("r", value, "a whole number from 1 to 1000000");
    }
    return static_cast<Index>(value.get<std::uint64_t>());
  }
  double factor(const std::string& map) const {
    const nlohmann::json& value = of(map, "lora_alpha", "alpha_pattern");
    if (!value.is_number()) refuse("lora_alpha", value, "a number");
    const auto stabilized = settings_.find("use_rslora");
    const bool by_root =
        stabilized != settings_.end() && stabilized->is_boolean() && stabilized->get<bool>();
    return lora_factor(LoraGateConfig{
        .rank = rank(map), .alpha = value.get<double>(), .rank_stabilized = by_root});
  }

  const std::string& path() const { return path_; }

 private:
  const nlohmann::json& of(const std::string& map, const char* key, const char* patterns) const {
    const auto found = settings_.find(patterns);
    if (found != settings_.end() && found->is_object()) {
      for (const auto& [pattern, value] : found->items()) {
        if (pattern.find_first_of("*+?[](){}|\\$") != std::string::npos) {
          refuse(patterns, pattern, "names of maps");
        }
        const bool is_whole = pattern.starts_with('^');
        const std::string name = pattern.substr(is_whole ? 1 : 0);
        if (name == map || (!is_whole && map.ends_with('.' + name))) return value;
      }
    }
    const auto value = settings_.find(key);
    if (value == settings_.end()) fail_file(path_, "has no \"", key, '"');
    return *value;
  }

  /// What is not there, or null, is as PEFT has it by default.
  void require_value(const char* key, const nlohmann::json& needed) const {
    const auto found = settings_.find(key);
    const bool is_default = found == settings_.end() || found->is_null();
    if (is_default && std::string_view(key) != "peft_type") return;
    if (is_default || *found != needed) {
      refuse(key, is_default ? nlohmann::json() : *found, needed.dump());
    }
  }
  [[noreturn]] void refuse(const char* key, const nlohmann::json& value,
                           std::string_view needed) const {
    using Handler = nlohmann::json::error_handler_t;
    fail_file(path_, '"', key, "\" is ", plain(value.dump(-1, ' ', true, Handler::replace)),
              ", must be ", needed);
  }

  std::string path_;
  nlohmann::json settings_;
};

}  // namespace detail

/// Saves the adapters of a module, a layer or a whole model, and nothing else: a folder, made if it is not
/// there, that load_adapters() and PEFT read. Each of its two files is replaced whole or not at all. The
/// names in the file are those of the module after `prefix`.
///
/// Throws std::invalid_argument if the module has no adapters, and std::runtime_error, which says why, if
/// a file cannot be written.
template <class Module>
void save_adapters(const std::string& folder, const Module& module,
                   const std::string& prefix = {}) {
  SafetensorsWriter writer;
  nlohmann::json config = {{"peft_type", "LORA"},
                           {"task_type", nullptr},
                           {"base_model_name_or_path", nullptr},
                           {"inference_mode", true},
                           {"bias", "none"},
                           {"fan_in_fan_out", false},
                           {"use_rslora", false},
                           {"lora_dropout", 0.0},
                           {"target_modules", nlohmann::json::array()},
                           {"rank_pattern", nlohmann::json::object()},
                           {"alpha_pattern", nlohmann::json::object()}};
  detail::for_each_adapter(
      module, [&]<class Scalar>(const std::string& name, const detail::LowRank<Scalar>& adapter) {
        const std::string map = prefix + name;
        const auto tensors = detail::adapter_tensors(map);
        const auto add = [&](const std::string& tensor, const Matrix<Scalar>& matrix) {
          writer.add_made<Scalar>(tensor,
                                  {static_cast<std::uint64_t>(matrix.cols()),
                                   static_cast<std::uint64_t>(matrix.rows())},
                                  [&matrix] { return Matrix<Scalar>(matrix.transpose()); });
        };
        add(tensors.first, adapter.a.value);
        add(tensors.second, adapter.b.value);
        const nlohmann::json rank = adapter.rank();
        const nlohmann::json alpha =
            detail::plain_number(adapter.factor * static_cast<double>(adapter.rank()));
        config["target_modules"].push_back(map);
        if (!config.contains("r")) {
          config["r"] = rank;
          config["lora_alpha"] = alpha;
        }
        // PEFT takes a pattern for the end of a name unless it begins with ^.
        if (config["r"] != rank) config["rank_pattern"]['^' + map] = rank;
        if (config["lora_alpha"] != alpha) config["alpha_pattern"]['^' + map] = alpha;
      });
  detail::require(config.contains("r"), "save_adapters: the module has no adapters");

  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) detail::fail_file(folder, "cannot be made: ", error.message());
  writer.write(detail::file_in(folder, detail::adapter_tensors_file));
  const std::string text = config.dump(2) + '\n';
  detail::AtomicFile file(detail::file_in(folder, detail::adapter_config_file));
  file.write(text.data(), text.size());
  file.commit();
}

/// The adapters of a module back, widened or rounded to its Scalar. Every adapter of the module must be in
/// the folder with its rank, its factor and its shapes, and none of the folder may be left over under
/// `prefix`: an adapter that would get lost or be scaled otherwise is an error.
///
/// Throws std::runtime_error, which names the file and what does not fit, and std::invalid_argument if the
/// module has no adapters; nothing is changed then.
template <class Module>
void load_adapters(const std::string& folder, Module& module, const std::string& prefix = {}) {
  const detail::AdapterConfig config(detail::file_in(folder, detail::adapter_config_file));
  const SafetensorsFile file(detail::file_in(folder, detail::adapter_tensors_file));
  std::set<std::string> left;
  for (const auto& [name, tensor] : file.tensors()) {
    if (name.starts_with(std::string(detail::adapter_key) + prefix)) left.insert(name);
  }
  bool is_any = false;
  // All is looked at, and read, before the first is taken.
  std::vector<std::function<void()>> take;
  detail::for_each_adapter(
      module, [&]<class Scalar>(const std::string& name, detail::LowRank<Scalar>& adapter) {
        is_any = true;
        const std::string map = prefix + name;
        const Index rank = config.rank(map);
        if (rank != adapter.rank()) {
          detail::fail_file(config.path(), "the rank of ", detail::plain(map), " is ", rank,
                            ", the module has ", adapter.rank());
        }
        const double factor = config.factor(map);
        if (std::abs(factor - adapter.factor) > 1e-9 * std::abs(factor)) {
          detail::fail_file(config.path(), "the factor of ", detail::plain(map), " is ", factor,
                            ", the module has ", adapter.factor);
        }
        const auto read = [&](const std::string& tensor, Matrix<Scalar>& into) {
          const std::vector<std::uint64_t> shape = {static_cast<std::uint64_t>(into.cols()),
                                                    static_cast<std::uint64_t>(into.rows())};
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

/// The configuration with which adapt() makes experts whose adapters a folder holds: those of its maps
/// named "gate", "up" and "down" under "experts." after `prefix`. Throws std::runtime_error, which names
/// the file, if they have several ranks or factors, or there are none.
inline LoraConfig load_lora_config(const std::string& folder, const std::string& prefix = {}) {
  const detail::AdapterConfig config(detail::file_in(folder, detail::adapter_config_file));
  const SafetensorsFile file(detail::file_in(folder, detail::adapter_tensors_file));
  LoraConfig lora{.rank = 0, .gate = false, .up = false, .down = false};
  const std::string begin = std::string(detail::adapter_key) + prefix + "experts.";
  const std::string_view end = ".lora_A.weight";
  for (const auto& [name, tensor] : file.tensors()) {
    if (!name.starts_with(begin) || !name.ends_with(end)) continue;
    const std::string map = name.substr(detail::adapter_key.size(),
                                        name.size() - detail::adapter_key.size() - end.size());
    const std::string last = map.substr(map.rfind('.') + 1);
    bool* const flag = last == "gate"   ? &lora.gate
                       : last == "up"   ? &lora.up
                       : last == "down" ? &lora.down
                                        : nullptr;
    if (flag == nullptr) {
      detail::fail_file(file.path(), detail::tensor_named(name), " is of no map of an expert");
    }
    *flag = true;
    const Index rank = config.rank(map);
    const double alpha = config.factor(map) * static_cast<double>(rank);
    if (lora.rank != 0 && (lora.rank != rank || lora.alpha != alpha)) {
      detail::fail_file(config.path(), "the experts' adapters have several ranks or factors");
    }
    lora.rank = rank;
    lora.alpha = alpha;
  }
  if (lora.rank == 0) detail::fail_file(file.path(), "has no adapters of experts");
  return lora;
}

}  // namespace moe
