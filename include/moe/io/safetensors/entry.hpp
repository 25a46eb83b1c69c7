#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/matrix.hpp"

/// \file
/// A tensor in a safetensors header: its type, its shape and its place in the file.

namespace moe::detail {

/// A tensor in a header.
struct SafetensorsEntry {
  std::string type;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  ///< offset of its first byte in the data
  std::uint64_t end = 0;    ///< offset just after its last byte
};

/// Bits of an element of a type, 0 for a type that is not known. These are the types of version 0.8
/// of the Python package.
inline std::uint64_t element_bits(std::string_view type) {
  using Type = std::pair<std::string_view, std::uint64_t>;
  static constexpr std::array types{
      Type{"F64", 64},    Type{"I64", 64},    Type{"U64", 64},        Type{"C64", 64},
      Type{"F32", 32},    Type{"I32", 32},    Type{"U32", 32},        Type{"F16", 16},
      Type{"BF16", 16},   Type{"I16", 16},    Type{"U16", 16},        Type{"F8_E4M3", 8},
      Type{"F8_E5M2", 8}, Type{"F8_E8M0", 8}, Type{"F8_E4M3FNUZ", 8}, Type{"F8_E5M2FNUZ", 8},
      Type{"I8", 8},      Type{"U8", 8},      Type{"BOOL", 8},        Type{"F6_E2M3", 6},
      Type{"F6_E3M2", 6}, Type{"F4", 4}};
  for (const auto& [name, bits] : types) {
    if (name == type) return bits;
  }
  return 0;
}

/// The type of a tensor whose elements are Element.
template <class Element>
constexpr std::string_view element_type() {
  if constexpr (std::is_same_v<Element, float>) {
    return "F32";
  } else if constexpr (std::is_same_v<Element, double>) {
    return "F64";
  } else if constexpr (std::is_same_v<Element, Eigen::half>) {
    return "F16";
  } else if constexpr (std::is_same_v<Element, Eigen::bfloat16>) {
    return "BF16";
  } else {
    static_assert(
        std::is_same_v<Element, Index>,
        "a tensor's elements are float, double, Eigen::half, Eigen::bfloat16 or moe::Index");
    return "I64";
  }
}

/// Bits of a tensor of this shape; nothing if the number overflows. With a size of zero it is 0, whatever the
/// other sizes are.
inline std::optional<std::uint64_t> tensor_bits(const std::vector<std::uint64_t>& shape,
                                                std::uint64_t bits) {
  if (std::find(shape.begin(), shape.end(), 0u) != shape.end()) return 0;
  for (const std::uint64_t size : shape) {
    if (bits > UINT64_MAX / size) return std::nullopt;
    bits *= size;
  }
  return bits;
}

/// "[2,3]"
inline std::string to_string(const std::vector<std::uint64_t>& numbers) {
  std::string text = "[";
  for (const std::uint64_t number : numbers) {
    text += (text.size() > 1 ? "," : "") + std::to_string(number);
  }
  return text + "]";
}

/// The shape of a matrix in a file. A single row is a vector there, [N], as PyTorch's biases are.
template <class Scalar>
std::vector<std::uint64_t> shape_of(const Matrix<Scalar>& matrix) {
  const auto columns = static_cast<std::uint64_t>(matrix.cols());
  if (matrix.rows() == 1) return {columns};
  return {static_cast<std::uint64_t>(matrix.rows()), columns};
}

/// Whether a tensor of shape `found` can be read as one of shape `needed`: a vector may also be [1,N].
inline bool is_shape(const std::vector<std::uint64_t>& found,
                     const std::vector<std::uint64_t>& needed) {
  if (found.size() == 2 && needed.size() == 1) return found[0] == 1 && found[1] == needed[0];
  return found == needed;
}

/// Rows and columns of a tensor as a matrix: the columns are the last dimension, the rows all others together.
/// A number that overflows becomes -1.
inline std::pair<Index, Index> as_matrix(std::vector<std::uint64_t> shape) {
  const auto counted = [](std::uint64_t size) {
    return size > static_cast<std::uint64_t>(INT64_MAX) ? Index{-1} : static_cast<Index>(size);
  };
  std::uint64_t columns = 1;
  if (!shape.empty()) {
    columns = shape.back();
    shape.pop_back();
  }
  return {counted(tensor_bits(shape, 1).value_or(UINT64_MAX)), counted(columns)};
}

}  // namespace moe::detail
