#pragma once

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>

/// \file
/// Files that are read whole, packed by gzip or not.

namespace examples {

/// Throws std::runtime_error, which names the file, where it cannot be read.
inline std::ifstream open(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path.string());
  return file;
}

/// A word of a command of the shell, whatever is in it.
inline std::string shell_word(std::string_view word) {
  std::string text = "'";
  for (const char c : word) text += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return text + "'";
}

/// What a command of the shell prints. Throws std::runtime_error, which says `failure`, when it fails.
inline std::string output_of(const std::string& command, const std::string& failure) {
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) throw std::runtime_error(failure);
  std::string text;
  std::array<char, 1 << 16> buffer;
  while (const std::size_t size = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    text.append(buffer.data(), size);
  }
  if (pclose(pipe) != 0) throw std::runtime_error(failure);
  return text;
}

/// What is in a file that gzip can read. Throws std::runtime_error when gzip cannot.
inline std::string read_gzip(const std::string& path) {
  open(path);  // for its error
  return output_of("gzip -dc < " + shell_word(path), "gzip cannot read " + path);
}

}  // namespace examples
