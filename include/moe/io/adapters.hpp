#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/adapt/lora.hpp"
#include "moe/io/adapters/adapter_config.hpp"
#include "moe/io/safetensors.hpp"

/// \file
/// Low-rank adapters in the files of Hugging Face's PEFT: a folder with adapter_config.json and
/// adapter_model.safetensors. The adapter of "experts.3.up.weight" has the tensors
///
///     base_model.model.experts.3.up.lora_A.weight   [r, inputs], A transposed
///     base_model.model.experts.3.up.lora_B.weight   [outputs, r], B transposed
///
/// which PEFT adds to a torch.nn.Linear named experts.3.up; PEFT reads a rank or an alpha for a
/// whole name ("^gate") from version 0.15 on. CMake: link moe::io.

namespace moe {

namespace detail {

inline constexpr std::string_view adapter_config_file = "adapter_config.json";
inline constexpr std::string_view adapter_tensors_file = "adapter_model.safetensors";
inline constexpr std::string_view adapter_key = "base_model.model.";

inline std::string file_in(const std::string& folder, std::string_view name) {
  return (std::filesystem::path(folder) / name).string();
}

/// The settings of the adapters on a gate, or on the maps of an expert.
inline LoraGateConfig settings_of(const LoraGateConfig& config) { return config; }
inline LoraGateConfig settings_of(const LoraConfig& config) {
  return {.rank = config.rank, .alpha = config.alpha, .rank_stabilized = config.rank_stabilized};
}

template <class Type>
inline constexpr bool is_lora_network = false;
template <class Stored>
inline constexpr bool is_lora_network<LoraFeedForward<Stored>> = true;
template <class Type>
inline constexpr bool is_lora_gate = false;
template <class Gate>
inline constexpr bool is_lora_gate<LoraGate<Gate>> = true;
template <class Type>
concept LoraExpert = requires {
  typename Type::Network;
}
&&is_lora_network<typename Type::Network>&&
    std::derived_from<Type, ExpertOf<typename Type::Network>>;

template <class Type>
using IsAdapted =
    std::bool_constant<is_lora_network<Type> || is_lora_gate<Type> || LoraExpert<Type>>;

/// Calls f(name, part) for every adapted network and gate in a module.
template <class Module, class F>
void for_each_adapted(Module& module, F&& f) {
  const auto with_network = [&](const ParameterName& name, auto& part) {
    if constexpr (LoraExpert<std::remove_cvref_t<decltype(part)>>) {
      f(name, part.network());
    } else {
      f(name, part);
    }
  };
  walk_parts<IsAdapted>(module, ParameterName(), with_network);
}

/// Throws std::invalid_argument if a part with adapters has other trained parameters, which are not
/// stored in files of adapters.
template <class Module>
void check_only_adapters_trained(const Module& module) {
  for_each_adapted(module, [](const ParameterName& name, const auto& part) {
    walk_parameters(part, [&](const ParameterName& of_part, const auto& parameter) {
      const std::string text = of_part.string();
      const bool is_adapter = text.ends_with("lora_A.weight") || text.ends_with("lora_B.weight");
      require(is_adapter || !parameter.trained,
              "save_adapters: ", ParameterName(name, text).string(),
              " is trained but not part of an adapter; save_parameters() saves it");
    });
  });
}

/// Calls f(name of the map, LowRank, LoraGateConfig) for every adapter in a module whose rank is not 0.
template <class Module, class F>
void for_each_adapter(Module& module, F&& f) {
  for_each_adapted(module, [&](const ParameterName& name, auto& part) {
    const LoraGateConfig lora = settings_of(part.config().lora);
    std::remove_cvref_t<decltype(part)>::visit_adapters(
        part, [&](std::string_view map, auto& low_rank) {
          if (low_rank.rank() == 0) return;
          f(map.empty() ? name.string() : ParameterName(name, map).string(), low_rank, lora);
        });
  });
}

/// A map's name after a prefix. Throws std::invalid_argument unless a dot separates the two.
inline std::string prefixed_map(const std::string& prefix, const std::string& name) {
  require(name.empty() || prefix.empty() || prefix.back() == '.', "adapters: the prefix \"",
          plain(prefix), "\" must end in '.'");
  return prefix + name;
}

/// The tensors of a map's adapter.
inline std::pair<std::string, std::string> adapter_tensors(const std::string& map) {
  const std::string begin = std::string(adapter_key) + map;
  return {begin + ".lora_A.weight", begin + ".lora_B.weight"};
}

/// The shape of the matrix in PyTorch's layout, which is transposed: [columns, rows].
template <class Scalar>
std::vector<std::uint64_t> transposed_shape(const Matrix<Scalar>& matrix) {
  return {static_cast<std::uint64_t>(matrix.cols()), static_cast<std::uint64_t>(matrix.rows())};
}

/// The settings that all adapters of a folder share whose map satisfies is_one(). Throws
/// std::runtime_error, which calls them the adapters of `owner`, if their settings differ or there
/// are none.
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

/// Saves the adapters of a module, which may be a layer or a whole model, in a folder that
/// load_adapters() and PEFT read; it is created if it does not exist. Each of its two files is
/// replaced whole or not at all. The name of a map in the files is `prefix` followed by its name in
/// the module; for a gate alone whose parameter is named "weight" that name is empty, and `prefix`
/// must be the whole name. "r" and "lora_alpha" have the most frequent values, "rank_pattern" and
/// "alpha_pattern" those of the others.
///
/// Nothing else is saved: a parameter that is trained outside of adapted parts, or a selection bias
/// that has changed, must be saved separately. Throws std::invalid_argument if the module has no
/// adapters, a parameter no longer has its original shape, an adapted expert or gate has a trained
/// parameter that does not belong to an adapter, the prefix of a name does not end in a dot, a name
/// is empty or has anything but letters, digits, '_', '-' and '.', or an alpha is too large for the
/// file; and std::runtime_error, which says why, if a file cannot be written.
template <class Module>
void save_adapters(const std::string& folder, const Module& module,
                   const std::string& prefix = {}) {
  SafetensorsWriter writer;
  std::vector<std::pair<std::string, LoraGateConfig>> maps;
  detail::check_shapes(module, "save_adapters");
  detail::check_only_adapters_trained(module);
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
  if (error) detail::fail_file(folder, "cannot be created: ", error.message());
  writer.write(detail::file_in(folder, detail::adapter_tensors_file));
  detail::AtomicFile file(detail::file_in(folder, detail::adapter_config_file));
  file.write(config.data(), config.size());
  file.commit();
}

/// Loads the adapters of a module, converted to its Scalar. Every adapter of the module must be in the folder
/// with the same rank, factor and shapes, and the folder must have no others under `prefix`.
///
/// Throws std::runtime_error, which names the file, if a file is missing or damaged, a setting is
/// not supported, or the adapters differ, and std::invalid_argument if the module has no adapters
/// or the prefix of a name does not end in a dot; nothing is changed then.
template <class Module>
void load_adapters(const std::string& folder, Module& module, const std::string& prefix = {}) {
  const detail::AdapterConfig config(detail::file_in(folder, detail::adapter_config_file));
  const SafetensorsFile file(detail::file_in(folder, detail::adapter_tensors_file));
  // For a gate alone whose parameter is named "weight", the prefix is the whole name.
  const bool is_whole_name = !prefix.empty() && prefix.back() != '.';
  const std::string begin = std::string(detail::adapter_key) + prefix + (is_whole_name ? "." : "");
  std::set<std::string> left;
  for (const auto& [name, tensor] : file.tensors()) {
    if (name.starts_with(begin)) left.insert(name);
  }
  bool is_any = false;
  // All adapters are checked and read before the first is changed.
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
                              detail::to_string(file.tensor(tensor).shape), ", must be ",
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
                      " belongs to an adapter that the module does not have");
  }
  for (const auto& of_adapter : take) of_adapter();
}

/// The configuration with which adapt() makes experts that have the adapters of a folder: those of
/// the maps "gate", "up" and "down" whose names begin with `prefix` + "experts.". Throws
/// std::runtime_error, which names the file, if a file is missing or damaged, a setting is not
/// supported, their ranks or alphas differ, or there are none.
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

/// The same for a gate: for the map `prefix` + "gate", or those whose names begin with `prefix` +
/// "gate.".
inline LoraGateConfig load_lora_gate_config(const std::string& folder,
                                            const std::string& prefix = {}) {
  return detail::common_settings(folder, "a gate", [&](const std::string& map) {
    return map == prefix + "gate" || map.starts_with(prefix + "gate.");
  });
}

}  // namespace moe
