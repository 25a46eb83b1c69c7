#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "moe/parallel.hpp"
#include "moe/random.hpp"

namespace moe {

/// Inverted dropout: in training each entry of x (T x D) becomes 0 with probability `rate` and is
/// otherwise multiplied by 1/(1 - rate), so that its mean stays; evaluation is the identity.
/// N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A Simple Way
/// to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
///
/// Which entries are dropped is a function of (seed, step, token, column), the same for float and
/// double. A dropped entry is multiplied by 0, so NaN and infinity become NaN.
template <class Scalar = float>
class Dropout {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    double rate = 0;  ///< in [0, 1)

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("rate", self.rate);
    }
  };

  /// The caller's scratch. The mask could be drawn again from the key, but reading a byte per entry
  /// is several times faster.
  struct Tape {
    Matrix<Scalar> y;                ///< T x D
    std::vector<std::uint8_t> kept;  ///< T x D, 1 or 0
    Matrix<Scalar> dx;               ///< T x D
  };

  /// Throws std::invalid_argument for a rate out of range.
  Dropout(const Config& config, std::uint64_t seed) : config_(config), seed_(seed) {
    detail::require(config.rate >= 0 && config.rate < 1, "Dropout::Config.rate = ", config.rate,
                    ", must be in [0, 1)");
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// Training pass: returns tape.y (T x D). The same key drops the same entries. Throws
  /// std::invalid_argument if x overlaps tape.y.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, Tape& tape, const NoiseKey& key) const {
    detail::require_apart("Dropout::forward", "x", x, {tape.y});
    detail::resize(tape.y, x.rows(), x.cols());
    detail::resize(tape.kept, x.size());
    for_row_blocks(x.rows(), x.cols(), [&](Index row) {
      std::uint8_t* kept = tape.kept.data() + row * x.cols();
      draw(key, row, x.cols(), kept);
      apply(x.cols(), x.data() + row * x.outerStride(), kept, tape.y.row(row).data());
    });
    return tape.y;
  }

  /// Returns dx = dy ⊙ mask·1/(1 - rate), with the mask of forward(). Throws std::invalid_argument unless
  /// dy has the shape of x and the last pass on the tape was a forward(), or if dy overlaps tape.dx.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape) const {
    detail::require(dy.rows() == tape.y.rows(), "Dropout::backward: dy has ", dy.rows(),
                    " rows, x had ", tape.y.rows());
    detail::require(dy.cols() == tape.y.cols(), "Dropout::backward: dy has ", dy.cols(),
                    " columns, x had ", tape.y.cols());
    detail::require(static_cast<Index>(tape.kept.size()) == dy.size(),
                    "Dropout::backward: the last pass on this tape was an evaluation");
    detail::require_apart("Dropout::backward", "dy", dy, {tape.dx});
    detail::resize(tape.dx, dy.rows(), dy.cols());
    for_row_blocks(dy.rows(), dy.cols(), [&](Index row) {
      apply(dy.cols(), dy.data() + row * dy.outerStride(), tape.kept.data() + row * dy.cols(),
            tape.dx.row(row).data());
    });
    return tape.dx;
  }

  /// tape.y = x. Saves nothing for backward(). Throws std::invalid_argument if x is a part of tape.y, but not
  /// all of it.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, Tape& tape) const {
    tape.kept.clear();
    detail::copy_matrix(x, tape.y);
    return tape.y;
  }
  /// A copy of x.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x) const { return x; }

  /// It has no parameters.
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}

 private:
  void draw(const NoiseKey& key, Index row, Index columns, std::uint8_t* kept) const {
    if (config_.rate == 0) {
      std::fill_n(kept, columns, std::uint8_t{1});
      return;
    }
    const auto dropped_below = static_cast<std::uint32_t>(config_.rate * 0x1p32);
    for (Index column = 0; column < columns; column += 4) {
      const auto words = detail::noise_words(seed_, key, row, column / 4);
      const Index count = std::min<Index>(4, columns - column);
      for (Index i = 0; i < count; ++i) {
        kept[column + i] = words[detail::to_size(i)] >= dropped_below;
      }
    }
  }

  void apply(Index columns, const Scalar* from, const std::uint8_t* kept, Scalar* to) const {
    const auto scale = static_cast<Scalar>(1 / (1 - config_.rate));
    for (Index i = 0; i < columns; ++i) to[i] = from[i] * (kept[i] ? scale : Scalar{0});
  }

  template <class F>
  static void for_row_blocks(Index rows, Index columns, const F& f) {
    const Index block = std::max<Index>(1, (Index{1} << 13) / std::max<Index>(1, columns));
    parallel_for_blocks(rows, block, function_work(rows * columns), [&](Index first, Index count) {
      for (Index row = first; row < first + count; ++row) f(row);
    });
  }

  Config config_;
  std::uint64_t seed_;
};

}  // namespace moe
