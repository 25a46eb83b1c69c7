#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include "moe/indexed_vector.hpp"
#include "moe/matrix.hpp"
#include "moe/random.hpp"
#include "moe/routing/routing.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The arguments of a pass besides x, and which rows of x are tokens.

namespace moe {

/// A training pass of a gate or a layer over x (T x D).
///
///     layer.forward(x, tape, {.step = step, .valid = valid});
///
/// A row that is not valid is padding: it gets no slot and no gradient, does not count in any loss or
/// statistic, its numbers are not read, and its y is the layer's output activation of 0 (0 by default).
struct Pass {
  /// The number of the update: the same step draws the same noise.
  Step step;
  /// The rows of x are tokens first_token, first_token + 1, ... of a larger whole; keys the noise.
  std::uint32_t first_token = 0;
  /// T flags, 0 for padding; empty where every row is a token.
  std::span<const std::uint8_t> valid{};
  /// The larger batch that several processes share, or null where x is all of it.
  const SharedBatch* batch = nullptr;
  /// A factor of the gate's own losses, in tape.balance.loss and in backward(): 1/n for each of n
  /// micro-batches whose gradients add up to an update. Finite and at least 0.
  double loss_scale = 1;
  /// T x noise_columns() numbers, row by row, for the gate to use as noise instead of drawing it; or
  /// empty. See the gate for their range.
  std::span<const double> noise{};
  /// A factor of the noise, drawn or given, from 0 to 1: of n in noisy top-k scores, and of TopKGate's jitter. With 0
  /// noisy top-k chooses as evaluate() does, and TopKGate has no jitter; whether TopKGate draws or drops a second
  /// choice, and the capacities of training, do not depend on it. The scale s of the noise, from which the load of
  /// noisy top-k takes its probabilities, stays as it is.
  double noise_factor = 1;
  /// The number of sequences in the batch (in that of all processes, if they share one), all of the same
  /// number of rows, for a gate with places or losses by sequence (TopKGate). At most 2^31; 0 stands for the
  /// one in the gate's Config.
  Index sequences = 0;

  /// The key of the pass's random numbers.
  NoiseKey key() const { return {.step = step, .first_token = first_token}; }
};

/// A pass of evaluate(), without noise.
struct EvaluationPass {
  std::span<const std::uint8_t> valid{};  ///< see Pass
  const SharedBatch* batch = nullptr;     ///< see Pass
  Index sequences = 0;                    ///< see Pass
};

namespace detail {

/// Where the noise of a pass comes from.
struct NoiseSource {
  NoiseKey key;
  const double* given = nullptr;  ///< T x stride numbers instead of drawn ones, or null
  Index stride = 0;               ///< numbers of a row
  double factor = 1;              ///< Pass::noise_factor
};
inline NoiseSource noise_source(const Pass& pass, Index noise_columns) {
  return {pass.key(), pass.noise.empty() ? nullptr : pass.noise.data(), noise_columns,
          pass.noise_factor};
}

/// Throws std::invalid_argument unless there are no flags or one per row. `name` is that of the
/// gate or the layer.
inline void check_valid(const char* name, std::span<const std::uint8_t> valid, Index rows) {
  require(valid.empty() || static_cast<Index>(valid.size()) == rows, name, ": Pass.valid has ",
          valid.size(), " entries, x has ", rows, " rows");
}

/// Throws std::invalid_argument for a number of sequences below 0, or so large that a multiple of it might
/// overflow. `name` is as above.
inline void check_sequences(const char* name, Index sequences) {
  constexpr Index most = Index{1} << 31;
  require(sequences >= 0 && sequences <= most, name, ": Pass.sequences = ", sequences,
          ", must be from 0 to ", most);
}

/// N, the number of valid rows.
inline Index count_valid(std::span<const std::uint8_t> valid, Index rows) {
  return rows - std::count(valid.begin(), valid.end(), std::uint8_t{0});
}

}  // namespace detail

/// The rows of x that are tokens, N of T: those that are not padding. A gate computes only with these: its
/// token i is the i-th of them.
struct ValidTokens {
  Index rows = 0;             ///< T
  Index count = 0;            ///< N
  bool all = true;            ///< N = T; then there is no list
  IndexedVector<Index> list;  ///< N, their rows, ascending

  Index batch_rows = 0;   ///< T of the whole batch
  Index first_row = 0;    ///< the number of row 0 in that batch
  Index batch_count = 0;  ///< N of the whole batch

  /// The row of x that token i is, i from 0 to N − 1.
  Index row_of(Index token) const { return all ? token : list[token]; }
  /// The rows of all tokens, or null if they are all rows of x.
  const Index* row_list() const { return all ? nullptr : list.data(); }

  /// The tokens' rows of a matrix with T rows, to read: N rows.
  template <class Scalar>
  GatheredRows<Scalar> rows_of(const MatrixRef<Scalar>& x) const {
    return {x.data(), x.outerStride(), count, x.cols(), row_list()};
  }
  /// The tokens' rows of a matrix with T rows, to add to.
  template <class Scalar>
  ScatteredRows<Scalar> rows_of(Matrix<Scalar>& dx) const {
    return {dx.data(), dx.outerStride(), count, dx.cols(), row_list()};
  }
};

/// Sets `tokens` to the rows whose flag in Pass::valid is not 0, to all rows if there are no flags. T flags,
/// or none; `batch` is Pass::batch. O(T).
inline void find_valid_tokens(Index rows, std::span<const std::uint8_t> valid,
                              const SharedBatch* batch, ValidTokens& tokens) {
  tokens.rows = rows;
  tokens.count = detail::count_valid(valid, rows);
  tokens.all = tokens.count == rows;
  if (tokens.all) {
    tokens.list.clear();
  } else {
    detail::resize(tokens.list, tokens.count);
    Index token = 0;
    for (Index row = 0; row < rows; ++row) {
      if (valid[detail::to_size(row)] != 0) tokens.list[token++] = row;
    }
  }
  tokens.batch_rows = batch != nullptr ? batch->rows() : rows;
  tokens.first_row = batch != nullptr ? batch->first_row() : 0;
  tokens.batch_count = batch != nullptr ? batch->tokens() : tokens.count;
}

namespace detail {

/// Turns the token_offsets of N tokens into those of T rows: padding has no slots.
template <class Scalar>
void insert_padding(const ValidTokens& tokens, Routing<Scalar>& routing) {
  if (tokens.all) return;
  auto& offsets = routing.token_offsets;
  offsets.resize(to_size(tokens.rows) + 1);
  Index token = tokens.count;
  for (Index row = tokens.rows; row > 0; --row) {
    offsets[row] = offsets[token];
    if (token > 0 && tokens.list[token - 1] == row - 1) --token;
  }
}

/// Throws std::invalid_argument for a pass that does not fit `rows` rows. `name` is that of the gate or
/// the layer.
inline void check_pass(const char* name, const Pass& pass, Index rows) {
  require(std::isfinite(pass.loss_scale) && pass.loss_scale >= 0, name,
          ": Pass.loss_scale = ", pass.loss_scale, ", must be finite and at least 0");
  require(pass.noise_factor >= 0 && pass.noise_factor <= 1, name,
          ": Pass.noise_factor = ", pass.noise_factor, ", must be from 0 to 1");
  check_valid(name, pass.valid, rows);
  check_sequences(name, pass.sequences);
}
inline void check_noise(const char* name, const Pass& pass, Index rows, Index noise_columns) {
  require(pass.noise.empty() || static_cast<Index>(pass.noise.size()) == rows * noise_columns, name,
          ": Pass.noise has ", pass.noise.size(), " numbers, must be ", rows, " x ", noise_columns,
          " or none");
}

}  // namespace detail
}  // namespace moe
