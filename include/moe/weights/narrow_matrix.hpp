#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>
#include <string_view>
#include <utility>

#include "moe/kernels/gemm_descriptor.hpp"
#include "moe/parallel.hpp"
#include "moe/weights/format.hpp"

/// \file
/// A matrix of narrow weights, packed for the product that reads it.

namespace moe {

namespace detail {

// Sizes and offsets in a packed matrix, see format.hpp. `lanes` is the number of floats in a packet of
// the machine that packed it.

/// Packets of the panel whose first column is `first`.
constexpr Index narrow_packets(Index columns, Index first, Index lanes = lane_count) {
  return std::min(panel_packets, (columns - first + lanes - 1) / lanes);
}
/// Bytes of the scales of a packet of columns in a block.
template <class Format>
constexpr Index narrow_scale_bytes(Index lanes = lane_count) {
  return Format::scaled ? 2 * lanes : 0;
}
/// Bytes of a packet of columns in a block, scales included.
template <class Format>
constexpr Index narrow_block_bytes(Index lanes = lane_count) {
  return narrow_scale_bytes<Format>(lanes) +
         Format::block / Format::group * Format::group_bytes * lanes;
}
template <class Format>
constexpr Index narrow_blocks(Index rows) {
  return (rows + Format::block - 1) / Format::block;
}
template <class Format>
constexpr Index narrow_bytes(Index rows, Index columns, Index lanes = lane_count) {
  return narrow_blocks<Format>(rows) * narrow_block_bytes<Format>(lanes) *
         ((columns + lanes - 1) / lanes);
}

/// The sizes above for this machine, as constants.
template <class Format>
struct NarrowLayout {
  static constexpr Index panel_columns = panel_packets * lane_count;
  static constexpr Index scale_bytes = narrow_scale_bytes<Format>();
  static constexpr Index group_bytes = Format::group_bytes * lane_count;
  static constexpr Index block_bytes = narrow_block_bytes<Format>();
};

/// The offset in bytes of a block of the panel whose first column is `first`.
template <class Format>
constexpr Index narrow_block_place(Index rows, Index columns, Index first, Index block,
                                   Index lanes = lane_count) {
  return narrow_block_bytes<Format>(lanes) * (narrow_blocks<Format>(rows) * (first / lanes) +
                                              block * narrow_packets(columns, first, lanes));
}

/// Where a weight is, and its scale.
struct NarrowPlace {
  Index lane;   ///< offset of its lane in bytes
  Index step;   ///< its step in the lane
  Index scale;  ///< offset of its scale in bytes
};
template <class Format>
constexpr NarrowPlace narrow_place(Index rows, Index columns, Index k, Index column,
                                   Index lanes = lane_count) {
  const Index first = column / (panel_packets * lanes) * (panel_packets * lanes);
  const Index packets = narrow_packets(columns, first, lanes);
  const Index block = narrow_block_place<Format>(rows, columns, first, k / Format::block, lanes);
  const Index group = k % Format::block / Format::group;
  return {block +
              packets * (narrow_scale_bytes<Format>(lanes) + group * Format::group_bytes * lanes) +
              (column - first) * Format::group_bytes,
          k % Format::group, block + 2 * (column - first)};
}

/// A view of a packed matrix, the operand B of a product.
template <class Format>
struct NarrowOperand {
  using Layout = NarrowLayout<Format>;
  const std::byte* data;
  Index rows;     ///< K
  Index columns;  ///< N
  Activations activations = Activations::float32;

  /// The memory of the panel whose first column is `column`, from a block of k on.
  const std::byte* panel(Index column, Index block = 0) const {
    MOE_ASSERT(column % Layout::panel_columns == 0);
    return data + narrow_block_place<Format>(rows, columns, column, block);
  }
};

}  // namespace detail

/// K x N weights in a narrow format, not changed after construction. Copies share their memory. Unless
/// activations are rounded, a product with it is one with decoded(): to the same bits if the format has no scales,
/// else up to the order of roundings, since scales are applied to sums of blocks.
template <detail::NarrowFormat Format>
class NarrowMatrix {
  using Operand = detail::NarrowOperand<Format>;
  using Layout = detail::NarrowLayout<Format>;

 public:
  NarrowMatrix() = default;

  /// Rounds weights (K x N). Throws std::invalid_argument, with `name`, the row, the column and the value,
  /// if a weight is not finite, is too large for the format, or is so small that the scale of its block
  /// would be 0. O(K·N).
  explicit NarrowMatrix(const MatrixRef<float>& weights, std::string_view name = "a weight")
      : NarrowMatrix(weights.rows(), weights.cols()) {
    std::byte* data = allocate();
    parallel_for_blocks(columns_, Layout::panel_columns, element_work(rows_ * columns_),
                        [&](Index first, Index count) {
                          pack(weights, {first, count}, name, data);
                        });
  }

  /// Packs given codes and scales: code(k, column) and, if the format has scales, scale(block, column),
  /// which must be finite and exact in float16.
  template <class CodeAt, class ScaleAt>
  NarrowMatrix(Index rows, Index columns, CodeAt&& code, ScaleAt&& scale)
      : NarrowMatrix(rows, columns) {
    std::byte* data = allocate();
    for (Index j = 0; j < columns_; ++j) {
      for (Index k = 0; k < rows_; ++k) {
        if constexpr (Format::scaled) {
          if (k % Format::block == 0) set_scale(data, k, j, scale(k / Format::block, j));
        }
        set(data, k, j, code(k, j));
      }
    }
  }

  /// Refers to memory of bytes_of(rows, columns) bytes, packed for packets of this machine's width.
  NarrowMatrix(Index rows, Index columns, std::shared_ptr<const std::byte> packed)
      : rows_(rows), columns_(columns), data_(std::move(packed)) {}

  /// Copies the packed memory into memory of its own.
  void own() {
    const std::shared_ptr<const std::byte> from = data_;
    std::byte* data = allocate();
    std::copy_n(from.get(), bytes(), data);
  }

  Index rows() const { return rows_; }     ///< K
  Index cols() const { return columns_; }  ///< N
  /// The bytes of a packed matrix of this size.
  static Index bytes_of(Index rows, Index columns) {
    return detail::narrow_bytes<Format>(rows, columns);
  }
  Index bytes() const { return bytes_of(rows_, columns_); }  ///< of the packed memory
  const std::byte* data() const { return data_.get(); }      ///< the packed memory, bytes() of it
  /// The matrix as operand B of a product.
  Operand operand(Activations activations = Activations::float32) const {
    return {data_.get(), rows_, columns_, activations};
  }

  /// The code of a weight.
  typename Format::Code code(Index k, Index column) const {
    const auto place = place_of(k, column);
    return Format::get(data() + place.lane, place.step);
  }
  /// The scale of a weight, 1 where the format has none.
  float scale(Index k, Index column) const {
    if constexpr (!Format::scaled) return 1;
    return detail::load_half(data() + place_of(k, column).scale);
  }
  /// The weights that the codes stand for (K x N).
  Matrix<float> decoded() const {
    Matrix<float> weights(rows_, columns_);
    for (Index k = 0; k < rows_; ++k) {
      for (Index j = 0; j < columns_; ++j) weights(k, j) = Format::decode(code(k, j), scale(k, j));
    }
    return weights;
  }

 private:
  NarrowMatrix(Index rows, Index columns) : rows_(rows), columns_(columns) {}

  detail::NarrowPlace place_of(Index k, Index column) const {
    return detail::narrow_place<Format>(rows_, columns_, k, column);
  }

  std::byte* allocate() {
    constexpr std::align_val_t line{64};
    const std::size_t size = detail::to_size(bytes());
    auto* memory = static_cast<std::byte*>(::operator new(size, line));
    data_ = std::shared_ptr<const std::byte>(
        memory, [](const std::byte* p) { ::operator delete(const_cast<std::byte*>(p), line); });
    std::fill_n(memory, size, std::byte{0});
    return memory;
  }

  void set(std::byte* data, Index k, Index column, typename Format::Code code) const {
    const auto place = place_of(k, column);
    Format::set(data + place.lane, place.step, code);
  }
  void set_scale(std::byte* data, Index k, Index column, float scale) const {
    detail::store_half(scale, data + place_of(k, column).scale);
  }

  void pack(const MatrixRef<float>& weights, Range columns, std::string_view name,
            std::byte* data) const {
    const auto fail = [&](Index k, Index column, const char* why) {
      detail::fail(name, "(", k, ", ", column, ") = ", weights(k, column), why, Format::name);
    };
    float block[detail::to_size(Format::block)];
    for (Index j = columns.first; j < columns.first + columns.count; ++j) {
      for (Index first = 0; first < rows_; first += Format::block) {
        const Index count = std::min(Format::block, rows_ - first);
        Index largest = 0;
        for (Index i = 0; i < count; ++i) {
          block[i] = weights(first + i, j);
          if (!std::isfinite(block[i])) fail(first + i, j, " cannot be narrowed to ");
          if (std::abs(block[i]) > std::abs(block[largest])) largest = i;
        }
        float scale = 1;
        if constexpr (Format::scaled) {
          scale = Format::scale(block, count);
          if (!std::isfinite(scale)) fail(first + largest, j, " is too large for ");
          if (scale == 0 && block[largest] != 0) {
            fail(first + largest, j, ", the largest of its block, is too small for ");
          }
          set_scale(data, first, j, scale);
        }
        for (Index i = 0; i < count; ++i) {
          const auto code = Format::encode(block[i], scale);
          if (!std::isfinite(Format::decode(code, scale))) fail(first + i, j, " is too large for ");
          set(data, first + i, j, code);
        }
      }
    }
  }

  Index rows_ = 0;
  Index columns_ = 0;
  std::shared_ptr<const std::byte> data_;
};

}  // namespace moe
