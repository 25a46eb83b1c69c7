#pragma once

#include <bit>
#include <string>

#include "moe/io/safetensors/reader.hpp"
#include "moe/io/safetensors/writer.hpp"

/// \file
/// Saving and loading modules in the safetensors format
/// (https://huggingface.co/docs/safetensors), which PyTorch, JAX and NumPy read and write:
///
///     8 bytes      length N of the header, little-endian
///     N bytes      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...,
///                  "__metadata__": {"key": "text", ...}}
///     the rest     the tensors, row-major and little-endian, one after the other, no byte between
///
/// Needs nlohmann-json (Debian: nlohmann-json3-dev); CMake: link moe::io. Not included by moe/moe.hpp.

namespace moe {

static_assert(std::endian::native == std::endian::little && sizeof(Index) == 8,
              "safetensors files need a little-endian machine with a 64-bit Index");

/// Saves a module's parameters by their names, and its configuration. Throws as
/// SafetensorsWriter::add_module() and write() do.
template <class Module>
void save_module(const std::string& path, const Module& module) {
  SafetensorsWriter writer;
  writer.add_module(module);
  writer.write(path);
}

/// Loads the parameters of a module that has the same configuration. Throws std::runtime_error, with the
/// module unchanged, if the file cannot be read, is damaged, lacks a parameter with its name, type
/// and shape, or was saved with another configuration; the message names the file and the tensor or
/// field.
template <class Module>
void load_module(const std::string& path, Module& module) {
  SafetensorsFile(path).read_module(module);
}

/// Saves every parameter of a module by its name, without its configuration. Throws as
/// SafetensorsWriter::add_parameters() and write() do.
template <class Module>
void save_parameters(const std::string& path, const Module& module) {
  SafetensorsWriter writer;
  writer.add_parameters(module);
  writer.write(path);
}

/// Loads the parameters of a module, whatever configuration they were saved with. Throws
/// std::runtime_error, with the module unchanged, if the file cannot be read, is damaged or lacks a
/// parameter with its name, type and shape.
template <class Module>
void load_parameters(const std::string& path, Module& module) {
  SafetensorsFile(path).read_parameters(module);
}

}  // namespace moe
