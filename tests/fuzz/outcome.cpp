// Says of every file named on standard input, one a line, what SafetensorsFile makes of it, as JSON:
// {"refused": why} or {"metadata": {...}, "tensors": {name: [dtype, shape, begin, end]}}.
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "moe/io/safetensors.hpp"

int main() {
  for (std::string path; std::getline(std::cin, path);) {
    nlohmann::json outcome;
    try {
      const moe::SafetensorsFile file(path);
      outcome["metadata"] = file.metadata();
      outcome["tensors"] = nlohmann::json::object();
      for (const auto& [name, tensor] : file.tensors()) {
        outcome["tensors"][name] = {tensor.type, tensor.shape, tensor.begin, tensor.end};
      }
    } catch (const std::runtime_error& error) {
      outcome = {{"refused", error.what()}};
    }
    std::cout << outcome.dump() << '\n';
  }
}
