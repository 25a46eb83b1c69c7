#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>

#include "moe/kernels/packet.hpp"
#include "moe/parameter.hpp"

/// \file
/// Expert<Network>: a network over its slice of the slots, and what it asks of the network.
///
/// A slot's output enters the layer scaled by the gate's weight w, so an expert has two gradients
/// to give for it: that of its row of x, and that of w, which is ⟨network(x), dy⟩. A network that
/// knows nothing of weights gets them handled by Expert; one that can do better says so
/// (GatheringNetwork).

namespace moe {

/// The largest number of rows that a network is ever handed at once: longer slices come in pieces,
/// so that a piece and its scratch stay in the second-level cache.
inline constexpr Index expert_block_rows = 128;

/// A plain network, what a user writes: dense rows in, dense rows out, nothing about routing.
///
///     Network(config, seed)           config.width is D; 0 inside a layer's configuration stands
///                                     for the layer's width
///     tape_width()                    how many numbers a row must keep for backward
///     forward(x, kept, y) const       fills kept (n x tape_width()) and y (n x D) from x (n x D)
///     evaluate(x, y) const            the same without kept
///     backward(x, kept, dy, dx)       adds to the parameters' gradients, fills dx (n x D)
///     visit_parameters(self, visit)   see for_each_parameter()
///
/// n is at most expert_block_rows. Rows must not influence each other; where even the last bit must
/// not depend on n, mind that Eigen's own product treats a single row differently from several.
/// The views are Eigen maps, so `y = x * weight` is a whole forward pass.
template <class N>
concept PlainNetwork = requires(const N& network, N& trained,
                                ConstMatrixView<typename N::Scalar> in,
                                MatrixView<typename N::Scalar> out) {
  { network.tape_width() } -> std::same_as<Index>;
  network.forward(in, out, out);
  network.evaluate(in, out);
  trained.backward(in, in, in, out);
};

/// A network that gathers its rows of x and dy itself and applies the slots' weights inside, so
/// that neither outputs nor gathered inputs are ever kept. FeedForward is one.
///
///     forward(x, kept, y, scratch) const
///     evaluate(x, y, scratch) const
///     backward(x, kept, dy, weight, dx, dweight, scratch)
///
/// dy is the gradient of the weighted sum: dx = weight·(network's dx for dy), and
/// dweight = ⟨network(x), dy⟩. `Scratch` is default-constructible and keeps its memory; a member
/// reserve(scratch) const, which takes it all at once, is optional.
// clang-format off
template <class N>
concept GatheringNetwork =
    requires { typename N::Scratch; } &&
    requires(const N& network, N& trained, const GatheredRows<typename N::Scalar>& rows,
             ConstMatrixView<typename N::Scalar> kept, MatrixView<typename N::Scalar> out,
             const typename N::Scalar* weight, typename N::Scalar* dweight,
             typename N::Scratch& scratch) {
      { network.tape_width() } -> std::same_as<Index>;
      network.forward(rows, out, out, scratch);
      network.evaluate(rows, out, scratch);
      trained.backward(rows, kept, rows, weight, out, dweight, scratch);
    };

/// Either kind of network.
template <class N>
concept ExpertNetwork =
    requires(typename N::Config config) {
      typename N::Scalar;
      { config.width } -> std::convertible_to<Index>;
    } &&
    std::constructible_from<N, const typename N::Config&, std::uint64_t> &&
    requires(N& network) { N::visit_parameters(network, detail::AnyVisitor{}); } &&
    (PlainNetwork<N> || GatheringNetwork<N>);
// clang-format on

/// A network over its slice of the slots. `Expert<FeedForward>` is float,
/// `Expert<FeedForward, double>` double; a user's network is a class template over its scalar too.
template <template <class> class Network, class Scalar_ = float>
requires ExpertNetwork<Network<Scalar_>>
class Expert {
  using Net = Network<Scalar_>;
  static constexpr bool gathers = GatheringNetwork<Net>;

  struct PlainScratch {
    Matrix<Scalar_> x;
    Matrix<Scalar_> dy;
  };
  template <class N>
  struct ScratchOf {
    using Type = PlainScratch;
  };
  template <GatheringNetwork N>
  struct ScratchOf<N> {
    using Type = typename N::Scratch;
  };

 public:
  using Scalar = Scalar_;
  using Config = typename Net::Config;
  using Scratch = typename ScratchOf<Net>::Type;

  /// Whether the network multiplies by the library's products, which may be split over workers
  /// without a change of bits; of a plain network nothing is known.
  static constexpr bool splits_products = gathers;

  explicit Expert(const Config& config, std::uint64_t seed = 0)
      : width_(config.width), network_(config, seed) {}

  const Net& network() const { return network_; }
  Net& network() { return network_; }

  /// Numbers that a slot keeps between forward and backward.
  Index tape_width() const { return network_.tape_width() + (gathers ? 0 : width_); }

  /// Readies the memory of a worker that may get its first rows in a later pass only.
  void reserve(Scratch& scratch) const {
    if constexpr (!gathers) {
      scratch.x.resize(expert_block_rows, width_);
      scratch.dy.resize(expert_block_rows, width_);
    } else if constexpr (requires { network_.reserve(scratch); }) {
      network_.reserve(scratch);
    }
  }

  /// y (n x D) = network of the rows x, whatever n; fills kept (n x tape_width()).
  void forward(const GatheredRows<Scalar>& x, MatrixView<Scalar> kept, MatrixView<Scalar> y,
               Scratch& scratch) const {
    for_each_block(x.count(), [&](Index first, Index count) {
      if constexpr (gathers) {
        network_.forward(x.slice(first, count), block_of(kept, first, count),
                         block_of(y, first, count), scratch);
      } else {
        // A plain network cannot tell ⟨network(x), dy⟩ in backward, so its output is kept as well.
        const MatrixView<Scalar> rows = block_of(kept, first, count);
        const MatrixView<Scalar> output = columns_of<Scalar>(rows, network_.tape_width(), width_);
        MatrixView<Scalar> to = block_of(y, first, count);
        network_.forward(gather(x.slice(first, count), scratch.x),
                         columns_of<Scalar>(rows, 0, network_.tape_width()), to);
        copy(to, output);
      }
    });
  }

  /// y (n x D) = network of the rows x, keeping nothing.
  void evaluate(const GatheredRows<Scalar>& x, MatrixView<Scalar> y, Scratch& scratch) const {
    for_each_block(x.count(), [&](Index first, Index count) {
      if constexpr (gathers) {
        network_.evaluate(x.slice(first, count), block_of(y, first, count), scratch);
      } else {
        network_.evaluate(gather(x.slice(first, count), scratch.x), block_of(y, first, count));
      }
    });
  }

  /// From dy, the gradient of the weighted sum of slots, row by row: dx (n x D), which contains the
  /// weight already, and dweight (n). Adds to the gradients of the network's parameters, blocks of
  /// rows in ascending order.
  void backward(const GatheredRows<Scalar>& x, ConstMatrixView<Scalar> kept,
                const GatheredRows<Scalar>& dy, const Scalar* weight, MatrixView<Scalar> dx,
                Scalar* dweight, Scratch& scratch) {
    for_each_block(x.count(), [&](Index first, Index count) {
      const ConstMatrixView<Scalar> rows = block_of(kept, first, count);
      if constexpr (gathers) {
        network_.backward(x.slice(first, count), rows, dy.slice(first, count), weight + first,
                          block_of(dx, first, count), dweight + first, scratch);
      } else {
        const ConstMatrixView<Scalar> output =
            columns_of<Scalar>(rows, network_.tape_width(), width_);
        MatrixView<Scalar> dy_rows = gather_into(dy.slice(first, count), scratch.dy);
        for (Index i = 0; i < count; ++i) {
          dweight[first + i] =
              detail::dot(width_, detail::row_data(output, i), detail::row_data(dy_rows, i));
          dy_rows.row(i) *= weight[first + i];
        }
        network_.backward(gather(x.slice(first, count), scratch.x),
                          columns_of<Scalar>(rows, 0, network_.tape_width()), constant(dy_rows),
                          block_of(dx, first, count));
      }
    });
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Net::visit_parameters(self.network_, visit);
  }

 private:
  template <class F>
  static void for_each_block(Index count, F&& f) {
    for (Index first = 0; first < count; first += expert_block_rows) {
      f(first, std::min(expert_block_rows, count - first));
    }
  }

  template <class View>
  static View block_of(View matrix, Index first, Index count) {
    return View(matrix.data() + first * matrix.outerStride(), count, matrix.cols(),
                Eigen::OuterStride<>(matrix.outerStride()));
  }

  static ConstMatrixView<Scalar> constant(const MatrixView<Scalar>& m) {
    return {m.data(), m.rows(), m.cols(), Eigen::OuterStride<>(m.outerStride())};
  }

  static void copy(const MatrixView<Scalar>& from, MatrixView<Scalar> to) { to = from; }

  static MatrixView<Scalar> gather_into(const GatheredRows<Scalar>& rows, Matrix<Scalar>& scratch) {
    scratch.resize(expert_block_rows, rows.width());
    for (Index i = 0; i < rows.count(); ++i) {
      std::copy_n(rows.row(i), rows.width(), detail::row_data(scratch, i));
    }
    return rows_of(scratch, 0, rows.count());
  }
  static ConstMatrixView<Scalar> gather(const GatheredRows<Scalar>& rows, Matrix<Scalar>& scratch) {
    return constant(gather_into(rows, scratch));
  }

  Index width_;
  Net network_;
};

}  // namespace moe
