#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/io/safetensors/config.hpp"
#include "moe/io/safetensors/entry.hpp"
#include "moe/io/safetensors/header.hpp"
#include "moe/io/safetensors/input_file.hpp"
#include "moe/io/safetensors/mapped_matrix.hpp"
#include "moe/io/safetensors/widen.hpp"
#include "moe/parameter.hpp"

namespace moe {

/// A safetensors file, opened and checked.
///
///     const moe::SafetensorsFile file("model.safetensors");
///     file.read_parameters(model);
///
/// The constructor checks everything: the header must be valid JSON of at most 100 MB, every shape must
/// agree with its offsets, and the tensors must cover the rest of the file exactly, without overlap or
/// hole. Otherwise it throws std::runtime_error, which names the file and, if one is the cause, the
/// tensor.
///
/// It accepts the files that the Python package safetensors 0.8 accepts, with these differences. A
/// file with a type that is not known is refused by the package; here only read_bytes() can read
/// that tensor, and its size is given by its offsets. Only the Python package accepts: white space
/// before the header's {, a tensor or metadata key that occurs twice, a tensor as a list or a type
/// as an object (which is not in the format), and more than 64 dimensions. Only this class accepts:
/// sizes whose product overflows before a size of zero, and unknown values nested deeper than 127.
///
/// The file is opened once. If the file at its path is replaced, as SafetensorsWriter does, tensors are
/// still read from the file that was opened. If a file is written over in place, reading gives the new
/// bytes, and throws if the file has become shorter. Copies share the open file, which is closed with the
/// last of them; const members may be called by several threads at once.
class SafetensorsFile {
 public:
  using Tensor = detail::SafetensorsEntry;  ///< type, shape and offsets

  /// Opens the file and reads its header, but no tensor. Throws std::runtime_error, which says why, if the
  /// path cannot be opened or is not a regular file (a FIFO is refused at once), or if the header is not
  /// correct.
  explicit SafetensorsFile(std::string path)
      : path_(std::move(path)), file_(std::make_shared<const detail::InputFile>(path_)) {
    require(file_->size() >= 8, "is not a safetensors file: it has ", file_->size(),
            " bytes, the length of the header alone takes 8");
    std::uint64_t length = 0;
    file_->read(0, &length, sizeof(length));
    const std::uint64_t rest = file_->size() - sizeof(length);
    require(length <= detail::longest_header, "says that its header has ", length,
            " bytes, must be at most 100 MB");
    require(length <= rest, "says that its header has ", length, " bytes, but only ", rest,
            " follow");
    std::string text(length, '\0');
    file_->read(sizeof(length), text.data(), text.size());
    detail::SafetensorsHeader header(path_);
    detail::parse_header(text, rest - length, header, path_);
    tensors_ = std::move(header.tensors);
    metadata_ = std::move(header.metadata);
    data_begin_ = sizeof(length) + length;
  }

  /// The path of the file.
  const std::string& path() const { return path_; }
  /// The tensors by name.
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  /// The metadata by key.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// The metadata of a key. Throws std::runtime_error if there is none.
  const std::string& metadata(const std::string& key) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end()) {
      detail::fail_file(path_, "has no ", detail::metadata_named(key),
                        detail::hint_of_prefix(metadata_, key));
    }
    return found->second;
  }

  /// The tensor of a name. Throws std::runtime_error if there is none.
  const Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      detail::fail_file(path_, "has no ", detail::tensor_named(name),
                        detail::hint_of_prefix(tensors_, name));
    }
    return found->second;
  }

  /// \name Numbers of a tensor
  ///
  /// A tensor of type F64, F32, F16, BF16 or F8_E4M3 and of any shape, as float or double. These throw
  /// std::runtime_error if there is no tensor of this name or it has another type.
  /// \{

  /// The whole tensor. Its last dimension becomes the columns, the others together the rows: [a,b,c]
  /// becomes a·b x c. A vector is one row, a number 1 x 1.
  template <class Scalar>
  Matrix<Scalar> matrix(const std::string& name) const {
    const auto [rows, columns] = matrix_shape(name);
    Matrix<Scalar> matrix(rows, columns);
    read_range(name, 0, std::span<Scalar>(matrix.data(), detail::to_size(matrix.size())));
    return matrix;
  }

  /// Calls f(first, numbers) for one block of the tensor after the other, row-major: `numbers` is a
  /// std::span<const Scalar> of at most 16384 numbers, the first of which is number `first` of the tensor.
  template <class Scalar, class F>
  void for_each_block(const std::string& name, F&& f) const {
    const std::uint64_t size = numbers_of(tensor(name), name);
    std::vector<Scalar> numbers(std::min<std::uint64_t>(size, 16384));
    for (std::uint64_t first = 0; first < size; first += numbers.size()) {
      const std::span<Scalar> block(numbers.data(),
                                    std::min<std::uint64_t>(numbers.size(), size - first));
      read_range(name, first, block);
      f(first, std::span<const Scalar>(block));
    }
  }

  /// Fills `numbers` with those of the tensor from number `first` on, row-major. Throws
  /// std::invalid_argument if the tensor does not have as many.
  template <class Scalar>
  void read_range(const std::string& name, std::uint64_t first, std::span<Scalar> numbers) const {
    const Tensor& entry = tensor(name);
    const std::uint64_t size = numbers_of(entry, name);
    detail::require(first <= size && numbers.size() <= size - first,
                    "SafetensorsFile::read_range: numbers ", first, " to ", first + numbers.size(),
                    " of ", detail::tensor_named(name), ", which has ", size);
    const std::uint64_t bytes = detail::element_bits(entry.type) / 8;
    std::vector<std::byte> stored(numbers.size() * bytes);
    read_bytes(name, first * bytes, stored);
    detail::widen(entry.type, stored.data(), numbers.size(), numbers.data());
  }

  /// \}

  /// The whole tensor in the shape of matrix(), in the memory of the mapped file instead of a copy. Scalar is float,
  /// double, Eigen::half or Eigen::bfloat16, and the tensor must be of this type: F32, F64, F16 or BF16. Throws
  /// std::runtime_error if there is no tensor of this name, it has another type, it is not aligned in the file
  /// (SafetensorsWriter aligns every tensor), the file cannot be mapped, or it was changed since it was opened.
  /// matrix() reads a tensor of another floating type, or one that is not aligned, all the same.
  template <class Scalar>
  MappedMatrix<Scalar> mapped_matrix(const std::string& name) const {
    static_assert(!std::is_same_v<Scalar, Index>, "whole numbers are read by read()");
    require_type(tensor(name), name, detail::element_type<Scalar>());
    const auto [rows, columns] = matrix_shape(name);
    const std::uint64_t place = place_of(name);
    require(place % alignof(Scalar) == 0, detail::tensor_named(name), " begins at byte ", place,
            ", which must be a multiple of ", alignof(Scalar), " to be mapped");
    check_unchanged();
    auto file = map();
    require(file != nullptr, "cannot be mapped");
    const auto* const numbers = reinterpret_cast<const Scalar*>(file.get() + place);
    return {std::move(file), numbers, rows, columns};
  }

  /// Fills `bytes` with those of a tensor of any type from byte `first` on. Throws std::runtime_error if
  /// there is no tensor of this name, and std::invalid_argument if it does not have as many.
  void read_bytes(const std::string& name, std::uint64_t first, std::span<std::byte> bytes) const {
    const Tensor& entry = tensor(name);
    const std::uint64_t size = entry.end - entry.begin;
    detail::require(first <= size && bytes.size() <= size - first,
                    "SafetensorsFile::read_bytes: bytes ", first, " to ", first + bytes.size(),
                    " of ", detail::tensor_named(name), ", which has ", size);
    file_->read(data_begin_ + entry.begin + first, bytes.data(), bytes.size());
  }

  /// The whole file mapped into memory, as long as the pointer or a copy of it exists; null if the system
  /// does not support that. Parts of the file are read when they are first used. Later changes of the file
  /// are visible, and access to a part that was cut off ends the program by a signal: call
  /// check_unchanged() before.
  std::shared_ptr<const std::byte> map() const { return file_->map(); }
  /// The offset of a tensor in the file, in bytes. Throws std::runtime_error if there is no tensor of this
  /// name.
  std::uint64_t place_of(const std::string& name) const { return data_begin_ + tensor(name).begin; }
  /// Throws std::runtime_error if the file has another size than when it was opened, or was written to. On
  /// systems where files are not mapped it does nothing.
  void check_unchanged() const { file_->check_unchanged(); }

  /// Throws std::runtime_error, which names the tensor, unless it exists and has the type and shape of this
  /// matrix. A matrix of one row is a vector in the file, [N], and may be [1,N] too.
  template <class Scalar>
  void check(const std::string& name, const Matrix<Scalar>& matrix) const {
    find(name, detail::element_type<Scalar>(), detail::shape_of(matrix));
  }
  /// The same for whole numbers (I64), [N].
  void check(const std::string& name, std::span<const Index> numbers) const {
    find(name, detail::element_type<Index>(), {numbers.size()});
  }

  /// Reads a tensor into a matrix of its shape. Throws as check() does, and std::runtime_error if the file
  /// cannot be read any more; then the matrix is unchanged.
  template <class Scalar>
  void read(const std::string& name, Matrix<Scalar>& matrix) const {
    check(name, matrix);
    Matrix<Scalar> read(matrix.rows(), matrix.cols());
    copy(tensors_.at(name), read.data());
    matrix = std::move(read);
  }
  /// Reads a tensor of whole numbers, which must have as many as `numbers`. Throws likewise.
  void read(const std::string& name, std::span<Index> numbers) const {
    check(name, numbers);
    std::vector<Index> read(numbers.size());
    copy(tensors_.at(name), read.data());
    std::copy(read.begin(), read.end(), numbers.begin());
  }

  /// Compares the configurations that SafetensorsWriter::add_module() stored, the module's and those of its
  /// parts, then does the same as read_parameters(). Throws std::runtime_error, with the module unchanged,
  /// which names the first field that
  /// - has another value in the file, or a text that is not a value of its type,
  /// - is in the file, but not in the configuration.
  ///
  /// A field that is not in the file is not compared, so files without configurations, or from before the
  /// field existed, can be loaded. Seeds may differ.
  template <class Module>
  void read_module(Module& module, const std::string& prefix = {}) const {
    detail::for_each_config(module, prefix, [&](const std::string& keys, const auto& config) {
      detail::SavedConfig(path_, metadata_, keys).check(config);
    });
    read_parameters(module, prefix);
  }

  /// The configuration of a module that add_module() stored with this prefix, to construct the module from
  /// the file:
  ///
  ///     Layer layer(file.config<Layer>("layer."));
  ///     file.read_module(layer, "layer.");
  ///
  /// Throws std::runtime_error, which names the field, if one is missing, has a text that is not a value of
  /// its type, or is not in Module's configuration. Ranges are checked by the module's constructor.
  template <class Module>
  detail::ConfigOf<Module> config(const std::string& prefix = {}) const {
    using Config = detail::ConfigOf<Module>;
    static_assert(detail::is_all_named<Config>(),
                  "every field of a configuration that is read from a file needs a name: write "
                  "visit_fields for it and the configurations inside of it, and give it only "
                  "numbers, flags, enumerators, seeds and configurations");
    auto config = detail::config_to_fill<Config>();
    detail::SavedConfig(path_, metadata_, prefix + "config.").read(config);
    return config;
  }

  /// Reads every parameter of a module from the tensor with its name, after `prefix`. If one is missing or has
  /// another type or shape, or the file cannot be read any more, it throws std::runtime_error, which names
  /// the tensor, with the module unchanged. Other tensors of the file are ignored, and gradients do not
  /// change. Configurations are not compared: training can go on with other losses, for example.
  template <class Module>
  void read_parameters(Module& module, const std::string& prefix = {}) const {
    Waiting waiting;
    detail::walk_parameters(module, [&](const ParameterName& name, const auto& parameter) {
      read_ahead(prefix + name.string(), parameter.value, waiting);
    });
    detail::walk_parameters(
        module, [&](const ParameterName&, auto& parameter) { take(waiting, parameter.value); });
  }

  /// Reads the whole state of an optimizer for a module from the tensors with its names, after
  /// `prefix`. If one is missing, has another type or shape or a count of updates below 0, or the
  /// file cannot be read any more, it throws std::runtime_error, which names the tensor, with the
  /// optimizer unchanged. Throws std::invalid_argument for a module that the optimizer's state does
  /// not belong to. A tensor of shape [0,0] stands for the zeros of a parameter that was never
  /// trained; the zeros of a parameter that is not trained take no memory.
  template <class Optimizer, class Module>
  void read_optimizer(Optimizer& optimizer, const Module& module, const std::string& prefix) const {
    Waiting waiting;
    optimizer.for_each_state(module,
                             [&](const std::string& name, const auto& state, const auto&... shape) {
                               read_state_ahead(prefix + name, state, waiting, shape...);
                             });
    optimizer.for_each_state(module,
                             [&](const std::string&, auto&& state) { take(waiting, state); });
  }

 private:
  /// Tensors that were read and are still to be moved to their destinations, in the order of reading.
  struct Waiting {
    std::deque<Matrix<float>> floats;
    std::deque<Matrix<double>> doubles;
    std::deque<std::vector<Index>> counts;
  };
  static auto& queue_of(Waiting& waiting, const Matrix<float>&) { return waiting.floats; }
  static auto& queue_of(Waiting& waiting, const Matrix<double>&) { return waiting.doubles; }
  static auto& queue_of(Waiting& waiting, std::span<Index>) { return waiting.counts; }

  /// Reads the tensor of this name, which must fit `place`.
  template <class Scalar>
  void read_ahead(const std::string& name, const Matrix<Scalar>& place, Waiting& waiting) const {
    read_shape_ahead(name, place, place.rows(), place.cols(), waiting);
  }
  void read_ahead(const std::string& name, std::span<Index> place, Waiting& waiting) const {
    check(name, place);
    auto& read = queue_of(waiting, place).emplace_back(place.size());
    copy(tensors_.at(name), read.data());
    for (const Index number : read) {
      require(number >= 0, detail::tensor_named(name), " has ", number, ", must be at least 0");
    }
  }

  /// The same for an optimizer's matrix, which has this shape unless it is empty and stands for zeros.
  template <class Scalar, class Shape>
  void read_state_ahead(const std::string& name, const Matrix<Scalar>& place, Waiting& waiting,
                        const Shape& shape) const {
    const bool none = tensor(name).shape == std::vector<std::uint64_t>{0, 0};
    Matrix<Scalar>& read =
        read_shape_ahead(name, place, none ? 0 : shape.rows, none ? 0 : shape.columns, waiting);
    if (place.size() == 0 && (read.array() == 0).all()) read.resize(0, 0);
  }
  template <class State>
  void read_state_ahead(const std::string& name, const State& place, Waiting& waiting) const {
    read_ahead(name, place, waiting);
  }
  template <class Scalar>
  Matrix<Scalar>& read_shape_ahead(const std::string& name, const Matrix<Scalar>& place, Index rows,
                                   Index columns, Waiting& waiting) const {
    auto& read = queue_of(waiting, place).emplace_back(rows, columns);
    check(name, read);
    copy(tensors_.at(name), read.data());
    return read;
  }

  template <class Scalar>
  static void take(Waiting& waiting, Matrix<Scalar>& place) {
    place = std::move(queue_of(waiting, place).front());
    queue_of(waiting, place).pop_front();
  }
  static void take(Waiting& waiting, std::span<Index> place) {
    std::copy(waiting.counts.front().begin(), waiting.counts.front().end(), place.begin());
    waiting.counts.pop_front();
  }

  template <class... Parts>
  void require(bool condition, const Parts&... parts) const {
    detail::require_file(condition, path_, parts...);
  }

  const Tensor& find(const std::string& name, std::string_view type,
                     const std::vector<std::uint64_t>& shape) const {
    const Tensor& found = tensor(name);
    require_type(found, name, type);
    require(detail::is_shape(found.shape, shape), detail::tensor_named(name), " has shape ",
            detail::to_string(found.shape), ", must be ", detail::to_string(shape));
    return found;
  }

  void require_type(const Tensor& entry, const std::string& name, std::string_view type) const {
    require(entry.type == type, detail::tensor_named(name), " is ", detail::plain(entry.type),
            ", must be ", type);
  }

  /// Rows and columns of a tensor as a matrix.
  std::pair<Index, Index> matrix_shape(const std::string& name) const {
    const std::vector<std::uint64_t>& shape = tensor(name).shape;
    const auto [rows, columns] = detail::as_matrix(shape);
    require(rows >= 0 && columns >= 0, detail::tensor_named(name), " has shape ",
            detail::to_string(shape), ", whose size does not fit into 64 bits");
    return {rows, columns};
  }

  /// The number of values of a tensor, which must be of a type that can be widened.
  std::uint64_t numbers_of(const Tensor& entry, const std::string& name) const {
    require(detail::is_widened(entry.type), detail::tensor_named(name), " is ",
            detail::plain(entry.type), ", must be ", detail::widened_types);
    return (entry.end - entry.begin) * 8 / detail::element_bits(entry.type);
  }

  void copy(const Tensor& tensor, void* to) const {
    file_->read(data_begin_ + tensor.begin, to, tensor.end - tensor.begin);
  }

  std::string path_;
  std::shared_ptr<const detail::InputFile> file_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::uint64_t data_begin_ = 0;
};

}  // namespace moe
