#pragma once

#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

#include "moe/config_fields.hpp"
#include "moe/io/safetensors/messages.hpp"
#include "moe/parameter.hpp"

/// \file
/// A configuration in the metadata of a file: one string for each of its named fields. The key is
/// the name of the module, ".config." and the name of the field: "layer.config.gate.experts" =
/// "64".

namespace moe::detail {

using SafetensorsMetadata = std::map<std::string, std::string>;

template <class Module>
using ConfigOf = std::remove_cvref_t<decltype(std::declval<const Module&>().config())>;

template <class Module>
concept HasNamedConfig = requires(const Module& module) {
  module.config();
}
&&HasNamedFields<ConfigOf<Module>>;

template <class Module>
using IsPartWithConfig = std::bool_constant<HasNamedConfig<Module>>;

/// Calls f(prefix of the keys, config) for a module that has a configuration with named fields, otherwise for
/// the outermost of its parts that have one. (The configuration of a layer includes those of its experts and
/// its gate.)
template <class Module, class F>
void for_each_config(const Module& module, const std::string& prefix, F&& f) {
  const auto with_prefix = [&](const ParameterName& named, const auto& part) {
    const std::string name = named.string();
    f(prefix + name + (name.empty() ? "config." : ".config."), part.config());
  };
  walk_parts<IsPartWithConfig>(module, ParameterName(), with_prefix);
}

/// Throws std::invalid_argument for a number that is not finite: it could not be compared, nor written in
/// JSON.
template <class Config>
void write_config(const Config& config, const std::string& prefix, SafetensorsMetadata& metadata) {
  for_each_named_field(config, [&]<class Field>(const std::string& name, const Field& field) {
    if constexpr (std::is_floating_point_v<Field>) {
      require(std::isfinite(field), "SafetensorsWriter: ", prefix + name, " = ", field,
              ", must be finite");
    }
    metadata[prefix + name] = field_text(field);
  });
}

/// The value of a field from its text, or nothing if the text is not a value of this type.
template <class Field>
std::optional<Field> field_of_text(std::string_view text) {
  if constexpr (std::is_same_v<Field, bool>) {
    if (text == "true") return true;
    if (text == "false") return false;
    return std::nullopt;
  } else if constexpr (HasEnumeratorNames<Field>) {
    const auto names = enumerator_names(Field{});
    for (std::size_t i = 0; i < names.size(); ++i) {
      if (text == names[i]) return static_cast<Field>(i);
    }
    return std::nullopt;
  } else if constexpr (std::is_enum_v<Field>) {
    const auto number = field_of_text<std::underlying_type_t<Field>>(text);
    return number ? std::optional(static_cast<Field>(*number)) : std::nullopt;
  } else if constexpr (std::is_floating_point_v<Field>) {
    // JSON allows white space around a number, and its parser takes a zero byte for the end of the text.
    if (text.find_first_not_of("0123456789+-.eE") != std::string_view::npos) return std::nullopt;
    const auto json = nlohmann::json::parse(text.begin(), text.end(), nullptr, false);
    if (!json.is_number()) return std::nullopt;
    const auto number = static_cast<Field>(json.template get<double>());
    return std::isfinite(number) ? std::optional(number) : std::nullopt;
  } else {
    using Widest = std::conditional_t<std::is_signed_v<Field>, std::int64_t, std::uint64_t>;
    Widest number = 0;
    const char* const end = text.data() + text.size();
    const auto [last, error] = std::from_chars(text.data(), end, number);
    if (error != std::errc() || last != end) return std::nullopt;
    const auto field = static_cast<Field>(number);
    return static_cast<Widest>(field) == number ? std::optional(field) : std::nullopt;
  }
}

/// What field_of_text() accepts, for messages.
template <class Field>
std::string expected_text() {
  if constexpr (std::is_same_v<Field, bool>) {
    return "true or false";
  } else if constexpr (HasEnumeratorNames<Field>) {
    std::string text = "one of";
    for (const std::string_view name : enumerator_names(Field{})) {
      (text += text.ends_with("of") ? " " : ", ") += name;
    }
    return text;
  } else if constexpr (std::is_enum_v<Field>) {
    return expected_text<std::underlying_type_t<Field>>();
  } else if constexpr (std::is_floating_point_v<Field>) {
    return "a finite number";
  } else {
    using Number = std::conditional_t<std::is_same_v<Field, Seed>, std::uint64_t, Field>;
    using Limits = std::numeric_limits<Number>;
    return "a whole number from " + std::to_string(Limits::min()) + " to " +
           std::to_string(Limits::max());
  }
}

/// The configuration of a module in the metadata of a file.
class SavedConfig {
 public:
  /// The keys begin with `prefix`. The object refers to all three arguments.
  SavedConfig(const std::string& path, const SafetensorsMetadata& metadata,
              const std::string& prefix)
      : path_(path), metadata_(metadata), prefix_(prefix) {}

  /// Throws std::runtime_error, which names the field, if a field in the file has another value than in
  /// `config` or a text that is not a value, or is not in `config`. Fields that are not in the file, and seeds,
  /// are not compared.
  template <class Config>
  void check(const Config& config) const {
    std::set<std::string> known;
    for_each_named_field(config, [&]<class Field>(const std::string& name, const Field& field) {
      const auto said = metadata_.find(*known.insert(prefix_ + name).first);
      if (said == metadata_.end() || std::is_same_v<Field, Seed>) return;
      if (parsed<Field>(*said) == field) return;
      fail_file(path_, metadata_named(said->first), " is ", plain(said->second),
                ", the module has ", field_text(field));
    });
    check_known(known);
  }

  /// Overwrites all named fields. Throws likewise, and if a field is not in the file.
  template <class Config>
  void read(Config& config) const {
    std::set<std::string> known;
    for_each_named_field(config, [&]<class Field>(const std::string& name, Field& field) {
      const std::string& key = *known.insert(prefix_ + name).first;
      const auto said = metadata_.find(key);
      if (said == metadata_.end()) {
        fail_file(path_, "has no ", metadata_named(key), hint_of_prefix(metadata_, key));
      }
      field = parsed<Field>(*said);
    });
    check_known(known);
  }

 private:
  template <class Field>
  Field parsed(const SafetensorsMetadata::value_type& said) const {
    const auto field = field_of_text<Field>(said.second);
    if (!field) {
      fail_file(path_, metadata_named(said.first), " is \"", plain(said.second), "\", must be ",
                expected_text<Field>());
    }
    return *field;
  }

  void check_known(const std::set<std::string>& known) const {
    for (auto said = metadata_.lower_bound(prefix_);
         said != metadata_.end() && said->first.starts_with(prefix_); ++said) {
      if (known.contains(said->first)) continue;
      fail_file(path_, "has ", metadata_named(said->first),
                ", a field that the module's configuration does not have");
    }
  }

  const std::string& path_;
  const SafetensorsMetadata& metadata_;
  const std::string& prefix_;
};

template <class Config>
Config config_to_fill();

/// Initialises a field that will be overwritten.
struct FieldToFill {
  template <class Field>
  operator Field() const {  // NOLINT(google-explicit-constructor)
    if constexpr (std::is_same_v<Field, Seed>) {
      return Seed(0);
    } else {
      return config_to_fill<Field>();
    }
  }
};

/// A configuration whose fields will all be overwritten. (Config{} would not compile, since a Seed has no
/// default.)
template <class Config>
Config config_to_fill() {
  if constexpr (std::is_default_constructible_v<Config>) {
    return Config{};
  } else {
    return []<std::size_t... i>(std::index_sequence<i...>) {
      return Config{(static_cast<void>(i), FieldToFill{})...};
    }
    (std::make_index_sequence<visited_fields<Config>()>{});
  }
}

}  // namespace moe::detail
