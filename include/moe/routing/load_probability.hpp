#pragma once

#include <algorithm>

#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/math.hpp"
#include "moe/matrix.hpp"
#include "moe/routing/routing.hpp"

/// \file
/// The probability that an expert is among a row's K largest when its own noise is drawn again
/// [S17 eq. 8-9], whose sums over rows are the load.

namespace moe::detail {

/// What a NoisyTopK of E experts saves of N rows for backward. Several NoisyTopK may share a tape,
/// each with rows of its own.
template <class Scalar>
struct NoisyTopKTape {
  bool has_noise = false;      ///< if false, only clean and best are filled
  Matrix<Scalar> clean;        ///< c, N x E
  Matrix<Scalar> raw;          ///< x·W_noise, N x E
  Matrix<Scalar> scale;        ///< s, N x E
  Matrix<Scalar> noise;        ///< n, N x E
  Matrix<Scalar> noisy;        ///< h, N x E
  Matrix<Scalar> probability;  ///< P, N x E

  /// N x min(K + 1, E): the experts with the largest h of each row, the largest first. The K-th is the
  /// threshold of experts outside the top K, the (K+1)-th that of experts inside.
  IndexedVector<Index> best;

  Matrix<Scalar> dclean;  ///< N x E
  Matrix<Scalar> draw;    ///< N x E
};

/// P(x, i) = Φ(z) with z = (c_i − kth_excluding(h, K, i)) / s_i [S17 eq. 9], K < E. The threshold
/// kth_excluding is the K-th largest h for an expert outside the top K, the (K+1)-th for one inside.
/// Calls for different rows may run at once.
template <class Scalar>
class LoadProbability {
 public:
  using Tape = NoisyTopKTape<Scalar>;

  LoadProbability(Index experts, Index top_k)
      : experts_(experts), top_k_(top_k), candidates_(std::min(top_k + 1, experts)) {}

  /// Fills rows of tape.probability.
  void forward(Range rows, const Routing<Scalar>& routing, Tape& tape) const {
    using P = Packet<Scalar>;
    set_thresholds(rows, routing, tape, tape.probability);
    Scalar* probability = row_data(tape.probability, rows.first);
    map(
        rows.count * experts_, probability,
        [](const P& threshold, const P& clean, const P& scale) {
          using namespace Eigen::internal;
          return normal_cdf<Scalar>(pdiv(psub(clean, threshold), scale));
        },
        probability, row_data(tape.clean, rows.first), row_data(tape.scale, rows.first));
  }

  /// Sets rows of tape.dclean and tape.draw to the gradients w.r.t. c and s, given dload = ∂L/∂Load (E).
  /// With j the expert whose h is the threshold and φ the normal density: ∂P/∂c_i = φ(z)/s_i,
  /// ∂P/∂s_i = −φ(z)·z/s_i and ∂P/∂h_j = −φ(z)/s_i, which goes on to c_j and s_j by
  /// h_j = c_j + n_j·s_j.
  void backward(Range rows, const Scalar* dload, const Routing<Scalar>& routing, Tape& tape) const {
    using P = Packet<Scalar>;
    using namespace Eigen::internal;
    const Scalar* clean = row_data(tape.clean, rows.first);
    Scalar* dclean = row_data(tape.dclean, rows.first);
    Scalar* draw = row_data(tape.draw, rows.first);
    const Scalar* scale = row_data(tape.scale, rows.first);

    set_thresholds(rows, routing, tape, tape.draw);
    for_each_row(rows,
                 [&](Index row) { std::copy_n(dload, experts_, row_data(tape.dclean, row)); });
    for_each_packet<Scalar>(rows.count * experts_, [&](const PacketSpan& at) {
      const P s = at.load(scale);
      const P threshold = at.load(draw);  // until it is written over below
      const P z = pdiv(psub(at.load(clean), threshold), s);
      const P d = pdiv(pmul(at.load(dclean), normal_density<Scalar>(z)), s);
      at.store(dclean, d);
      at.store(draw, pmul(pnegate(d), z));
    });

    for_each_row(rows, [&](Index row) {
      const Scalar* d = row_data(tape.dclean, row);
      Scalar from_inside{0};
      Scalar from_outside{0};
      Index next = 0;
      for_each_chosen(routing, row, [&](Index i) {  // in ascending order, the others between them
        from_outside += sum(i - next, d + next);
        from_inside += d[i];
        next = i + 1;
      });
      from_outside += sum(experts_ - next, d + next);
      const auto pass_on = [&](Index i, Scalar from) {
        tape.dclean(row, i) -= from;
        tape.draw(row, i) -= from * tape.noise(row, i);
      };
      pass_on(last_inside(tape, row), from_outside);
      pass_on(first_outside(tape, row), from_inside);
    });
  }

 private:
  /// Sets rows of `threshold` (N x E) to the threshold of each expert.
  void set_thresholds(Range rows, const Routing<Scalar>& routing, const Tape& tape,
                      Matrix<Scalar>& threshold) const {
    for_each_row(rows, [&](Index row) {
      Scalar* of = row_data(threshold, row);
      std::fill_n(of, experts_, tape.noisy(row, last_inside(tape, row)));
      const Scalar inside = tape.noisy(row, first_outside(tape, row));
      for_each_chosen(routing, row, [&](Index i) { of[i] = inside; });
    });
  }

  const Index* best_of(const Tape& tape, Index row) const {
    return tape.best.data() + row * candidates_;
  }
  Index last_inside(const Tape& tape, Index row) const { return best_of(tape, row)[top_k_ - 1]; }
  Index first_outside(const Tape& tape, Index row) const {
    return best_of(tape, row)[candidates_ - 1];
  }

  template <class F>
  void for_each_chosen(const Routing<Scalar>& routing, Index row, F&& f) const {
    for (Index k = 0; k < top_k_; ++k) f(routing.expert[row * top_k_ + k]);
  }

  template <class F>
  static void for_each_row(Range rows, F&& f) {
    for (Index row = rows.first; row < rows.first + rows.count; ++row) f(row);
  }

  Index experts_;
  Index top_k_;
  Index candidates_;  ///< numbers of a row in tape.best
};

}  // namespace moe::detail
