#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/io/safetensors/atomic_file.hpp"
#include "moe/io/safetensors/config.hpp"
#include "moe/io/safetensors/entry.hpp"
#include "moe/io/safetensors/header.hpp"
#include "moe/parameter.hpp"

namespace moe::detail {

/// A network, or an expert with one, whose narrow weights visit_parameters() does not visit.
template <class Module>
concept HasNarrowWeights = requires {
  requires Module::has_narrow_weights;
};
template <class Module>
using IsPartWithNarrowWeights = std::bool_constant<HasNarrowWeights<Module>>;

/// Throws std::invalid_argument, which names the part of the module, if one has narrow weights.
template <class Module>
void check_no_narrow_weights(const Module& module) {
  const auto refuse = [](const ParameterName& name, const auto&) {
    const std::string part = name.string();
    require(false, "SafetensorsWriter::add_module: ", part.empty() ? "the module" : part,
            " has narrow weights, which are no parameters and would not be in the file;"
            " save_serving() saves a ServingLayer, save_adapters() the adapters on one");
  };
  walk_parts<IsPartWithNarrowWeights>(module, ParameterName(), refuse);
}

}  // namespace moe::detail

namespace moe {

/// Collects tensors and writes them to a file.
///
///     moe::SafetensorsWriter writer;
///     writer.add_module(model);
///     writer.set_metadata("step", "1000");
///     writer.write("model.safetensors");
///
/// Tensors are not copied: they must exist and stay unchanged until write(). In the file, tensors with
/// larger elements come first, so that each is aligned.
class SafetensorsWriter {
 public:
  /// Adds a matrix of float (F32), double (F64), Eigen::half (F16) or Eigen::bfloat16 (BF16); one of a single
  /// row becomes a vector, [N]. Throws std::invalid_argument if the name was used before or is "__metadata__",
  /// which the format reserves.
  template <class Scalar>
  void add(const std::string& name, const Matrix<Scalar>& matrix) {
    add({name,
         detail::element_type<Scalar>(),
         detail::shape_of(matrix),
         matrix.data(),
         static_cast<std::size_t>(matrix.size()) * sizeof(Scalar),
         {}});
  }
  template <class Scalar>
  void add(const std::string& name, Matrix<Scalar>&& matrix) = delete;  // would be gone by write()

  /// Adds whole numbers (I64), in one dimension. Throws as add() of a matrix does.
  void add(const std::string& name, IndexSpan numbers) {
    add({name,
         detail::element_type<Index>(),
         {numbers.size()},
         numbers.data(),
         numbers.size_bytes(),
         {}});
  }

  void add(const std::string& name, std::vector<Index>&& numbers) = delete;

  /// Adds a tensor of any shape, whose numbers make() returns, row-major, as a Matrix<Scalar> of any shape.
  /// write() calls make(), so that only one of these tensors at a time is in memory. Throws as add() of a
  /// matrix does, and write() throws std::invalid_argument if make() returns another number of values.
  template <class Scalar>
  void add_made(const std::string& name, std::vector<std::uint64_t> shape,
                std::function<Matrix<Scalar>()> make) {
    const auto [rows, columns] = detail::as_matrix(shape);
    const Index count = rows * columns;
    const std::size_t size = detail::to_size(count) * sizeof(Scalar);
    add({name, detail::element_type<Scalar>(), std::move(shape), nullptr, size,
         [name, count, make = std::move(make)](detail::AtomicFile& file) {
           const Matrix<Scalar> made = make();
           detail::require(made.size() == count, "SafetensorsWriter: ", detail::tensor_named(name),
                           " has ", count, " numbers, make() returned ", made.size(), " numbers");
           file.write(made.data(), detail::to_size(count) * sizeof(Scalar));
         }});
  }

  /// Adds a tensor of a type of the format, "BF16" for example, whose bytes make() returns. write() calls
  /// make(), and throws std::invalid_argument if the bytes are not as many as the shape needs.
  /// Throws as add() of a matrix does, and for a type that is not known or a shape that does not
  /// take a whole number of bytes.
  void add_made_bytes(const std::string& name, std::string_view type,
                      std::vector<std::uint64_t> shape,
                      std::function<std::vector<std::byte>()> make) {
    const std::size_t size = bytes_of(name, type, shape);
    add({name, type, std::move(shape), nullptr, size,
         [name, size, make = std::move(make)](detail::AtomicFile& file) {
           const std::vector<std::byte> made = make();
           detail::require(made.size() == size, "SafetensorsWriter: ", detail::tensor_named(name),
                           " takes ", size, " bytes, make() returned ", made.size(), " bytes");
           file.write(made.data(), size);
         }});
  }

  /// Adds bytes in memory (U8, in one dimension), padded with zeros to a multiple of 64. They begin at a
  /// multiple of 64 in the file, so that they can be used in place if the file is mapped. Throws as
  /// add() of a matrix does.
  void add_aligned_bytes(const std::string& name, std::span<const std::byte> bytes) {
    const std::size_t size = (bytes.size() + 63) / 64 * 64;
    add({name,
         "U8",
         {size},
         nullptr,
         size,
         [bytes, size](detail::AtomicFile& file) {
           constexpr std::byte zeros[64] = {};
           file.write(bytes.data(), bytes.size());
           file.write(zeros, size - bytes.size());
         },
         true});
  }

  /// Adds every parameter of a module by its name, after `prefix`, and as metadata the module's configuration,
  /// or those of its parts if it has none: a text for each field that has a name (moe/config_fields.hpp),
  /// "layer.config.gate.experts" = "64". Fields without a name are not stored. Throws
  /// std::invalid_argument if a name or a key was used before, a field is not finite, or a part of the module
  /// has narrow weights: they are no parameters, and the file would lack them.
  template <class Module>
  void add_module(const Module& module, const std::string& prefix = {}) {
    detail::check_no_narrow_weights(module);
    detail::SafetensorsMetadata configs;
    detail::for_each_config(module, prefix, [&](const std::string& keys, const auto& config) {
      detail::write_config(config, keys, configs);
    });
    for (const auto& entry : configs) {
      detail::require(!metadata_.contains(entry.first), "SafetensorsWriter: metadata \"",
                      detail::plain(entry.first), "\" is there already");
    }
    add_parameters(module, prefix);
    metadata_.merge(configs);
  }

  template <class Module>
  void add_module(const Module&& module, const std::string& prefix = {}) = delete;

  /// Adds every parameter of a module by its name, after `prefix`, without its configuration. Throws
  /// std::invalid_argument if a name was used before.
  template <class Module>
  void add_parameters(const Module& module, const std::string& prefix = {}) {
    for_each_parameter(module, [&](const ParameterName& name, const auto& parameter) {
      add(prefix + name.string(), parameter.value);
    });
  }

  template <class Module>
  void add_parameters(const Module&& module, const std::string& prefix = {}) = delete;

  /// Adds the whole state of an optimizer for a module by its names, after `prefix`; before the
  /// first update, zeros. Throws std::invalid_argument if a name was used before, or if the state
  /// belongs to another module.
  template <class Optimizer, class Module>
  void add_optimizer(Optimizer& optimizer, const Module& module, const std::string& prefix) {
    optimizer.for_each_state(
        module, [&](const std::string& name, auto&& state) { add(prefix + name, state); });
  }

  /// Sets the metadata of a key.
  void set_metadata(const std::string& key, const std::string& text) { metadata_[key] = text; }

  /// Writes a temporary file in the same folder, flushes it to the disk (on POSIX systems) and
  /// renames it: at any time the path has either the whole old file or the whole new one, and after
  /// an exception the old one. On POSIX systems the new file gets the permissions of the file it
  /// replaces, and its owner and group if the system permits that; without an old file, the
  /// permissions that the umask allows. Temporary files for this path that killed processes left
  /// are removed.
  ///
  /// Throws std::runtime_error, which says why, if the file cannot be written, or if the path is not a
  /// regular file but a directory, a device, a FIFO, a socket, or a symbolic link to one of these (other
  /// links are replaced, not followed); and std::invalid_argument for names or metadata that are not UTF-8,
  /// or a header of more than 100 MB.
  void write(const std::string& path) const {
    std::vector<const Entry*> order;
    for (const Entry& entry : entries_) order.push_back(&entry);
    const auto key = [](const Entry* entry) {
      return std::pair(entry->aligned, detail::element_bits(entry->type));
    };
    // Equal entries stay in the order of the vector. Not std::stable_sort: GCC 12's calls a
    // deprecated function, and clang 19 warns about it.
    std::sort(order.begin(), order.end(), [&](const Entry* a, const Entry* b) {
      return key(a) != key(b) ? key(a) > key(b) : a < b;
    });
    const std::string header = make_header(order);
    detail::require(header.size() <= detail::longest_header, "SafetensorsWriter: a header of ",
                    header.size(), " bytes, must be at most 100 MB");
    const std::uint64_t length = header.size();
    detail::AtomicFile file(path);
    file.write(&length, sizeof(length));
    file.write(header.data(), header.size());
    for (const Entry* entry : order) {
      if (entry->write_made) {
        entry->write_made(file);
      } else {
        file.write(entry->data, entry->size);
      }
    }
    file.commit();
  }

 private:
  struct Entry {
    std::string name;
    std::string_view type;
    std::vector<std::uint64_t> shape;
    const void* data;
    std::size_t size;
    std::function<void(detail::AtomicFile&)> write_made{};  ///< in place of data
    bool aligned = false;  ///< to 64 bytes; such entries come first
  };

  static std::size_t bytes_of(const std::string& name, std::string_view type,
                              const std::vector<std::uint64_t>& shape) {
    const std::uint64_t element = detail::element_bits(type);
    detail::require(element > 0, "SafetensorsWriter: ", detail::tensor_named(name), ": type ",
                    detail::plain(type), " is not known");
    const auto bits = detail::tensor_bits(shape, element);
    detail::require(bits.has_value() && *bits % 8 == 0,
                    "SafetensorsWriter: ", detail::tensor_named(name), ": shape ",
                    detail::to_string(shape), " of ", type,
                    " does not take a whole number of bytes");
    return *bits / 8;
  }

  void add(Entry entry) {
    detail::require(entry.name != "__metadata__",
                    "SafetensorsWriter: ", detail::tensor_named(entry.name),
                    " has a name that the format reserves");
    detail::require(!names_.contains(entry.name),
                    "SafetensorsWriter: ", detail::tensor_named(entry.name), " is there already");
    entries_.push_back(std::move(entry));
    try {
      names_.insert(entries_.back().name);
    } catch (...) {
      entries_.pop_back();
      throw;
    }
  }

  std::string make_header(const std::vector<const Entry*>& order) const {
    std::string text = "{";
    if (!metadata_.empty()) {
      text += quoted_json("__metadata__") + ":{";
      for (const auto& [key, value] : metadata_) {
        if (text.back() != '{') text += ',';
        text += quoted_json(key) + ':' + quoted_json(value);
      }
      text += '}';
    }
    std::size_t offset = 0;
    for (const Entry* entry : order) {
      if (text.size() > 1) text += ',';
      text += quoted_json(entry->name) + ":{\"dtype\":\"" + std::string(entry->type) +
              "\",\"shape\":" + detail::to_string(entry->shape) +
              ",\"data_offsets\":" + detail::to_string({offset, offset + entry->size}) + '}';
      offset += entry->size;
    }
    text += '}';
    // Spaces, so that the tensors are aligned if the file is mapped. The header's length comes before it.
    const std::size_t alignment = !order.empty() && order.front()->aligned ? 64 : 8;
    text.append((alignment - (sizeof(std::uint64_t) + text.size()) % alignment) % alignment, ' ');
    return text;
  }

  static std::string quoted_json(const std::string& text) {
    try {
      return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception& error) {
      detail::fail("SafetensorsWriter: ", error.what());
    }
  }

  std::vector<Entry> entries_;
  std::set<std::string> names_;
  detail::SafetensorsMetadata metadata_;
};

}  // namespace moe
