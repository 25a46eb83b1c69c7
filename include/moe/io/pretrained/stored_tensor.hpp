#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/io/pretrained/checkpoint.hpp"
#include "moe/io/safetensors/entry.hpp"
#include "moe/io/safetensors/widen.hpp"

/// \file
/// The numbers of a tensor of a checkpoint, whatever format it is stored in.

namespace moe::detail {

/// A tensor as a matrix, whose columns are the last dimension. It is stored in one of three formats:
///
/// - numbers of 16 to 64 bits,
/// - F8_E4M3, with a tensor NAME_scale_inv or NAME_scale of factors: one for each block of scale_rows x
///   scale_columns of each matrix, the last of which may be smaller (DeepSeek-AI 2024, arXiv 2412.19437, sec.
///   3.3), [..., blocks down, blocks across]; one for each row, [..., rows, 1], or column, [..., 1, columns];
///   one for each matrix, [..., 1, 1]; or a single one, [] or [1]. Beside them there may be a factor by
///   which other programs round the input of the map, which is not used,
/// - MXFP4, if the name ends in "_blocks": U8 [..., n/32, 16] are rows of n numbers of 4 bits,
///   those at even positions in the low halves of bytes, and U8 NAME_scales [..., n/32] are their
///   factors, 2^(s - 127).
///
/// The checkpoint must outlive this object.
class StoredTensor {
 public:
  /// Throws std::runtime_error, which names the file, the tensor and both shapes, if there is no tensor of this
  /// name and shape, it has another type, or its scales are missing, there twice or do not fit it.
  StoredTensor(const io::Checkpoint& checkpoint, const std::string& name,
               const std::vector<std::uint64_t>& shape, Index scale_rows, Index scale_columns)
      : file_(&checkpoint.file_of(name)), name_(name), tensors_{name} {
    const SafetensorsEntry& tensor = file_->tensor(name);
    if (name.ends_with("_blocks")) {
      kind_ = Kind::mxfp4;
      check(*file_, name, "U8", with(shape, {shape.back() / 32, 16}));
      scale_name_ = name.substr(0, name.size() - 6) + "scales";
      scale_file_ = &checkpoint.file_of(scale_name_);
      check(*scale_file_, scale_name_, "U8", with(shape, {shape.back() / 32}));
      require_file(shape.back() % 32 == 0, file_->path(), tensor_named(name), " has rows of ",
                   shape.back(), " numbers, must be a multiple of 32");
      tensors_.push_back(scale_name_);
    } else {
      check(*file_, name, tensor.type, shape);
      require_file(is_widened(tensor.type), file_->path(), tensor_named(name), " is ",
                   plain(tensor.type), ", must be ", widened_types);
      if (tensor.type == "F8_E4M3") read_scales(checkpoint, shape, scale_rows, scale_columns);
    }
    const auto [rows, columns] = as_matrix(shape);
    rows_ = rows;
    columns_ = columns;
  }

  Index rows() const { return rows_; }
  Index columns() const { return columns_; }
  /// The names of the tensors that it is read from.
  const std::vector<std::string>& tensors() const { return tensors_; }

  /// Reads `count` rows from row `first` on.
  template <class Scalar>
  void read_rows(Index first, Index count, Scalar* to) const {
    if (kind_ == Kind::mxfp4) return read_mxfp4(first, count, to);
    file_->read_range(name_, static_cast<std::uint64_t>(first * columns_),
                      std::span<Scalar>(to, to_size(count * columns_)));
    if (kind_ != Kind::scaled) return;
    for (Index r = first; r < first + count; ++r, to += columns_) {
      const Index scale_row = r / matrix_rows_ * scales_down_ + r % matrix_rows_ / scale_rows_;
      const float* const scale = scales_.data() + scale_row * scales_.cols();
      for (Index c = 0; c < columns_; ++c) to[c] *= static_cast<Scalar>(scale[c / scale_columns_]);
    }
  }

 private:
  enum class Kind { numbers, scaled, mxfp4 };
  using Shape = std::vector<std::uint64_t>;

  /// A shape with its last dimension replaced by others.
  static Shape with(Shape shape, const Shape& last) {
    shape.pop_back();
    shape.insert(shape.end(), last.begin(), last.end());
    return shape;
  }

  static void check(const SafetensorsFile& file, const std::string& name, std::string_view type,
                    const Shape& shape) {
    const SafetensorsEntry& tensor = file.tensor(name);
    require_file(tensor.type == type, file.path(), tensor_named(name), " is ", plain(tensor.type),
                 ", must be ", type);
    require_file(tensor.shape == shape, file.path(), tensor_named(name), " has shape ",
                 to_string(tensor.shape), ", must be ", to_string(shape));
  }

  void read_scales(const io::Checkpoint& checkpoint, const Shape& shape, Index block_rows,
                   Index block_columns) {
    kind_ = Kind::scaled;
    find_scales(checkpoint);
    require_file(shape.size() >= 2, file_->path(), tensor_named(name_), " is F8_E4M3 of shape ",
                 to_string(shape), ", must have at least 2 dimensions");
    const Shape& scales = scale_file_->tensor(scale_name_).shape;
    const auto rows = static_cast<Index>(shape[shape.size() - 2]);
    const auto columns = static_cast<Index>(shape.back());
    const auto shape_of = [&](Index down, Index across) {
      const auto blocks = [](Index size, Index block) {
        return static_cast<std::uint64_t>((size + block - 1) / std::max<Index>(1, block));
      };
      return with(with(shape, {}), {blocks(rows, down), blocks(columns, across)});
    };
    matrix_rows_ = rows;
    const std::pair<Index, Index> sizes[] = {
        {block_rows, block_columns}, {1, columns}, {rows, 1}, {rows, columns}};
    const auto* const size =
        std::find_if(std::begin(sizes), std::end(sizes),
                     [&](const auto& each) { return shape_of(each.first, each.second) == scales; });
    if (size != std::end(sizes)) {
      scale_rows_ = size->first;
      scale_columns_ = size->second;
      scales_down_ = static_cast<Index>(scales[scales.size() - 2]);
    } else if (scales.empty() || scales == Shape{1}) {
      matrix_rows_ = scale_rows_ = as_matrix(shape).first;
      scale_columns_ = columns;
      scales_down_ = 1;
    } else {
      fail_file(scale_file_->path(), tensor_named(scale_name_), " has shape ", to_string(scales),
                ", must be ", to_string(shape_of(block_rows, block_columns)), " for blocks of ",
                block_rows, " x ", block_columns, ", ", to_string(shape_of(1, columns)),
                " for rows, ", to_string(shape_of(rows, 1)), " for columns, ",
                to_string(shape_of(rows, columns)), " or [1]");
    }
    scales_ = scale_file_->matrix<float>(scale_name_);
    tensors_.push_back(scale_name_);
  }

  /// Files of block scales and of transformers call the factors NAME_scale_inv, those of compressed-tensors
  /// and most others NAME_scale.
  void find_scales(const io::Checkpoint& checkpoint) {
    const std::string inverse = name_ + "_scale_inv";
    scale_name_ = name_ + "_scale";
    const bool is_inverse = checkpoint.has(inverse);
    if (is_inverse == checkpoint.has(scale_name_)) {
      fail_file(file_->path(), "has ", is_inverse ? "both " : "no ", tensor_named(inverse),
                is_inverse ? " and " : " and no ", tensor_named(scale_name_),
                is_inverse ? ", of which one must be the scales of "
                           : ", one of which must be the scales of ",
                tensor_named(name_));
    }
    if (is_inverse) scale_name_ = inverse;
    scale_file_ = &checkpoint.file_of(scale_name_);
    constexpr std::string_view weight = ".weight";
    if (!name_.ends_with(weight)) return;
    for (const char* of_input : {".input_scale", ".activation_scale"}) {
      const std::string unused = name_.substr(0, name_.size() - weight.size()) + of_input;
      if (checkpoint.has(unused)) tensors_.push_back(unused);
    }
  }

  template <class Scalar>
  void read_mxfp4(Index first, Index count, Scalar* to) const {
    constexpr Index block = 32;
    const Index blocks = count * columns_ / block;
    const Index before = first * columns_ / block;
    std::vector<std::byte> codes(to_size(blocks * block / 2));
    std::vector<std::byte> scales(to_size(blocks));
    file_->read_bytes(name_, static_cast<std::uint64_t>(before * block / 2), codes);
    scale_file_->read_bytes(scale_name_, static_cast<std::uint64_t>(before), scales);
    for (std::size_t i = 0; i < codes.size(); ++i) {
      const auto code = std::to_integer<unsigned>(codes[i]);
      const auto scale = static_cast<Scalar>(
          e8m0_values[std::to_integer<unsigned>(scales[i / to_size(block / 2)])]);
      to[2 * i] = static_cast<Scalar>(e2m1_values[code & 15]) * scale;
      to[2 * i + 1] = static_cast<Scalar>(e2m1_values[code >> 4]) * scale;
    }
  }

  const SafetensorsFile* file_;
  std::string name_;
  std::vector<std::string> tensors_;
  Index rows_ = 0;
  Index columns_ = 0;
  Kind kind_ = Kind::numbers;
  std::string scale_name_;
  const SafetensorsFile* scale_file_ = nullptr;
  Index matrix_rows_ = 0;  ///< of one matrix, if the tensor has several
  Index scale_rows_ = 1;
  Index scale_columns_ = 1;
  Index scales_down_ = 0;  ///< rows of scales of one matrix
  Matrix<float> scales_;
};

}  // namespace moe::detail
