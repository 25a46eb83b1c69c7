#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "../../temporary_folder.hpp"
#include "../files.hpp"
#include "golden.hpp"

/// \file
/// Golden models with something wrong.

namespace moe::test {

/// A copy of a golden model that a test may change.
class ChangedModel {
 public:
  explicit ChangedModel(const std::string& model) {
    for (const auto& entry : std::filesystem::directory_iterator(golden(model))) {
      if (entry.is_regular_file()) std::filesystem::copy(entry.path(), folder_.file(""));
    }
  }

  std::string folder() const { return folder_.file(""); }
  std::string file(const std::string& name) const { return folder_.file(name); }

  void write(const std::string& name, const std::string& text) const {
    std::ofstream(file(name), std::ios::binary) << text;
  }

  template <class F>
  void change_json(const std::string& name, F&& change) const {
    auto json = nlohmann::json::parse(read_all(file(name)));
    change(json);
    write(name, json.dump());
  }
  /// Changes a value of config.json.
  template <class Value>
  void set(const std::string& key, Value&& value) const {
    change_json("config.json", [&](auto& config) { config[key] = std::forward<Value>(value); });
  }
  /// Changes what the header of a safetensors file says.
  template <class F>
  void change_header(const std::string& name, F&& change) const {
    const std::string all = read_all(file(name));
    std::uint64_t length = 0;
    std::memcpy(&length, all.data(), 8);
    auto header = nlohmann::json::parse(all.substr(8, length));
    change(header);
    write_file(file(name), header.dump(), all.substr(8 + length));
  }
  /// Gives a tensor another name.
  void rename(const std::string& name, const std::string& from, const std::string& to) const {
    change_header(name, [&](auto& header) {
      header[to] = header.at(from);
      header.erase(from);
    });
  }

 private:
  TemporaryFolder folder_;
};

}  // namespace moe::test
