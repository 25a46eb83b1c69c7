#pragma once

#include <bit>
#include <string>

#include "moe/io/safetensors/reader.hpp"
#include "moe/io/safetensors/writer.hpp"

/// \file
/// Saving and loading parameters in the safetensors format
/// (https://huggingface.co/docs/safetensors), which PyTorch, JAX and NumPy read and write:
///
///     8 bytes      length N of the header, little-endian
///     N bytes      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
///                  "__metadata__": {"key": "text", ...}}
///     the rest     the tensors, row-major and little-endian, one after the other, no byte between
///
/// Needs nlohmann-json (Debian: nlohmann-json3-dev); CMake: link moe::io. Included by name, not by
/// moe/moe.hpp.

namespace moe {

static_assert(std::endian::native == std::endian::little && sizeof(Index) == 8,
              "safetensors files are little-endian, and so must the machine be");

/// Every parameter of a module, by its name. Throws like SafetensorsWriter::write().
template <class Module>
void save_parameters(const std::string& path, const Module& module) {
  SafetensorsWriter writer;
  writer.add_parameters(module);
  writer.write(path);
}

/// The same back, into a module of the same parameters; throws std::runtime_error, the module being
/// untouched, if the file is not in order or lacks a parameter of its name, type and shape.
template <class Module>
void load_parameters(const std::string& path, Module& module) {
  SafetensorsFile(path).read_parameters(module);
}

}  // namespace moe
