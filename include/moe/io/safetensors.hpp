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

/// What a file says, as part of a message: not longer than a line, in ASCII without controls.
inline std::string plain(std::string_view said) {
  constexpr std::size_t most = 120;
  std::string text;
  for (const char c : said.substr(0, most)) {
    text += c >= 0x20 && c < 0x7F ? c : '?';
  }
  return said.size() > most ? text + "..." : text;
}
inline std::string tensor_named(std::string_view name) { return "tensor \"" + plain(name) + '"'; }

/// The types of the format, and their sizes in bytes.
inline std::size_t element_size(std::string_view type) {
  static constexpr std::array<std::pair<std::string_view, std::size_t>, 15> types{{{"F64", 8},
                                                                                   {"F32", 4},
                                                                                   {"F16", 2},
                                                                                   {"BF16", 2},
                                                                                   {"F8_E4M3", 1},
                                                                                   {"F8_E5M2", 1},
                                                                                   {"I64", 8},
                                                                                   {"I32", 4},
                                                                                   {"I16", 2},
                                                                                   {"I8", 1},
                                                                                   {"U64", 8},
                                                                                   {"U32", 4},
                                                                                   {"U16", 2},
                                                                                   {"U8", 1},
                                                                                   {"BOOL", 1}}};
  for (const auto& [name, size] : types) {
    if (name == type) return size;
  }
  return 0;
}

template <class Element>
constexpr std::string_view element_type() {
  static_assert(std::is_same_v<Element, float> || std::is_same_v<Element, double> ||
                std::is_same_v<Element, Index>);
  if constexpr (std::is_same_v<Element, float>) return "F32";
  if constexpr (std::is_same_v<Element, double>) return "F64";
  if constexpr (std::is_same_v<Element, Index>) return "I64";
}

/// "[2,3]"
inline std::string to_string(const std::vector<std::uint64_t>& numbers) {
  std::string text = "[";
  for (const std::uint64_t number : numbers) {
    text += (text.size() > 1 ? "," : "") + std::to_string(number);
  }
  return text + "]";
}

/// The shape of a parameter in a file: that of its matrix, 1 x N for a bias.
template <class Scalar>
std::vector<std::uint64_t> shape_of(const Matrix<Scalar>& matrix) {
  return {static_cast<std::uint64_t>(matrix.rows()), static_cast<std::uint64_t>(matrix.cols())};
}

/// A file that appears under its name whole or not at all: it is written beside it, flushed to the
/// disk and then renamed. If anything fails it is removed, and what had the name before is
/// untouched. A symbolic link of that name is replaced, not followed.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path) : path_(std::move(path)) {
#if MOE_HAS_POSIX_FILES
    for (int attempt = 0;; ++attempt) {
      temporary_ = path_ + ".part" + std::to_string(::getpid()) + "-" + std::to_string(attempt);
      const int descriptor =
          ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (descriptor >= 0) {
        file_ = ::fdopen(descriptor, "wb");
        if (file_ != nullptr) break;
        const int error = errno;
        ::close(descriptor);
        std::remove(temporary_.c_str());
        fail_file(path_, "cannot be written: ", std::string_view(std::strerror(error)));
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
    const std::string folder = slash == std::string::npos ? "."
                               : slash == 0               ? "/"
                                                          : path_.substr(0, slash);
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

inline constexpr std::uint64_t longest_header = 100'000'000;

/// What a header says of one tensor.
struct SafetensorsEntry {
  std::string type;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  ///< in the data
  std::uint64_t end = 0;
};

/// Takes a header in as its JSON is parsed, so nothing is kept that does not belong there, however
/// long or deep it is. Anything out of order throws std::runtime_error.
class SafetensorsHeader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit SafetensorsHeader(const std::string& path) : path_(path) {}

  std::map<std::string, SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top) {
      place_ = name_ == "__metadata__" ? Place::metadata : Place::tensor;
      keys_.clear();
      offsets_.clear();
    } else {
      refuse("an object");
    }
    return true;
  }

  bool key(std::string& key) override {
    if (place_ == Place::top) {
      require_file(names_.insert(key).second, path_, "has ", tensor_named(key), " twice");
      name_ = key;
    } else {
      require_file(keys_.insert(key).second, path_, "has ", this_tensor(), " with \"", plain(key),
                   "\" twice");
      require_file(
          place_ == Place::metadata || key == "dtype" || key == "shape" || key == "data_offsets",
          path_, this_tensor(), needs);
      key_ = key;
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::tensor) finish_tensor();
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::tensor || key_ == "dtype") refuse("a list");
    place_ = Place::list;
    return true;
  }
  bool end_array() override {
    place_ = Place::tensor;
    return true;
  }

  bool string(std::string& text) override {
    if (place_ == Place::metadata) {
      metadata.emplace(key_, text);
    } else if (place_ == Place::tensor && key_ == "dtype") {
      entry_.type = text;
      require_file(element_size(text) > 0, path_, this_tensor(), ": unknown dtype \"", plain(text),
                   "\"");
    } else {
      refuse("a text");
    }
    return true;
  }

  bool number_unsigned(std::uint64_t number) override {
    if (place_ != Place::list) refuse(std::to_string(number));
    std::vector<std::uint64_t>& numbers = key_ == "shape" ? entry_.shape : offsets_;
    // A tensor of more dimensions than that is a waste of memory, not a tensor.
    require_file(numbers.size() < 64, path_, this_tensor(), ": ", key_,
                 " has more than 64 numbers");
    numbers.push_back(number);
    return true;
  }

  bool number_integer(std::int64_t number) override { return refuse(std::to_string(number)); }
  bool number_float(double, const std::string& text) override { return refuse(plain(text)); }
  bool boolean(bool) override { return refuse("a truth value"); }
  bool null() override { return refuse("null"); }
  bool binary(nlohmann::json::binary_t&) override { return refuse("bytes"); }

  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::json::exception& error) override {
    fail_file(path_, "has a header that is no JSON: ", plain(error.what()));
  }

 private:
  enum class Place { outside, top, metadata, tensor, list };
  static constexpr std::string_view needs =
      " must have dtype, shape and data_offsets, and nothing else";

  /// Something stands where it does not belong.
  bool refuse(std::string_view what) const {
    if (place_ == Place::top) {
      if (name_ == "__metadata__") fail_file(path_, "has metadata that is no object");
      fail_file(path_, this_tensor(), " is no object");
    }
    if (place_ == Place::metadata) {
      fail_file(path_, "has metadata \"", plain(key_), "\" that is no text");
    }
    if (place_ == Place::list) {
      fail_file(path_, this_tensor(), ": ", key_, " has ", what,
                ", which is no whole number that is at least 0");
    }
    fail_file(path_, this_tensor(), ": ", key_,
              key_ == "dtype" ? std::string_view(" is no text") : std::string_view(" is no list"));
  }

  void finish_tensor() {
    const std::string name = this_tensor();
    require_file(keys_.size() == 3, path_, name, needs);
    require_file(offsets_.size() == 2, path_, name, ": data_offsets has ", offsets_.size(),
                 " numbers, not 2");
    entry_.begin = offsets_[0];
    entry_.end = offsets_[1];
    require_file(entry_.begin <= entry_.end, path_, name, ": data_offsets descends from ",
                 entry_.begin, " to ", entry_.end);
    // A zero empties the tensor, whatever the other numbers are.
    const bool empty =
        std::find(entry_.shape.begin(), entry_.shape.end(), 0u) != entry_.shape.end();
    std::uint64_t bytes = empty ? 0 : element_size(entry_.type);
    for (const std::uint64_t size : entry_.shape) {
      require_file(empty || bytes <= UINT64_MAX / size, path_, name, ": shape ",
                   detail::to_string(entry_.shape), " has more bytes than can be counted");
      bytes *= size;
    }
    require_file(entry_.end - entry_.begin == bytes, path_, name, ": shape ",
                 detail::to_string(entry_.shape), " of ", entry_.type, " takes ", bytes,
                 " bytes, data_offsets gives ", entry_.end - entry_.begin);
    tensors.emplace(name_, std::exchange(entry_, {}));
  }

  std::string this_tensor() const { return tensor_named(name_); }

  const std::string& path_;
  Place place_ = Place::outside;
  std::string name_;                    // of the tensor
  std::string key_;                     // within it or the metadata
  std::set<std::string> names_, keys_;  // seen so far: of a name that is there twice none is right
  SafetensorsEntry entry_;
  std::vector<std::uint64_t> offsets_;
};

}  // namespace detail

/// Collects tensors and writes them to a file.
///
///     moe::SafetensorsWriter writer;
///     writer.add_parameters(model);
///     writer.set_metadata("step", "1000");
///     writer.write("model.safetensors");
///
/// Tensors are not copied: they must live and stay unchanged until write(). In the file those of
/// larger elements come first, so that each is aligned.
class SafetensorsWriter {
 public:
  /// A matrix of float (F32) or double (F64). Throws std::invalid_argument if the name is taken or
  /// is "__metadata__", which the format keeps for itself.
  template <class Scalar>
  void add(const std::string& name, const Matrix<Scalar>& matrix) {
    add(name, detail::element_type<Scalar>(), detail::shape_of(matrix), matrix.data(),
        static_cast<std::size_t>(matrix.size()) * sizeof(Scalar));
  }
  template <class Scalar>
  void add(const std::string& name, Matrix<Scalar>&& matrix) = delete;  // would be gone by write()

  /// Whole numbers (I64), in one dimension.
  void add(const std::string& name, std::span<const Index> numbers) {
    add(name, detail::element_type<Index>(), {numbers.size()}, numbers.data(),
        numbers.size_bytes());
  }

  void add(const std::string& name, std::vector<Index>&& numbers) = delete;

  /// Every parameter of a module by its name, after `prefix`.
  template <class Module>
  void add_parameters(const Module& module, const std::string& prefix = {}) {
    for_each_parameter(module, [&](const ParameterName& name, const auto& parameter) {
      add(prefix + name.string(), parameter.value);
    });
  }

  template <class Module>
  void add_parameters(const Module&& module, const std::string& prefix = {}) = delete;

  void set_metadata(const std::string& key, const std::string& text) { metadata_[key] = text; }

  /// Writes the file beside its place, flushes it and renames it: whatever happens, there is either
  /// the whole new file or the old one. Throws std::runtime_error if it cannot be written, and
  /// std::invalid_argument for names or metadata that are no UTF-8.
  void write(const std::string& path) const {
    std::vector<const Entry*> order;
    for (const Entry& entry : entries_) order.push_back(&entry);
    std::stable_sort(order.begin(), order.end(), [](const Entry* a, const Entry* b) {
      return detail::element_size(a->type) > detail::element_size(b->type);
    });
    const std::string header = make_header(order);
    detail::require(header.size() <= detail::longest_header, "SafetensorsWriter: a header of ",
                    header.size(), " bytes, more than a file may have");
    const std::uint64_t length = header.size();
    detail::AtomicFile file(path);
    file.write(&length, sizeof(length));
    file.write(header.data(), header.size());
    for (const Entry* entry : order) file.write(entry->data, entry->size);
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
                    "SafetensorsWriter: ", detail::tensor_named(name), " is there already");
    entries_.push_back({name, type, std::move(shape), data, size});
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
    // Spaces, so that the tensors start where a file mapped into memory may be read as numbers.
    text.append((8 - text.size() % 8) % 8, ' ');
    return text;
  }

  static std::string quoted_json(const std::string& text) {
    try {
      return nlohmann::json(text).dump();
    } catch (const nlohmann::json::exception& error) {
      detail::fail({detail::Part("SafetensorsWriter: "), detail::Part(error.what())});
    }
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
/// Nothing in the file is believed: the header must be valid JSON of at most 100 MB without a key
/// twice, every type known, every shape in agreement with its offsets, and the tensors must cover
/// the rest of the file exactly, without overlap or hole. Else the constructor throws
/// std::runtime_error, which names the file and, where one is to blame, the tensor.
class SafetensorsFile {
 public:
  using Tensor = detail::SafetensorsEntry;

  /// Reads the header; a tensor is read when it is asked for.
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
    require(length <= detail::longest_header, "says that its header has ", length,
            " bytes, more than any has");
    require(length <= rest, "says that its header has ", length, " bytes, but only ", rest,
            " follow");
    std::string header(length, '\0');
    file.read(header.data(), static_cast<std::streamsize>(length));
    require(file.good(), "cannot be read");
    require(!header.empty() && header.front() == '{', "has a header that does not begin with {");
    detail::SafetensorsHeader parsed(path_);
    nlohmann::json::sax_parse(header, &parsed);
    tensors_ = std::move(parsed.tensors);
    metadata_ = std::move(parsed.metadata);
    check_offsets(rest - length);
    data_begin_ = 8 + length;
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
  void check(const std::string& name, std::span<const Index> numbers) const {
    find(name, detail::element_type<Index>(), {numbers.size()});
  }

  /// Overwrites a matrix, whose shape must be the tensor's. Throws like check(), and when the file
  /// cannot be read any more, the matrix being what it was.
  template <class Scalar>
  void read(const std::string& name, Matrix<Scalar>& matrix) const {
    check(name, matrix);
    Matrix<Scalar> read(matrix.rows(), matrix.cols());
    copy(tensors_.at(name), read.data());
    matrix = std::move(read);
  }
  /// Overwrites whole numbers, as many as the tensor has; throws likewise.
  void read(const std::string& name, std::span<Index> numbers) const {
    check(name, numbers);
    std::vector<Index> read(numbers.size());
    copy(tensors_.at(name), read.data());
    std::copy(read.begin(), read.end(), numbers.begin());
  }

  /// Overwrites every parameter of a module by the tensor of its name, after `prefix`. All are read
  /// first, so if one is missing or of another type or shape, or the file cannot be read any more,
  /// std::runtime_error names it and the module is what it was. Tensors that the module has no use
  /// for are left alone; gradients too.
  template <class Module>
  void read_parameters(Module& module, const std::string& prefix = {}) const {
    detail::walk_parameters(module, [&](const ParameterName& name, const auto& parameter) {
      check(prefix + name.string(), parameter.value);
    });
    std::vector<Matrix<float>> floats;  // a module may have parameters of both types
    std::vector<Matrix<double>> doubles;
    const auto of_type = [&]<class Scalar>(const Parameter<Scalar>&) -> auto& {
      if constexpr (std::is_same_v<Scalar, float>) {
        return floats;
      } else {
        return doubles;
      }
    };
    detail::walk_parameters(module, [&](const ParameterName& name, const auto& parameter) {
      auto& value = of_type(parameter).emplace_back(parameter.value.rows(), parameter.value.cols());
      copy(tensors_.at(prefix + name.string()), value.data());
    });
    auto next_float = floats.begin();
    auto next_double = doubles.begin();
    detail::walk_parameters(module, [&]<class Scalar>(const ParameterName&, Parameter<Scalar>& p) {
      if constexpr (std::is_same_v<Scalar, float>) {
        p.value = std::move(*next_float++);
      } else {
        p.value = std::move(*next_double++);
      }
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

  /// The tensors in the order of their place must follow each other and end with the file.
  void check_offsets(std::uint64_t size) const {
    std::vector<std::pair<const std::string*, const Tensor*>> order;
    for (const auto& [name, tensor] : tensors_) order.emplace_back(&name, &tensor);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
    });
    std::uint64_t end = 0;
    for (const auto& [name, tensor] : order) {
      require(tensor->begin >= end, detail::tensor_named(*name), " begins at byte ", tensor->begin,
              ", within another that ends at ", end);
      require(tensor->begin <= end, detail::tensor_named(*name), " begins at byte ", tensor->begin,
              ", after a hole from ", end);
      require(tensor->end <= size, detail::tensor_named(*name), " ends at byte ", tensor->end,
              " of data, the file has ", size);
      end = tensor->end;
    }
    require(end == size, "has ", size, " bytes of data, its tensors end at ", end);
  }

  const Tensor& find(const std::string& name, std::string_view type,
                     const std::vector<std::uint64_t>& shape) const {
    const auto found = tensors_.find(name);
    require(found != tensors_.end(), "has no ", detail::tensor_named(name));
    const Tensor& tensor = found->second;
    require(tensor.type == type, detail::tensor_named(name), " is ", tensor.type, ", needed is ",
            type);
    require(tensor.shape == shape, detail::tensor_named(name), " has shape ",
            detail::to_string(tensor.shape), ", needed is ", detail::to_string(shape));
    return tensor;
  }

  void copy(const Tensor& tensor, void* to) const {
    if (tensor.end == tensor.begin) return;
    std::ifstream file(path_, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(data_begin_ + tensor.begin));
    file.read(static_cast<char*>(to), static_cast<std::streamsize>(tensor.end - tensor.begin));
    require(file.good(), "cannot be read any more");
  }

  std::string path_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::uint64_t data_begin_ = 0;
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
