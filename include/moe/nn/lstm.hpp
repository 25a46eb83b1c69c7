#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/math.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

namespace moe {

namespace detail {

/// One step of one sequence. z (4H) holds x·W_ih + h·W_hh + b and becomes the activations i, f, g, o:
///
///     i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o)      g = tanh(z_g)
///     c = f ⊙ c_before + i ⊙ g                                h = o ⊙ tanh(c)
template <class Scalar>
void lstm_step(Index H, Scalar* z, const Scalar* c_before, Scalar* c, Scalar* h) {
  using namespace Eigen::internal;
  using P = Packet<Scalar>;
  const auto sigmoid_of = [](const P& a) { return moe::detail::sigmoid<Scalar>(a); };
  const auto tanh_of = [](const P& a) { return moe::detail::tanh<Scalar>(a); };
  Scalar* i = z;
  Scalar* f = z + H;
  Scalar* g = z + 2 * H;
  Scalar* o = z + 3 * H;
  moe::detail::map(2 * H, i, sigmoid_of, i);  // and f
  moe::detail::map(H, g, tanh_of, g);
  moe::detail::map(H, o, sigmoid_of, o);
  const auto next_cell = [](const P& pi, const P& pf, const P& pg, const P& before) {
    return pmadd(pf, before, pmul(pi, pg));
  };
  moe::detail::map(H, c, next_cell, i, f, g, c_before);
  const auto next_hidden = [](const P& po, const P& pc) {
    return pmul(po, moe::detail::tanh<Scalar>(pc));
  };
  moe::detail::map(H, h, next_hidden, o, c);
}

/// The backward of lstm_step(). On entry dh is the gradient with respect to h, from dy and the
/// steps after, and dc that with respect to c from the steps after; on return dc is the gradient
/// with respect to c_before, and dz that with respect to z.
///
///     dc += dh ⊙ o ⊙ (1 - tanh²(c)) = dh ⊙ (o - h ⊙ tanh(c))
///     dz_i = dc ⊙ g ⊙ i ⊙ (1 - i)       dz_f = dc ⊙ c_before ⊙ f ⊙ (1 - f)
///     dz_g = dc ⊙ i ⊙ (1 - g²)          dz_o = dh ⊙ tanh(c) ⊙ o ⊙ (1 - o) = dh ⊙ h ⊙ (1 - o)
///     dc_before = dc ⊙ f
template <class Scalar>
void lstm_step_backward(Index H, const Scalar* activations, const Scalar* c_before, const Scalar* c,
                        const Scalar* h, const Scalar* dh, Scalar* dc, Scalar* dz) {
  using namespace Eigen::internal;
  using P = Packet<Scalar>;
  const Scalar* i = activations;
  const Scalar* f = activations + H;
  const Scalar* g = activations + 2 * H;
  const Scalar* o = activations + 3 * H;
  const P one = broadcast(Scalar{1});
  const auto through_cell = [](const P& pc, const P& ph, const P& po, const P& pdh, const P& pdc) {
    return pmadd(pdh, psub(po, pmul(ph, moe::detail::tanh<Scalar>(pc))), pdc);
  };
  const auto through_sigmoid = [one](const P& d, const P& factor, const P& s) {
    return pmul(pmul(d, factor), pmul(s, psub(one, s)));
  };
  const auto through_tanh = [one](const P& d, const P& factor, const P& t) {
    return pmul(pmul(d, factor), pmul(psub(one, t), padd(one, t)));
  };
  const auto through_output = [one](const P& d, const P& ph, const P& po) {
    return pmul(pmul(d, ph), psub(one, po));
  };
  const auto through_forget_gate = [](const P& d, const P& pf) { return pmul(d, pf); };
  moe::detail::map(H, dc, through_cell, c, h, o, dh, dc);
  moe::detail::map(H, dz, through_sigmoid, dc, g, i);
  moe::detail::map(H, dz + H, through_sigmoid, dc, c_before, f);
  moe::detail::map(H, dz + 2 * H, through_tanh, dc, i, g);
  moe::detail::map(H, dz + 3 * H, through_output, dh, h, o);
  moe::detail::map(H, dc, through_forget_gate, dc, f);
}

}  // namespace detail

/// Long short-term memory with forget gates, over B sequences side by side.
/// S. Hochreiter, J. Schmidhuber, "Long Short-Term Memory", Neural Computation 9, 1997;
/// F. Gers, J. Schmidhuber, F. Cummins, "Learning to Forget", Neural Computation 12, 2000.
///
/// Rows are time-major: row t·B + b of x and y is step t of sequence b, so T = steps·B. B is the number
/// of rows of the state. A pass begins with the given state and replaces it by the state after its last
/// step, so that long sequences can be trained in pieces; the gradient stops at the first step of a
/// piece (truncated backpropagation through time).
///
///     moe::LSTM<> lstm({.inputs = 512, .hidden = 512}, seed);
///     auto state = lstm.initial_state(32);
///     for (...) {
///       const auto& y = lstm.forward(x, state, tape);   // state is now that after x
///       const auto& dx = lstm.backward(dy, tape);
///     }
///
/// Names and the order of the gates (i, f, g, o) are PyTorch's; its matrices are the transposes, and
/// the sum of its two biases is the bias here. Weights are uniform in ±1/√hidden initially. The bias is
/// 1 for the forget gates, so that a new network remembers, and 0 for the others.
template <class Scalar = float>
class LSTM {
 public:
  /// The configuration; the constructor checks it.
  struct Config {
    Index inputs = 0;  ///< at least 1
    Index hidden = 0;  ///< H, at least 1

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("inputs", self.inputs);
      visit("hidden", self.hidden);
    }
  };

  /// What a sequence carries from step to step, or the gradient with respect to it.
  struct State {
    Matrix<Scalar> hidden;  ///< B x H
    Matrix<Scalar> cell;    ///< B x H
  };

  /// The caller's scratch: what one pass computes and what its backward needs.
  struct Tape {
    Matrix<Scalar> y;       ///< T x H
    bool trained = false;   ///< whether the last pass was a forward()
    Matrix<Scalar> x;       ///< T x inputs, a copy
    State initial;          ///< B x H, a copy
    Matrix<Scalar> gates;   ///< T x 4H, activations
    Matrix<Scalar> cell;    ///< T x H
    Matrix<Scalar> dgates;  ///< T x 4H, the gradient w.r.t. the pre-activations
    Matrix<Scalar> dx;      ///< T x inputs, the gradient w.r.t. x
    State dstate;           ///< B x H, the gradient w.r.t. the initial state
  };

  Parameter<Scalar> weight_ih;  ///< inputs x 4H
  Parameter<Scalar> weight_hh;  ///< H x 4H
  Parameter<Scalar> bias;       ///< 1 x 4H

  /// Throws std::invalid_argument for a configuration out of range.
  LSTM(const Config& config, std::uint64_t seed) : config_(config) {
    detail::require(config.inputs >= 1, "LSTM::Config.inputs = ", config.inputs,
                    ", must be at least 1");
    detail::require(config.hidden >= 1, "LSTM::Config.hidden = ", config.hidden,
                    ", must be at least 1");
    const Index H = config.hidden;
    const Scalar bound = Scalar{1} / std::sqrt(static_cast<Scalar>(H));
    weight_ih = Parameter<Scalar>(config.inputs, 4 * H);
    weight_hh = Parameter<Scalar>(H, 4 * H);
    bias = Parameter<Scalar>(1, 4 * H);
    fill_uniform(weight_ih.value, bound, derive_seed(seed, 0));
    fill_uniform(weight_hh.value, bound, derive_seed(seed, 1));
    bias.value.middleCols(H, H).setOnes();
  }

  /// The configuration.
  const Config& config() const { return config_; }

  /// The state before the first step of `sequences` sequences: zeros.
  State initial_state(Index sequences) const {
    return {Matrix<Scalar>::Zero(sequences, config_.hidden),
            Matrix<Scalar>::Zero(sequences, config_.hidden)};
  }

  /// Training pass: returns tape.y (T x H) and sets `state` to the state after the last step. Throws
  /// std::invalid_argument unless x is T x inputs, T a multiple of B, and the state B x H, or if x is a part of
  /// tape.x, but not all of it.
  const Matrix<Scalar>& forward(const MatrixRef<Scalar>& x, State& state, Tape& tape) const {
    check_input(x, state);
    detail::copy_matrix(x, tape.x);  // first, since x may be this tape's y of a pass before
    run_all(tape.x, state, tape);
    tape.trained = true;
    return tape.y;
  }

  /// Adds to the gradients; returns dx (T x inputs), and sets tape.dstate to the gradient with respect to
  /// the initial state. `dfinal` is the gradient with respect to the final state, from whatever
  /// used that state; empty means zero. If a decoder begins with an encoder's final state:
  ///
  ///     decoder.backward(dy, decoder_tape);
  ///     encoder.backward(dy_encoder, encoder_tape, decoder_tape.dstate);
  ///
  /// Throws std::invalid_argument unless dy is T x H, dfinal B x H, and the last pass on the tape was a
  /// forward(), or if dy overlaps tape.dx, tape.dgates or tape.dstate.
  const Matrix<Scalar>& backward(const MatrixRef<Scalar>& dy, Tape& tape,
                                 const State& dfinal = {}) {
    const Index H = config_.hidden;
    const Index sequences = tape.initial.hidden.rows();
    detail::require(tape.trained && tape.x.cols() == config_.inputs && tape.y.cols() == H,
                    "LSTM::backward without a forward pass on this tape");
    detail::require(dy.rows() == tape.x.rows(), "LSTM::backward: dy has ", dy.rows(),
                    " rows, x had ", tape.x.rows());
    detail::require(dy.cols() == H, "LSTM::backward: dy has ", dy.cols(), " columns, hidden is ",
                    H);
    detail::check_shapes(*this, "LSTM");
    detail::require_apart("LSTM::backward", "dy", dy,
                          {tape.dx, tape.dgates, tape.dstate.hidden, tape.dstate.cell});
    if (dfinal.hidden.size() == 0 && dfinal.cell.size() == 0) {
      detail::resize_to_zero(tape.dstate.hidden, sequences, H);
      detail::resize_to_zero(tape.dstate.cell, sequences, H);
    } else {
      check_state(dfinal, sequences);
      copy_state(dfinal, tape.dstate);
    }
    detail::resize(tape.dgates, dy.rows(), 4 * H);
    parallel_for_blocks(sequences, sequences_in_task(dy.rows(), sequences),
                        recurrent_work(dy.rows()),
                        [&](Index first, Index count) { run_back(dy, first, count, tape); });

    // The rows of the hidden state before each step are the initial state, then y.
    const Matrix<Scalar>& dgates = tape.dgates;
    const Index later = dy.rows() > 0 ? dy.rows() - sequences : 0;
    if (weight_ih.trained) {
      detail::gemm(detail::GemmTN<Scalar>{.a = tape.x,
                                          .b = dgates,
                                          .c = view(weight_ih.gradient()),
                                          .start = detail::Start::accumulate});
    }
    if (weight_hh.trained && dy.rows() > 0) {
      detail::gemm(detail::GemmTN<Scalar>{.a = tape.initial.hidden,
                                          .b = rows_of(dgates, 0, sequences),
                                          .c = view(weight_hh.gradient()),
                                          .start = detail::Start::accumulate});
      detail::gemm(detail::GemmTN<Scalar>{.a = rows_of(tape.y, 0, later),
                                          .b = rows_of(dgates, sequences, later),
                                          .c = view(weight_hh.gradient()),
                                          .start = detail::Start::accumulate});
    }
    if (bias.trained) {
      detail::add_column_sums(GatheredRows<Scalar>(dgates), bias.gradient());
    }
    detail::resize(tape.dx, dy.rows(), config_.inputs);
    detail::gemm(detail::GemmNT<Scalar>{.a = dgates, .b = weight_ih.value, .c = tape.dx});
    return tape.dx;
  }

  /// forward() without the copy of x that backward() needs. Throws std::invalid_argument for shapes
  /// that forward() refuses, and if x overlaps tape.y, tape.gates, tape.cell or tape.initial.
  const Matrix<Scalar>& evaluate(const MatrixRef<Scalar>& x, State& state, Tape& tape) const {
    check_input(x, state);
    detail::require_apart("LSTM::evaluate", "x", x,
                          {tape.y, tape.gates, tape.cell, tape.initial.hidden, tape.initial.cell});
    tape.trained = false;
    run_all(x, state, tape);
    return tape.y;
  }

  /// The same with a tape of its own, which allocates.
  Matrix<Scalar> evaluate(const MatrixRef<Scalar>& x, State& state) const {
    Tape tape;
    evaluate(x, state, tape);
    return std::move(tape.y);
  }

  /// "weight_ih", "weight_hh" and "bias".
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight_ih", self.weight_ih);
    visit("weight_hh", self.weight_hh);
    visit("bias", self.bias);
  }

 private:
  void check_input(const MatrixRef<Scalar>& x, const State& state) const {
    detail::check_shapes(*this, "LSTM");
    const Index sequences = state.hidden.rows();
    detail::require(x.cols() == config_.inputs, "LSTM: x has ", x.cols(),
                    " columns, the layer has ", config_.inputs, " inputs");
    check_state(state, sequences);
    detail::require(sequences > 0 ? x.rows() % sequences == 0 : x.rows() == 0, "LSTM: x has ",
                    x.rows(), " rows, not a multiple of the ", sequences, " sequences");
  }

  void check_state(const State& state, Index sequences) const {
    const auto check = [&](const char* name, const Matrix<Scalar>& part) {
      detail::require(part.rows() == sequences && part.cols() == config_.hidden, "LSTM: state.",
                      name, " is ", part.rows(), " x ", part.cols(), ", must be ", sequences, " x ",
                      config_.hidden);
    };
    check("hidden", state.hidden);
    check("cell", state.cell);
  }

  static void copy_state(const State& from, State& to) {
    detail::copy_matrix<Scalar>(from.hidden, to.hidden);
    detail::copy_matrix<Scalar>(from.cell, to.cell);
  }

  void run_all(const MatrixRef<Scalar>& x, State& state, Tape& tape) const {
    const Index sequences = state.hidden.rows();
    copy_state(state, tape.initial);
    detail::resize(tape.gates, x.rows(), 4 * config_.hidden);
    detail::resize(tape.cell, x.rows(), config_.hidden);
    detail::resize(tape.y, x.rows(), config_.hidden);
    detail::gemm(detail::GemmNN<Scalar>{
        .a = x, .b = weight_ih.value, .c = tape.gates, .bias = {.values = bias.value.data()}});
    parallel_for_blocks(sequences, sequences_in_task(x.rows(), sequences), recurrent_work(x.rows()),
                        [&](Index first, Index count) { run(first, count, tape); });
    if (x.rows() > 0) {
      detail::copy_matrix<Scalar>(tape.y.bottomRows(sequences), state.hidden);
      detail::copy_matrix<Scalar>(tape.cell.bottomRows(sequences), state.cell);
    }
  }

  Work recurrent_work(Index rows) const { return {rows * 4 * config_.hidden * config_.hidden}; }

  /// Sequences are independent, so a worker computes all steps of some of them without waiting for others.
  /// On one worker there is one task.
  Index sequences_in_task(Index rows, Index sequences) const {
    return worker_count(recurrent_work(rows)) == 1 ? std::max<Index>(1, sequences) : 16;
  }

  /// The state before step t, of sequences from `first` on.
  struct Before {
    const Matrix<Scalar>& hidden;
    const Matrix<Scalar>& cell;
    Index row;
  };
  static Before before(const Tape& tape, Index t, Index first) {
    if (t == 0) return {tape.initial.hidden, tape.initial.cell, first};
    return {tape.y, tape.cell, (t - 1) * tape.initial.hidden.rows() + first};
  }

  /// All steps of sequences [first, first + count), whose rows of `gates` hold x·W_ih + b.
  void run(Index first, Index count, Tape& tape) const {
    const Index sequences = tape.initial.hidden.rows();
    for (Index t = 0; t < tape.y.rows() / sequences; ++t) {
      const Index row = t * sequences + first;
      const Before from = before(tape, t, first);
      detail::gemm(detail::GemmNN<Scalar>{.a = rows_of(from.hidden, from.row, count),
                                          .b = weight_hh.value,
                                          .c = rows_of(tape.gates, row, count),
                                          .start = detail::Start::accumulate});
      for (Index b = 0; b < count; ++b) {
        detail::lstm_step(config_.hidden, tape.gates.row(row + b).data(),
                          from.cell.row(from.row + b).data(), tape.cell.row(row + b).data(),
                          tape.y.row(row + b).data());
      }
    }
  }

  /// The gradient of run(), from the last step to the first: fills `dgates` and moves `dstate` from
  /// the final state to the initial one.
  void run_back(const MatrixRef<Scalar>& dy, Index first, Index count, Tape& tape) const {
    const Index sequences = tape.initial.hidden.rows();
    for (Index t = dy.rows() / sequences - 1; t >= 0; --t) {
      const Index row = t * sequences + first;
      const Before from = before(tape, t, first);
      for (Index b = 0; b < count; ++b) {
        Scalar* dh = tape.dstate.hidden.row(first + b).data();
        detail::add_scaled(config_.hidden, Scalar{1}, dy.data() + (row + b) * dy.outerStride(), dh);
        detail::lstm_step_backward(
            config_.hidden, tape.gates.row(row + b).data(), from.cell.row(from.row + b).data(),
            tape.cell.row(row + b).data(), tape.y.row(row + b).data(), dh,
            tape.dstate.cell.row(first + b).data(), tape.dgates.row(row + b).data());
      }
      detail::gemm(detail::GemmNT<Scalar>{.a = rows_of(tape.dgates, row, count),
                                          .b = weight_hh.value,
                                          .c = rows_of(tape.dstate.hidden, first, count)});
    }
  }

  Config config_;
};

}  // namespace moe
