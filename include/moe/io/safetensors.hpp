#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/parameter.hpp"

#if defined(__unix__) || defined(__APPLE__)
#define MOE_HAS_POSIX_FILES 1
#include <fcntl.h>
#include <unistd.h>
#else
#define MOE_HAS_POSIX_FILES 0
#include <filesystem>
#endif

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

namespace detail {

/// Puts a file's trouble into words: "moe: model.safetensors: ...".
template <class... Parts>
[[noreturn]] void fail_file(const std::string& path, const Parts&... parts) {
  std::string text = "moe: " + path + ": ";
  (Part(parts).append_to(text), ...);
  throw std::runtime_error(text);
}
template <class... Parts>
void require_file(bool condition, const std::string& path, const Parts&... parts) {
  if (!condition) fail_file(path, parts...);
}

/// A tensor's name in a message: quoted, and not longer than a line, whatever a file says.
inline std::string quoted(std::string_view name) {
  constexpr std::size_t most = 120;
  std::string text = "tensor \"";
  for (const char c : name.substr(0, most)) {
    text += static_cast<unsigned char>(c) < 0x20 || c == 0x7F ? '?' : c;
  }
  return text + (name.size() > most ? "...\"" : "\"");
}

/// The types of the format, and their sizes in bytes.
inline std::size_t element_size(std::string_view type) {
  static constexpr std::array<std::pair<std::string_view, std::size_t>, 15> types{
      {{"F64", 8}, {"F32", 4}, {"F16", 2}, {"BF16", 2}, {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I64", 8},
       {"I32", 4}, {"I16", 2}, {"I8", 1}, {"U64", 8}, {"U32", 4}, {"U16", 2}, {"U8", 1},
       {"BOOL", 1}}};
  for (const auto& [name, size] : types) {
    if (name == type) return size;
  }
  return 0;
}

template <class Element>
constexpr std::string_view element_type() {
  if constexpr (std::is_same_v<Element, float>) return "F32";
  if constexpr (std::is_same_v<Element, double>) return "F64";
  if constexpr (std::is_same_v<Element, Index>) return "I64";
}

inline std::string to_string(const std::vector<std::uint64_t>& shape) {
  std::string text = "[";
  for (const std::uint64_t size : shape) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

/// The shape of a parameter in a file: that of its matrix, 1 x N for a bias.
template <class Scalar>
std::vector<std::uint64_t> shape_of(const Matrix<Scalar>& matrix) {
  return {static_cast<std::uint64_t>(matrix.rows()), static_cast<std::uint64_t>(matrix.cols())};
}

/// A file that appears under its name whole or not at all: it is written beside it, flushed to the
/// disk and then renamed. If anything fails it is removed, and what had the name before is untouched.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path) : path_(std::move(path)) {
#if MOE_HAS_POSIX_FILES
    for (int attempt = 0; file_ == nullptr; ++attempt) {
      temporary_ = path_ + ".part" + std::to_string(::getpid()) + "-" + std::to_string(attempt);
      const int descriptor = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor >= 0) {
        file_ = ::fdopen(descriptor, "wb");
      } else if (errno != EEXIST || attempt == 1000) {
        fail_file(path_, "cannot be written: ", std::string_view(std::strerror(errno)));
      }
    }
#else
    temporary_ = path_ + ".part";
    file_ = std::fopen(temporary_.c_str(), "wb");
    require_file(file_ != nullptr, path_, std::string_view("cannot be written"));
#endif
  }
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile() {
    if (file_ != nullptr) std::fclose(file_);
    if (!temporary_.empty()) std::remove(temporary_.c_str());
  }

  void write(const void* data, std::size_t size) {
    check(size == 0 || std::fwrite(data, 1, size, file_) == size);
  }

  void commit() {
    check(std::fflush(file_) == 0);
#if MOE_HAS_POSIX_FILES
    check(::fsync(::fileno(file_)) == 0);
#endif
    const int closed = std::fclose(std::exchange(file_, nullptr));
    check(closed == 0);
#if MOE_HAS_POSIX_FILES
    check(std::rename(temporary_.c_str(), path_.c_str()) == 0);
    temporary_.clear();
    // The new name outlives a power failure only when its folder is on the disk too. Not every file
    // system lets folders be flushed, and the file is whole either way.
    const std::size_t slash = path_.rfind('/');
    const std::string folder =
        slash == std::string::npos ? "." : slash == 0 ? "/" : path_.substr(0, slash);
    if (const int descriptor = ::open(folder.c_str(), O_RDONLY | O_CLOEXEC); descriptor >= 0) {
      ::fsync(descriptor);
      ::close(descriptor);
    }
#else
    std::error_code error;
    std::filesystem::rename(temporary_, path_, error);
    require_file(!error, path_, "cannot be written: ", std::string_view(error.message()));
    temporary_.clear();
#endif
  }

 private:
  void check(bool succeeded) {
    require_file(succeeded, path_, "cannot be written: ", std::string_view(std::strerror(errno)));
  }

  std::string path_;
  std::string temporary_;
  std::FILE* file_ = nullptr;
};

}  // namespace detail

/// Collects tensors and writes them to a file.
///
///     moe::SafetensorsWriter writer;
///     writer.add_parameters(model);
///     writer.set_metadata("step", "1000");
///     writer.write("model.safetensors");
///
/// Tensors are not copied: they must live and stay unchanged until write().
class SafetensorsWriter {
 public:
  /// A matrix of float (F32) or double (F64). Throws std::invalid_argument if the name is taken or
  /// is "__metadata__", which the format keeps for itself.
  template <class Scalar>
  void add(const std::string& name, const Matrix<Scalar>& matrix) {
    add(name, detail::element_type<Scalar>(), detail::shape_of(matrix), matrix.data(),
        static_cast<std::size_t>(matrix.size()) * sizeof(Scalar));
  }
  /// Whole numbers (I64), in one dimension.
  void add(const std::string& name, std::span<const Index> numbers) {
    add(name, detail::element_type<Index>(), {numbers.size()}, numbers.data(),
        numbers.size_bytes());
  }

  /// Every parameter of a module by its name, after `prefix`.
  template <class Module>
  void add_parameters(const Module& module, const std::string& prefix = {}) {
    for_each_parameter(module, [&](const ParameterName& name, const auto& parameter) {
      add(prefix + name.string(), parameter.value);
    });
  }

  void set_metadata(const std::string& key, const std::string& text) { metadata_[key] = text; }

  /// Writes the file beside its place, flushes it and renames it: whatever happens, there is either
  /// the whole new file or the old one. Throws std::runtime_error if it cannot be written, and
  /// std::invalid_argument for names or metadata that are no UTF-8.
  void write(const std::string& path) const {
    const std::string header = make_header();
    const auto length = static_cast<std::uint64_t>(header.size());
    detail::AtomicFile file(path);
    file.write(&length, sizeof(length));
    file.write(header.data(), header.size());
    for (const Entry& entry : entries_) file.write(entry.data, entry.size);
    file.commit();
  }

 private:
  struct Entry {
    std::string name;
    std::string_view type;
    std::vector<std::uint64_t> shape;
    const void* data;
    std::size_t size;
  };

  void add(const std::string& name, std::string_view type, std::vector<std::uint64_t> shape,
           const void* data, std::size_t size) {
    detail::require(name != "__metadata__" && names_.insert(name).second,
                    "SafetensorsWriter: ", detail::quoted(name), " is there already");
    entries_.push_back({name, type, std::move(shape), data, size});
  }

  std::string make_header() const {
    nlohmann::ordered_json header = nlohmann::ordered_json::object();
    if (!metadata_.empty()) header["__metadata__"] = metadata_;
    std::size_t offset = 0;
    for (const Entry& entry : entries_) {
      header[entry.name] = {{"dtype", entry.type},
                            {"shape", entry.shape},
                            {"data_offsets", {offset, offset + entry.size}}};
      offset += entry.size;
    }
    std::string text;
    try {
      text = header.dump();
    } catch (const nlohmann::json::exception& error) {
      detail::require(false, "SafetensorsWriter: ", std::string_view(error.what()));
    }
    // Spaces, so that the tensors start where a file mapped into memory may be read as numbers.
    text.append((8 - text.size() % 8) % 8, ' ');
    return text;
  }

  std::vector<Entry> entries_;
  std::set<std::string> names_;
  std::map<std::string, std::string> metadata_;
};

/// A file that was read and found to be in order.
///
///     const moe::SafetensorsFile file("model.safetensors");
///     file.read_parameters(model);
///
/// Nothing in the file is believed: the header must be valid JSON of at most 100 MB without a name
/// twice, every type known, every shape in agreement with its offsets, and the tensors must cover the
/// rest of the file exactly, without overlap or hole. Else the constructor throws
/// std::runtime_error, which names the file and, where one is to blame, the tensor.
class SafetensorsFile {
 public:
  struct Tensor {
    std::string type;
    std::vector<std::uint64_t> shape;
    std::uint64_t begin = 0;  ///< in data
    std::uint64_t end = 0;
  };

  static constexpr std::uint64_t longest_header = 100'000'000;

  /// Reads the whole file.
  explicit SafetensorsFile(std::string path) : path_(std::move(path)) {
    std::ifstream file(path_, std::ios::binary | std::ios::ate);
    require(file.is_open(), "cannot be read");
    const auto size = static_cast<std::int64_t>(file.tellg());
    require(file.good() && size >= 8, "is no safetensors file: it has ",
            std::max<std::int64_t>(0, size), " bytes, the length of the header alone takes 8");
    file.seekg(0);
    std::uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), sizeof(length));
    const auto rest = static_cast<std::uint64_t>(size) - 8;
    require(length <= longest_header, "says that its header has ", length,
            " bytes, more than any has");
    require(length <= rest, "says that its header has ", length, " bytes, but only ", rest,
            " follow");
    std::string header(length, '\0');
    file.read(header.data(), static_cast<std::streamsize>(length));
    require(file.good(), "cannot be read");
    parse(header);
    check_offsets(rest - length);
    data_.resize(rest - length);
    file.read(data_.data(), static_cast<std::streamsize>(data_.size()));
    require(file.good() || data_.empty(), "cannot be read");
  }

  const std::string& path() const { return path_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// Throws std::runtime_error if there is none of that key.
  const std::string& metadata(const std::string& key) const {
    const auto found = metadata_.find(key);
    require(found != metadata_.end(), "has no metadata \"", std::string_view(key), "\"");
    return found->second;
  }

  /// Throws std::runtime_error naming the tensor unless it is there, with this type and shape.
  template <class Scalar>
  void check(const std::string& name, const Matrix<Scalar>& matrix) const {
    find(name, detail::element_type<Scalar>(), detail::shape_of(matrix));
  }

  /// Overwrites a matrix, whose shape must be the tensor's; throws like check().
  template <class Scalar>
  void read(const std::string& name, Matrix<Scalar>& matrix) const {
    copy(find(name, detail::element_type<Scalar>(), detail::shape_of(matrix)), matrix.data());
  }
  /// Overwrites whole numbers, as many as the tensor has.
  void read(const std::string& name, std::span<Index> numbers) const {
    copy(find(name, detail::element_type<Index>(), {numbers.size()}), numbers.data());
  }

  /// Overwrites every parameter of a module by the tensor of its name, after `prefix`. All are looked
  /// up first, so if one is missing or of another type or shape, std::runtime_error names it and the
  /// module is what it was. Tensors that the module has no use for are left alone; gradients too.
  template <class Module>
  void read_parameters(Module& module, const std::string& prefix = {}) const {
    detail::walk_parameters(module, [&](const ParameterName& name, const auto& parameter) {
      check(prefix + name.string(), parameter.value);
    });
    detail::walk_parameters(module, [&](const ParameterName& name, auto& parameter) {
      read(prefix + name.string(), parameter.value);
    });
  }

 private:
  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    if (!condition) detail::fail_file(path_, std::string_view(as_text(parts))...);
  }
  static std::string as_text(std::string_view text) { return std::string(text); }
  template <class Number>
  requires std::is_integral_v<Number>
  static std::string as_text(Number number) { return std::to_string(number); }

  void parse(const std::string& header) {
    using nlohmann::json;
    // Of a name that is there twice the parser would keep one and be silent.
    std::vector<std::set<std::string>> names;
    std::string twice;
    json parsed;
    require(!header.empty() && header.front() == '{', "has a header that does not begin with {");
    try {
      parsed = json::parse(header, [&](int, json::parse_event_t event, json& value) {
        if (event == json::parse_event_t::object_start) names.emplace_back();
        if (event == json::parse_event_t::object_end) names.pop_back();
        if (event == json::parse_event_t::key && !names.back().insert(value).second) {
          twice = value;
        }
        return true;
      });
    } catch (const json::exception& error) {
      require(false, "has a header that is no JSON: ", std::string_view(error.what()));
    }
    require(twice.empty(), "has ", detail::quoted(twice), " twice");
    for (const auto& [name, value] : parsed.items()) {
      if (name == "__metadata__") {
        require(value.is_object(), "has metadata that is no object");
        for (const auto& [key, text] : value.items()) {
          require(text.is_string(), "has metadata \"", std::string_view(key), "\" that is no text");
          metadata_.emplace(key, text.template get<std::string>());
        }
      } else {
        tensors_.emplace(name, parse_tensor(detail::quoted(name), value));
      }
    }
  }

  Tensor parse_tensor(const std::string& name, const nlohmann::json& value) const {
    require(value.is_object(), name, " is no object");
    require(value.size() == 3 && value.contains("dtype") && value.contains("shape") &&
                value.contains("data_offsets"),
            name, " must have dtype, shape and data_offsets, and nothing else");
    Tensor tensor;
    require(value["dtype"].is_string(), name, ": dtype is no text");
    tensor.type = value["dtype"].get<std::string>();
    const std::size_t element = detail::element_size(tensor.type);
    require(element > 0, name, ": unknown dtype ", detail::quoted(tensor.type).substr(7));
    tensor.shape = whole_numbers(name, "shape", value["shape"]);
    const auto offsets = whole_numbers(name, "data_offsets", value["data_offsets"]);
    require(offsets.size() == 2, name, ": data_offsets has ", offsets.size(), " numbers, not 2");
    tensor.begin = offsets[0];
    tensor.end = offsets[1];
    require(tensor.begin <= tensor.end, name, ": data_offsets descends from ", tensor.begin, " to ",
            tensor.end);
    // A zero empties the tensor, whatever the other numbers are.
    std::uint64_t bytes = element;
    const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0u) != tensor.shape.end();
    for (const std::uint64_t size : tensor.shape) {
      require(empty || bytes <= UINT64_MAX / size, name, ": shape ",
              detail::to_string(tensor.shape), " has more bytes than can be counted");
      bytes *= size;
    }
    if (empty) bytes = 0;
    require(tensor.end - tensor.begin == bytes, name, ": shape ", detail::to_string(tensor.shape),
            " of ", tensor.type, " takes ", bytes, " bytes, data_offsets gives ",
            tensor.end - tensor.begin);
    return tensor;
  }

  std::vector<std::uint64_t> whole_numbers(const std::string& name, const char* field,
                                           const nlohmann::json& value) const {
    require(value.is_array(), name, ": ", field, " is no list");
    std::vector<std::uint64_t> numbers;
    for (const nlohmann::json& number : value) {
      require(number.is_number_unsigned(), name, ": ", field, " has ", number.dump().substr(0, 40),
              ", which is no whole number that is at least 0");
      numbers.push_back(number.get<std::uint64_t>());
    }
    return numbers;
  }

  /// The tensors in the order of their place must follow each other and end with the file.
  void check_offsets(std::uint64_t size) const {
    std::vector<std::pair<const std::string*, const Tensor*>> order;
    for (const auto& [name, tensor] : tensors_) order.emplace_back(&name, &tensor);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
    });
    std::uint64_t end = 0;
    for (const auto& [name, tensor] : order) {
      require(tensor->begin >= end, detail::quoted(*name), " begins at byte ", tensor->begin,
              ", within another that ends at ", end);
      require(tensor->begin <= end, detail::quoted(*name), " begins at byte ", tensor->begin,
              ", after a hole from ", end);
      require(tensor->end <= size, detail::quoted(*name), " ends at byte ", tensor->end,
              " of data, the file has ", size);
      end = tensor->end;
    }
    require(end == size, "has ", size, " bytes of data, its tensors end at ", end);
  }

  const Tensor& find(const std::string& name, std::string_view type,
                     const std::vector<std::uint64_t>& shape) const {
    const auto found = tensors_.find(name);
    require(found != tensors_.end(), "has no ", detail::quoted(name));
    const Tensor& tensor = found->second;
    require(tensor.type == type, detail::quoted(name), " is ", tensor.type, ", needed is ", type);
    require(tensor.shape == shape, detail::quoted(name), " has shape ",
            detail::to_string(tensor.shape), ", needed is ", detail::to_string(shape));
    return tensor;
  }

  void copy(const Tensor& tensor, void* to) const {
    if (tensor.end > tensor.begin) {
      std::memcpy(to, data_.data() + tensor.begin, tensor.end - tensor.begin);
    }
  }

  std::string path_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::vector<char> data_;
};

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
