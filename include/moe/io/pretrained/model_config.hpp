#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/io/safetensors/input_file.hpp"
#include "moe/io/safetensors/messages.hpp"
#include "moe/kernels/activations.hpp"

/// \file
/// The config.json of a model. Every value is checked.

namespace moe::detail {

/// A whole file as JSON. Throws std::runtime_error, which says why, if it cannot be read.
inline nlohmann::json read_json(const std::string& path) {
  const InputFile file(path);
  std::string text(file.size(), '\0');
  file.read(0, text.data(), text.size());
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::exception& error) {
    fail_file(path, "is not JSON: ", plain(error.what()));
  }
}

}  // namespace moe::detail

namespace moe::io {

/// The settings of a model. A value that is null counts as missing. Reading a value that has another type, is
/// out of range, or is missing and has no default throws std::runtime_error, which names the file, the key
/// and the value.
class ModelConfig {
 public:
  /// Reads a config.json. Throws std::runtime_error if it cannot, or if the file is not a JSON
  /// object.
  explicit ModelConfig(const std::string& path) : ModelConfig(path, detail::read_json(path), {}) {}

  const std::string& path() const { return path_; }  ///< of the file
  /// Whether there is a value.
  bool has(const std::string& key) const { return find(key) != nullptr; }

  /// A whole number from 0 to 1,000,000, such as a width or a number of layers.
  Index count(const std::string& key) const { return to_count(key, get(key)); }
  /// The same, or `otherwise` if there is none.
  Index count(const std::string& key, Index otherwise) const {
    return has(key) ? count(key) : otherwise;
  }
  /// The number of experts: transformers 5 writes num_local_experts, older files have num_experts.
  Index experts() const {
    return count(has("num_local_experts") ? "num_local_experts" : "num_experts");
  }
  /// A list of whole numbers from 0 to 1,000,000; empty if there is none.
  std::vector<Index> counts(const std::string& key) const {
    std::vector<Index> numbers;
    if (!has(key)) return numbers;
    if (!get(key).is_array()) refuse(key, get(key), "a list");
    for (const nlohmann::json& number : get(key)) numbers.push_back(to_count(key, number));
    return numbers;
  }
  /// A number.
  double number(const std::string& key) const {
    if (!get(key).is_number()) refuse(key, get(key), "a number");
    return get(key).get<double>();
  }
  /// The same, or `otherwise` if there is none.
  double number(const std::string& key, double otherwise) const {
    return has(key) ? number(key) : otherwise;
  }
  /// A flag, or `otherwise` if there is none.
  bool flag(const std::string& key, bool otherwise) const {
    if (!has(key)) return otherwise;
    if (!get(key).is_boolean()) refuse(key, get(key), "true or false");
    return get(key).get<bool>();
  }
  /// Whether there is a value and it is a string.
  bool is_text(const std::string& key) const { return has(key) && get(key).is_string(); }
  /// A string.
  std::string text(const std::string& key) const {
    if (!get(key).is_string()) refuse(key, get(key), "a string");
    return get(key).get<std::string>();
  }
  /// The same, or `otherwise` if there is none.
  std::string text(const std::string& key, const std::string& otherwise) const {
    return has(key) ? text(key) : otherwise;
  }
  /// An activation function, by its name in Hugging Face's models.
  Activation activation(const std::string& key) const {
    const std::string name = text(key);
    if (name == "silu" || name == "swish") return Activation::silu;
    if (name == "relu") return Activation::relu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_new" || name == "gelu_pytorch_tanh") return Activation::gelu_tanh;
    refuse(key, get(key), "silu, relu, gelu, gelu_new or gelu_pytorch_tanh");
  }
  /// The settings in a value that is an object.
  ModelConfig part(const std::string& key) const {
    if (!get(key).is_object()) refuse(key, get(key), "an object");
    return {path_, get(key), place_ + key + "."};
  }

  /// The keys of all settings, null ones too, in alphabetical order.
  std::vector<std::string> keys() const {
    std::vector<std::string> keys;
    for (const auto& setting : settings_.items()) keys.push_back(setting.key());
    return keys;
  }
  /// Whether there is no value, or an empty list or object.
  bool is_empty(const std::string& key) const { return !has(key) || get(key).empty(); }

  /// Throws std::runtime_error: the value of `key` must be `needed`.
  [[noreturn]] void refuse(const std::string& key, std::string_view needed) const {
    refuse(key, get(key), needed);
  }

 private:
  ModelConfig(std::string path, nlohmann::json settings, std::string place)
      : path_(std::move(path)), settings_(std::move(settings)), place_(std::move(place)) {
    if (!settings_.is_object()) detail::fail_file(path_, "is not an object");
  }

  const nlohmann::json* find(const std::string& key) const {
    const auto found = settings_.find(key);
    return found == settings_.end() || found->is_null() ? nullptr : &*found;
  }
  const nlohmann::json& get(const std::string& key) const {
    const nlohmann::json* const found = find(key);
    if (found == nullptr) detail::fail_file(path_, "has no ", named(key));
    return *found;
  }
  Index to_count(const std::string& key, const nlohmann::json& number) const {
    constexpr std::uint64_t largest = 1'000'000;
    if (!number.is_number_unsigned() || number.get<std::uint64_t>() > largest) {
      refuse(key, number, "a whole number from 0 to 1000000");
    }
    return static_cast<Index>(number.get<std::uint64_t>());
  }
  [[noreturn]] void refuse(const std::string& key, const nlohmann::json& value,
                           std::string_view needed) const {
    using Handler = nlohmann::json::error_handler_t;
    detail::fail_file(path_, named(key), " is ",
                      detail::plain(value.dump(-1, ' ', true, Handler::replace)), ", must be ",
                      needed);
  }
  std::string named(const std::string& key) const {
    return '"' + detail::plain(place_ + key) + '"';
  }

  std::string path_;
  nlohmann::json settings_;
  std::string place_;  ///< of the settings in the file: "text_config."
};

}  // namespace moe::io
