#pragma once

#include <cerrno>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

#include "moe/config.hpp"

/// \file
/// Error messages about files.

namespace moe::detail {

/// Throws std::runtime_error: "moe: model.safetensors: ...".
template <class... Parts>
[[noreturn]] void fail_file(const std::string& path, const Parts&... parts) {
  std::string text = "moe: " + path + ": ";
  (MessagePart(parts).append_to(text), ...);
  throw std::runtime_error(text);
}

/// Calls fail_file() unless the condition holds. If a part of the message takes work to make, use
/// `if` and fail_file() instead, so that it is made only for a file that fails.
template <class... Parts>
void require_file(bool condition, const std::string& path, const Parts&... parts) {
  if (!condition) fail_file(path, parts...);
}

/// "cannot be read: No such file or directory", by errno.
[[noreturn]] inline void fail_errno(const std::string& path, std::string_view what, int error) {
  fail_file(path, what, std::string_view(": "), std::generic_category().message(error));
}

/// A string from a file as part of a message: no longer than a line, in ASCII without control
/// characters.
inline std::string plain(std::string_view said) {
  constexpr std::size_t most = 120;
  std::string text;
  for (const char c : said.substr(0, most)) {
    text += c >= 0x20 && c < 0x7F ? c : '?';
  }
  return said.size() > most ? text + "..." : text;
}

inline std::string tensor_named(std::string_view name) { return "tensor \"" + plain(name) + '"'; }

inline std::string metadata_named(std::string_view key) { return "metadata \"" + plain(key) + '"'; }

/// The end of a message that says that a name is missing: nothing, unless just one name of the map has it behind a
/// prefix, such as "model.in.weight" for "in.weight".
template <class Map>
std::string hint_of_prefix(const Map& map, const std::string& missing) {
  const std::string* found = nullptr;
  for (const auto& entry : map) {
    if (!entry.first.ends_with("." + missing)) continue;
    if (found != nullptr) return {};
    found = &entry.first;
  }
  if (found == nullptr) return {};
  const std::string prefix = found->substr(0, found->size() - missing.size());
  return "; there is \"" + plain(*found) + "\", with the prefix \"" + plain(prefix) + '"';
}

}  // namespace moe::detail
