#pragma once

#include <algorithm>

#include "moe/kernels/bfloat16_words.hpp"
#include "moe/kernels/gemm.hpp"

/// \file
/// Products of floats that are rounded to bfloat16 while they are packed, and are added up in float, on
/// the calling thread. Both operands are rounded to nearest even; bias, C and the sums are floats.
///
/// Every element of C is one chain over ascending k from its initial value, two steps of k at once where
/// the processor multiplies pairs; blocks, tiles and threads only decide when a chain is continued.
/// Hence a row of C has the same bits whatever other rows are multiplied with it. Two processors may
/// differ in the rounding of sums. Nothing allocates and nothing throws.
///
/// Each product rounds A and B anew, B once for every block of rows of A. With few rows the
/// rounding takes longer than it saves: docs/experiments.md has the figures.

MOE_PACKETS_BEGIN

namespace moe::detail {

/// The `count` addresses that a tile of `depth` steps prefetches, with enough at a time to reach
/// all of them.
inline Prefetch<float> prefetch_within(Index depth, const float* first, Index stride, Index count) {
  return {first, stride, count, (count * prefetch_stretch + depth - 1) / depth};
}

/// The numbers along K that are in a range of words.
template <class Words>
Range numbers_of(Range words, Index depth) {
  const Index first = words.first * Words::steps;
  return {first, std::min(words.count * Words::steps, depth - first)};
}

/// B of A·B and of Aᵀ·B in words, from word `first_word` on: the rows of B follow each other along
/// K.
template <class Words>
struct InterleavedRows {
  using Operation = typename Words::Operation;
  static constexpr Index prefetched_steps = prefetch_stretch;
  GatheredRows<float> b;  ///< K x N
  Index step = 0;         ///< the distance of the rows, or 0 where they are in a list
  Index first_word = 0;

  Panel<float> pack(const Strip& strip, float* buffer) const {
    const Index stride = strip.packets * packet_size<float>;
    const Range k = numbers(strip, 0, strip.depth);
    Words::interleave(b.slice(k.first, k.count).columns(strip.column, strip.width), stride, buffer);
    return {buffer, stride};
  }
  Prefetch<float> prefetch(const Strip& strip, Index first, Index count) const {
    const Range k = numbers(strip, first, count);
    if (step != 0) {
      return prefetch_within(strip.depth, b.row(k.first) + strip.column, step, k.count);
    }
    for (Index i = 0; i < k.count; ++i) {
      prefetch_far<strip_lines>(b.row(k.first + i) + strip.column);
    }
    return {};
  }

 private:
  Range numbers(const Strip& strip, Index first, Index count) const {
    return numbers_of<Words>({first_word + strip.k + first, count}, b.count());
  }
};

/// B of A·Bᵀ in words, from word `first_word` on: the rows of B run along K.
template <class Words>
struct TransposedRows {
  using Operation = typename Words::Operation;
  static constexpr Index prefetched_steps = strip_lines * cache_line<float> / Words::steps;
  MatrixOperand<float> b;  ///< N x K
  Index first_word = 0;

  Panel<float> pack(const Strip& strip, float* buffer) const {
    constexpr Index size = packet_size<float>;
    constexpr Index row_stride = panel_depth + cache_line<float>;
    alignas(64) float words[to_size(size * row_stride)];
    const Index stride = strip.packets * size;
    const Range numbers = numbers_of<Words>({first_word + strip.k, strip.depth}, b.columns);
    for (Index j = 0; j < stride; j += size) {
      for (Index i = 0; i < size; ++i) {
        float* to = words + i * row_stride;
        if (j + i < strip.width) {
          Words::round_row(numbers.count, b.row(strip.column + j + i) + numbers.first, to);
        } else {
          std::fill_n(to, strip.depth, 0.0f);
        }
      }
      for (Index k = 0; k < strip.depth; k += size) {
        transpose_square(words + k, row_stride, buffer + k * stride + j, stride);
      }
    }
    return {buffer, stride};
  }
  /// A tile prefetches the last piece of each row while it multiplies; with few tiles there are
  /// more pieces, and the others are prefetched at once.
  Prefetch<float> prefetch(const Strip& strip, Index first, Index count) const {
    constexpr Index piece = prefetched_steps * Words::steps;
    const Index begin = (first_word + strip.k + first) * Words::steps;
    const Index last = begin + (count - 1) * Words::steps / piece * piece;
    for (Index k = begin; k < last; k += piece) {
      for (Index j = 0; j < strip.width; ++j) {
        prefetch_far<strip_lines>(b.row(strip.column + j) + k);
      }
    }
    return prefetch_within(strip.depth, b.row(strip.column) + last, b.stride, strip.width);
  }
};

/// Words of A that are packed at once, on the stack and in L2, with the padding of their rows: with AVX-512
/// 256 rows of two panels; where a panel is deeper, fewer rows of one panel.
inline constexpr Index left_capacity = Index{256} * (256 + 16);
static_assert(left_capacity * static_cast<Index>(sizeof(float)) <= (Index{288} << 10));
inline constexpr Index left_depth = round_up(256, panel_depth);
inline constexpr Index left_rows =
    left_capacity / (left_depth + cache_line<float>) / packet_size<float> * packet_size<float>;
static_assert(left_rows >= packet_size<float>);

/// Calls pack_left(rows, words, stride, to) for blocks of A (M x K), which fills `to` with their
/// words, and multiplies each block with the words of B.
template <class Words, class Source, class PackLeft>
void gemm_words(Index depth, const GemmNN<float, Source>& product, const PackLeft& pack_left) {
  if (depth == 0) return gemm_depth_zero(product);
  alignas(64) float left[to_size(left_capacity)];
  constexpr Index line = cache_line<float>;
  const Index words = word_count<Words>(depth);
  const auto stride_of = [](Index count) { return padded_stride<float>(round_up(count, line)); };
  // A block has all words of its rows if they fit, since C is then read and written less often.
  constexpr Index unit = packet_size<float>;  // pack_left() may fill whole packets of rows
  const Index fitting_rows = left_capacity / stride_of(words) / unit * unit;
  const Index rows = std::max(left_rows, fitting_rows);
  for_each_tile(product.c.count(), rows, [&](Index first, Index count) {
    const Index whole = round_up(count, unit);
    const Index fitting = (left_capacity / whole - line) / panel_depth * panel_depth;
    const Index block = whole * stride_of(words) <= left_capacity ? words : fitting;
    const PartEpilogue epilogue{product.epilogue, first, 0};
    for (Index word = 0; word < words; word += block) {
      const Range range{word, std::min(block, words - word)};
      const Index stride = stride_of(range.count);
      pack_left(Range{first, count}, range, stride, left);
      GemmNN<float, Source> part = product;
      part.a = {left, stride, count, range.count};
      part.b.first_word = word;
      part.c = product.c.slice(first, count);
      part.start = word == 0 ? product.start : Start::accumulate;
      part.bias = word == 0 ? product.bias.at(first, 0) : Bias<float>{};
      part.epilogue = word + block >= words ? epilogue.get() : Epilogue();
      gemm_packed(part);
    }
  });
}

/// The words of rows that run along K.
template <class Words>
auto pack_rows(const GatheredRows<float>& a) {
  return [&a](Range rows, Range words, Index stride, float* to) {
    const Range k = numbers_of<Words>(words, a.width());
    for (Index i = 0; i < rows.count; ++i) {
      Words::round_row(k.count, a.row(rows.first + i) + k.first, to + i * stride);
    }
  };
}

/// The words of columns that run along K.
template <class Words>
auto pack_columns(const GatheredRows<float>& a) {
  return [&a](Range columns, Range words, Index stride, float* to) {
    constexpr Index size = packet_size<float>;
    alignas(64) float held[to_size(panel_depth * size)] = {};
    for (Index word = 0; word < words.count; word += panel_depth) {
      const Index count = std::min(panel_depth, words.count - word);
      const Range k = numbers_of<Words>({words.first + word, count}, a.count());
      for (Index j = 0; j < columns.count; j += size) {
        const Index width = std::min(size, columns.count - j);
        Words::interleave(a.slice(k.first, k.count).columns(columns.first + j, width), size, held);
        // Transposed as a matrix of words: each of its rows becomes a part of a row of `to`.
        for (Index i = 0; i < count; i += size) {
          transpose_square(held + i * size, size, to + j * stride + word + i, stride);
        }
      }
    }
  };
}

/// C = A·B. The product that follows is not prefetched.
template <class Words = BFloat16Words>
void gemm_bfloat16(const GemmNN<float>& product) {
  if (product.a.count() == 0) return;
  const MatrixOperand<float>& b = product.b;
  using Source = InterleavedRows<Words>;
  gemm_words<Words>(product.a.width(),
                    GemmNN<float, Source>{.a = product.a,
                                          .b = {{b.data, b.stride, b.rows, b.columns}, b.stride},
                                          .c = product.c,
                                          .columns = product.columns,
                                          .start = product.start,
                                          .bias = product.bias,
                                          .epilogue = product.epilogue},
                    pack_rows<Words>(product.a));
}

/// C = A·Bᵀ.
template <class Words = BFloat16Words>
void gemm_bfloat16(const GemmNT<float>& product) {
  if (product.a.count() == 0) return;
  using Source = TransposedRows<Words>;
  gemm_words<Words>(product.a.width(),
                    GemmNN<float, Source>{.a = product.a,
                                          .b = {product.b},
                                          .c = product.c,
                                          .columns = product.columns,
                                          .start = product.start,
                                          .epilogue = product.epilogue},
                    pack_rows<Words>(product.a));
}

/// C = Aᵀ·B.
template <class Words = BFloat16Words>
void gemm_bfloat16(const GemmTN<float>& product) {
  const Range rows = product.row_range();
  const GatheredRows<float> a = product.a.columns(rows.first, rows.count);
  using Source = InterleavedRows<Words>;
  gemm_words<Words>(
      a.count(),
      GemmNN<float, Source>{.a = a,
                            .b = {product.b},
                            .c = ScatteredRows<float>(product.c).slice(rows.first, rows.count),
                            .columns = product.columns,
                            .start = product.start},
      pack_columns<Words>(a));
}

/// gemm_serial() with operands rounded to a precision, if there is such a product; otherwise in
/// full precision.
template <class Product>
void gemm_serial(const Product& product, Precision precision) {
  if constexpr (requires { gemm_bfloat16(product); }) {
    if (precision == Precision::bfloat16) return gemm_bfloat16(product);
  }
  gemm_serial(product);
}

}  // namespace moe::detail

MOE_PACKETS_END
