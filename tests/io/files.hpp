#pragma once

#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>

/// \file
/// Files as tests of saving and loading write and read them, byte by byte.

namespace moe::test {

/// A safetensors file as its parts; `length` is what it says of its header.
inline void write_file(const std::string& path, const std::string& header, const std::string& data,
                       std::uint64_t length) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(&length), 8);
  file << header << data;
}
inline void write_file(const std::string& path, const std::string& header,
                       const std::string& data) {
  write_file(path, header, data, header.size());
}

/// The same with so many bytes of data.
inline void write_file(const std::string& path, const std::string& header, std::size_t data,
                       std::uint64_t length = std::numeric_limits<std::uint64_t>::max()) {
  if (length == std::numeric_limits<std::uint64_t>::max()) length = header.size();
  write_file(path, header, std::string(data, '\1'), length);
}

inline std::string read_all(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace moe::test
