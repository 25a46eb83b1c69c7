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
#include "moe/io/safetensors/widen.hpp"
#include "moe/parameter.hpp"

namespace moe {

/// A file that was read and found to be in order.
///
///     const moe::SafetensorsFile file("model.safetensors");
///     file.read_parameters(model);
///
/// Nothing in the file is believed: the header must be valid JSON of at most 100 MB, every shape in
/// agreement with its offsets, and the tensors must cover the rest of the file exactly, without
/// overlap or hole. Else the constructor throws std::runtime_error, which names the file and, where
/// one is to blame, the tensor.
///
/// What the Python package safetensors 0.8 reads is read, with these differences. It refuses a type
/// that it does not know; here such a tensor only cannot be read, and its size is what its offsets
/// say. It accepts, and this refuses: white space before the header's {, a tensor or metadata key
/// that is there twice, a tensor as a list or a type as an object instead of what the format
/// describes, and more than 64 dimensions. It refuses, and this accepts: sizes whose product
/// overflows before a zero empties the tensor, and unknown values nested deeper than 127.
///
/// The file is opened once. If its path is replaced meanwhile, as SafetensorsWriter does, all
/// tensors still come from the file that was opened; a file that is written over in place is not
/// protected from that, but if it shrinks, reading throws. Copies share the open file, which is
/// closed with the last of them; const members may be called by several threads at once.
class SafetensorsFile {
 public:
  using Tensor = detail::SafetensorsEntry;

  /// Reads the header; a tensor is read by the members below. Throws std::runtime_error, which says
  /// why, if the path cannot be opened or is no regular file's; never waits for a FIFO's writer.
  explicit SafetensorsFile(std::string path)
      : path_(std::move(path)), file_(std::make_shared<const detail::InputFile>(path_)) {
    require(file_->size() >= 8, "is no safetensors file: it has ", file_->size(),
            " bytes, the length of the header alone takes 8");
    std::uint64_t length = 0;
    file_->read(0, &length, sizeof(length));
    const std::uint64_t rest = file_->size() - sizeof(length);
    require(length <= detail::longest_header, "says that its header has ", length,
            " bytes, more than any has");
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

  const std::string& path() const { return path_; }
  const std::map<std::string, Tensor>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// Throws std::runtime_error if there is none of that key.
  const std::string& metadata(const std::string& key) const {
    const auto found = metadata_.find(key);
    require(found != metadata_.end(), "has no metadata \"", key, "\"");
    return found->second;
  }

  /// Throws std::runtime_error if there is none of that name.
  const Tensor& tensor(const std::string& name) const {
    const auto found = tensors_.find(name);
    require(found != tensors_.end(), "has no ", detail::tensor_named(name));
    return found->second;
  }

  // Any tensor of type F64, F32, F16, BF16 or F8_E4M3, as float or double, whatever its shape. These
  // throw std::runtime_error if there is none of that name or it is of another type.

  /// All of it: the last dimension becomes the columns, the others together the rows, [a,b,c] a·b x c. A
  /// vector is one row, a number 1 x 1.
  template <class Scalar>
  Matrix<Scalar> matrix(const std::string& name) const {
    const auto [rows, columns] = detail::as_matrix(tensor(name).shape);
    require(rows >= 0 && columns >= 0, detail::tensor_named(name), " has shape ",
            detail::to_string(tensor(name).shape), ", whose sizes cannot be counted");
    Matrix<Scalar> matrix(rows, columns);
    read_range(name, 0, std::span<Scalar>(matrix.data(), detail::to_size(matrix.size())));
    return matrix;
  }

  /// Calls f(first, numbers) for one block of it after the other, row-major: `numbers` is a
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

  /// The numbers from `first` on, row-major, as many as `numbers` has room for. Throws
  /// std::invalid_argument if the tensor has not as many.
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

  /// The bytes from `first` on of a tensor of any type, as many as `bytes` has room for. Throws
  /// likewise.
  void read_bytes(const std::string& name, std::uint64_t first, std::span<std::byte> bytes) const {
    const Tensor& entry = tensor(name);
    const std::uint64_t size = entry.end - entry.begin;
    detail::require(first <= size && bytes.size() <= size - first,
                    "SafetensorsFile::read_bytes: bytes ", first, " to ", first + bytes.size(),
                    " of ", detail::tensor_named(name), ", which has ", size);
    file_->read(data_begin_ + entry.begin + first, bytes.data(), bytes.size());
  }

  /// The whole file mapped into memory, as long as the pointer or a copy of it lives; null where the
  /// system cannot. Nothing is read until it is looked at. What is written to the file shows there, and
  /// looking where it was cut is a fault that ends the program: call check_unchanged() before.
  std::shared_ptr<const std::byte> map() const { return file_->map(); }
  /// Where in the file a tensor begins. Throws std::runtime_error if there is none of that name.
  std::uint64_t place_of(const std::string& name) const { return data_begin_ + tensor(name).begin; }
  /// Throws std::runtime_error if the file has another size, or was written to, since it was opened. Where
  /// files are not mapped it does nothing.
  void check_unchanged() const { file_->check_unchanged(); }

  /// Throws std::runtime_error naming the tensor unless it is there, with this type and shape. A matrix of
  /// one row is a vector in the file, [N], and may be [1,N] too.
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

  /// Like read_parameters(), after the configurations that SafetensorsWriter::add_module() stored were
  /// compared: the module's and those of its parts. Throws std::runtime_error too, the module being
  /// what it was, which names the first field that
  /// - has another value in the file, or one that is no value of its type,
  /// - is in the file, but not in the configuration.
  /// A field that the file does not have is passed by, so a file without configurations, or one older
  /// than the field, loads as well; a seed may be another.
  template <class Module>
  void read_module(Module& module, const std::string& prefix = {}) const {
    detail::for_each_config(module, prefix, [&](const std::string& keys, const auto& config) {
      detail::SavedConfig(path_, metadata_, keys).check(config);
    });
    read_parameters(module, prefix);
  }

  /// The configuration of a module that add_module() stored with this prefix, so that the module can
  /// be made from the file:
  ///
  ///     Layer layer(file.config<Layer>("layer."));
  ///     file.read_module(layer, "layer.");
  ///
  /// Throws std::runtime_error, which names the field, if one is missing, is no value of its type or
  /// is not in Module's configuration. Whether the values suit each other, the module checks.
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

  /// Overwrites every parameter of a module by the tensor of its name, after `prefix`. All are read
  /// first, so if one is missing or of another type or shape, or the file cannot be read any more,
  /// std::runtime_error names it and the module is what it was. Tensors that the module has no use
  /// for are left alone; gradients too. What configuration they were saved with does not matter here:
  /// this is how training goes on with other losses for example.
  template <class Module>
  void read_parameters(Module& module, const std::string& prefix = {}) const {
    Waiting waiting;
    detail::walk_parameters(module, [&](const ParameterName& name, const auto& parameter) {
      read_ahead(prefix + name.string(), parameter.value, waiting);
    });
    detail::walk_parameters(
        module, [&](const ParameterName&, auto& parameter) { take(waiting, parameter.value); });
  }

  /// Overwrites everything that an optimizer remembers of a module by the tensors of its names, after
  /// `prefix`. All are read first, so if one is missing or of another shape, or counts updates below
  /// 0, std::runtime_error names it and the optimizer is what it was. A module that the optimizer
  /// does not belong to is std::invalid_argument. A tensor of shape [0,0] stands for zeros, that of a
  /// parameter that was never trained; zeros for one that is not trained here take no memory.
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
  /// What was read and has not been put in its place yet, in the order of reading.
  struct Waiting {
    std::deque<Matrix<float>> floats;
    std::deque<Matrix<double>> doubles;
    std::deque<std::vector<Index>> counts;
  };
  static auto& queue_of(Waiting& waiting, const Matrix<float>&) { return waiting.floats; }
  static auto& queue_of(Waiting& waiting, const Matrix<double>&) { return waiting.doubles; }
  static auto& queue_of(Waiting& waiting, std::span<Index>) { return waiting.counts; }

  /// Reads the tensor of that name, which must fit `place`.
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
    require(found.type == type, detail::tensor_named(name), " is ", detail::plain(found.type),
            ", needed is ", type);
    require(detail::is_shape(found.shape, shape), detail::tensor_named(name), " has shape ",
            detail::to_string(found.shape), ", needed is ", detail::to_string(shape));
    return found;
  }

  /// How many numbers a tensor has, which must be of a type that can be widened.
  std::uint64_t numbers_of(const Tensor& entry, const std::string& name) const {
    require(detail::is_widened(entry.type), detail::tensor_named(name), " is ",
            detail::plain(entry.type), ", needed is ", detail::widened_types);
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
