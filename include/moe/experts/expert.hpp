#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "moe/experts/combine.hpp"
#include "moe/kernels/blocking.hpp"
#include "moe/parameter.hpp"

/// \file
/// Expert<Network>: a network over its slice of the slots, and the concepts a network must meet.
///
/// A slot's output enters the layer scaled by the gate's weight w, so an expert computes two
/// gradients for each slot: w.r.t. its row of x, and w.r.t. w, which is ⟨network(x), dy⟩. A
/// PlainNetwork knows nothing of weights, and Expert applies them; a FusedNetwork applies them
/// itself.

namespace moe {

/// The largest number of rows in a call of a plain network: longer slices are cut into pieces, so that
/// a piece and its scratch stay in L2.
inline constexpr Index expert_block_rows = 128;

/// Ranges of the columns of a network's first half begin at multiples of this number, so that a
/// column has the same bits however the columns are split.
template <class Scalar>
inline constexpr Index expert_block_columns = detail::panel_columns<Scalar>;

/// Ranges of the rows of a network's gradients begin at multiples of this number.
inline constexpr Index gradient_block_rows = 64;

/// n rows of one expert that are computed together.
template <class Scalar>
struct ExpertBlock {
  GatheredRows<Scalar> x;      ///< n x D
  const Index* token;          ///< n, ascending: the tokens, rows of y, dy and dx
  const Scalar* weight;        ///< n, the gate's weights of the slots
  MatrixView<Scalar> saved;    ///< n x tape_width(), saved by forward for backward
  MatrixView<Scalar> scratch;  ///< n x scratch_width(), from the first half to the second

  /// The rows of these tokens in a T x D matrix.
  GatheredRows<Scalar> rows_of(const MatrixRef<Scalar>& matrix) const {
    return {matrix.data(), matrix.outerStride(), x.count(), matrix.cols(), token};
  }
  /// The same rows of a matrix that is written to.
  ScatteredRows<Scalar> rows_of(MatrixView<Scalar> matrix) const {
    return {matrix.data(), matrix.outerStride(), x.count(), matrix.cols(), token};
  }

  /// A part of the rows, the first of the block being row 0.
  ExpertBlock slice(Range rows) const {
    return {x.slice(rows.first, rows.count), token + rows.first, weight + rows.first,
            moe::rows_of(saved, rows.first, rows.count),
            moe::rows_of(scratch, rows.first, rows.count)};
  }
};

/// A plain, unfused network: dense rows in, dense rows out, nothing about routing. This is the concept
/// for networks of users.
///
///     Scalar, Config                  float or double; a struct with a member Index width
///     Network(config, seed)           config.width is D; 0 inside a layer's configuration stands
///                                     for the layer's width
///     tape_width()                    the number of values a row saves for backward
///     forward(x, saved, y) const      fills saved (n x tape_width()) and y (n x D) from x (n x D)
///     evaluate(x, y) const            the same without saved
///     backward(x, saved, dy, dx)      adds to the parameters' gradients, fills dx (n x D)
///     visit_parameters(self, visit)   see for_each_parameter()
///
/// n is at most expert_block_rows. Rows must not influence each other. (Eigen's own product computes a
/// single row differently from several: with it, the last bits of a row can depend on n.) The views
/// are Eigen maps, so `y = x * weight` is a whole forward pass.
template <class N>
concept PlainNetwork = requires(const N& network, N& trained,
                                ConstMatrixView<typename N::Scalar> in,
                                MatrixView<typename N::Scalar> out) {
  { network.tape_width() } -> std::same_as<Index>;
  network.forward(in, out, out);
  network.evaluate(in, out);
  trained.backward(in, in, in, out);
};

/// A network in two halves, each of which can be split into columns that are computed apart, and
/// which gathers its rows, applies the slots' weights and adds to the tokens itself, so that
/// neither outputs nor gathered inputs are ever stored. FeedForward is one.
///
///     hidden(block, columns, save) const     first half: fills some of the columns() columns of
///                                            scratch; with save also block.saved
///     output(block, columns, y) const        second half: adds columns of weight·network(x), or of
///                                            network(weight·x), to the block's rows of y
///     hidden_backward(block, dy, columns) const  first half of backward, from dy (T x D), the
///                                            gradient w.r.t. y
///     output_backward(block, columns, dx) const  second half: adds columns of the gradient w.r.t. x,
///                                            which has the weight as a factor, to the block's rows
///                                            of dx
///     add_gradients(block, dy, rows, replace)  adds to some rows of the parameters' gradients, which
///                                            are gradient_rows() rows stacked on each other. With
///                                            replace it writes over them; then the calls for all
///                                            rows must write every gradient, biases too
///     weight_gradients(block, dy, dweight) const  dweight (n) = ⟨network(x), dy⟩, or, where the
///                                            weight multiplies x, its gradient
///
/// The second half, add_gradients and weight_gradients are called after all columns of the first half
/// are computed. Ranges of the first half begin at multiples of expert_block_columns, those of the
/// second half at multiples of the elements of a cache line. hidden and output may have one
/// argument more: a pointer to the network that is called next in the same way, or null, so that
/// they can prefetch its weights. A PreparedNetwork computes before a half what all of its columns
/// need.
// clang-format off
template <class N>
concept FusedNetwork =
    requires(const N& network, N& trained, const ExpertBlock<typename N::Scalar>& block,
             const MatrixRef<typename N::Scalar>& in, MatrixView<typename N::Scalar> out,
             typename N::Scalar* dweight) {
      { network.tape_width() } -> std::same_as<Index>;
      { network.scratch_width() } -> std::same_as<Index>;
      { network.columns() } -> std::same_as<Index>;
      { network.gradient_rows() } -> std::same_as<Index>;
      network.hidden(block, Range{}, true);
      network.output(block, Range{}, out);
      network.hidden_backward(block, in, Range{});
      network.output_backward(block, Range{}, out);
      trained.add_gradients(block, in, Range{}, true);
      network.weight_gradients(block, in, dweight);
    };

/// A FusedNetwork that fills columns of its scratch before a half of a pass; every range of columns of that
/// half reads them. The rows may be split into several calls.
///
///     prepares() const                       whether there is anything to fill; if not, none is called
///     prepare_hidden(block) const            before hidden()
///     prepare_output(block) const            before output()
///     prepare_hidden_backward(block, dy) const
///     prepare_output_backward(block) const   before output_backward() and add_gradients()
template <class N>
concept PreparedNetwork =
    FusedNetwork<N> &&
    requires(const N& network, const ExpertBlock<typename N::Scalar>& block,
             const MatrixRef<typename N::Scalar>& in) {
      { network.prepares() } -> std::same_as<bool>;
      network.prepare_hidden(block);
      network.prepare_output(block);
      network.prepare_hidden_backward(block, in);
      network.prepare_output_backward(block);
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
    (PlainNetwork<N> || FusedNetwork<N>);
// clang-format on

namespace detail {

/// The compile errors for a class that is not an ExpertNetwork: a message for each missing member.
template <class N>
constexpr bool check_network_requirements() {
  static_assert(HasScalar<N>, "a network must have a type Scalar");
  static_assert(HasConfig<N>, "a network must have a type Config");
  if constexpr (HasScalar<N> && HasConfig<N>) {
    using S = typename N::Scalar;
    static_assert(
        requires(typename N::Config config) {
          { config.width } -> std::convertible_to<Index>;
        },
        "a network's Config must have a member moe::Index width");
    static_assert(std::constructible_from<N, const typename N::Config&, std::uint64_t>,
                  "a network must have a constructor (const Config&, std::uint64_t seed)");
    static_assert(
        requires(N & network) { N::visit_parameters(network, AnyVisitor{}); },
        "a network must have a static visit_parameters(self, visit)");
    static_assert(
        requires(const N& network) {
          { network.tape_width() } -> std::same_as<Index>;
        },
        "a network must have moe::Index tape_width() const");
    if constexpr (!FusedNetwork<N>) {
      static_assert(
          requires(const N& network, ConstMatrixView<S> in, MatrixView<S> out) {
            network.forward(in, out, out);
          },
          "a network must have forward(ConstMatrixView x, MatrixView saved, MatrixView y) const");
      static_assert(
          requires(const N& network, ConstMatrixView<S> in, MatrixView<S> out) {
            network.evaluate(in, out);
          },
          "a network must have evaluate(ConstMatrixView x, MatrixView y) const");
      static_assert(
          requires(N & network, ConstMatrixView<S> in, MatrixView<S> out) {
            network.backward(in, in, in, out);
          },
          "a network must have backward(ConstMatrixView x, ConstMatrixView saved, ConstMatrixView "
          "dy, MatrixView dx)");
    }
  }
  return true;
}

}  // namespace detail

namespace detail {

/// A network over its slice of the slots, as a layer sees it.
///
/// It has the functions of a FusedNetwork for either kind of network; a plain network cannot be
/// split into columns, and the blocks of one expert must go through its hidden_backward one after
/// the other.
template <class Net>
class ExpertOf {
 public:
  using Network = Net;
  using Scalar = typename Net::Scalar;
  using Config = typename Net::Config;
  using Block = ExpertBlock<Scalar>;

  /// Whether the network can be split into columns and uses the library's own products.
  static constexpr bool fused = FusedNetwork<Net>;
  /// Whether the network has narrow weights, which visit_parameters() does not visit.
  static constexpr bool has_narrow_weights = requires { requires Net::has_narrow_weights; };

  /// Dense rows for a plain network; each worker has its own.
  struct Scratch {
    Matrix<Scalar> x;
    Matrix<Scalar> dy;
  };

  ExpertOf(const Config& config, std::uint64_t seed) : ExpertOf(Net(config, seed), config.width) {}
  /// A network and its width, D.
  ExpertOf(Net network, Index width) : width_(width), network_(std::move(network)) {
    track_gradients(network_);
  }

  const Net& network() const { return network_; }
  Net& network() { return network_; }

  /// The number of values a slot saves for backward. A plain network cannot compute ⟨network(x), dy⟩
  /// in backward, so its output is saved as well.
  Index tape_width() const { return network_.tape_width() + (fused ? 0 : width_); }

  /// The number of values a slot has between the two halves of a pass.
  Index scratch_width() const {
    if constexpr (fused) {
      return network_.scratch_width();
    } else {
      return width_;
    }
  }

  Index width() const { return width_; }  ///< D

  /// Multiply-adds of a row: by default one for each parameter of the network.
  Index row_work() const {
    if constexpr (requires { network_.row_work(); }) {
      return network_.row_work();
    } else {
      Index work = 0;
      walk_parameters(network_, [&](const ParameterName&, const auto& p) { work += p.size(); });
      return work;
    }
  }

  /// The number of columns of the first half, which is split at multiples of expert_block_columns.
  Index columns() const {
    if constexpr (fused) {
      return network_.columns();
    } else {
      return 1;
    }
  }

  Index gradient_rows() const {
    if constexpr (fused) {
      return network_.gradient_rows();
    } else {
      return 0;
    }
  }

  /// Allocates a worker's scratch in advance: the worker may get its first rows in a later pass,
  /// which must not allocate.
  void reserve(Scratch& scratch) const {
    if constexpr (!fused) {
      resize(scratch.x, expert_block_rows, width_);
      resize(scratch.dy, expert_block_rows, width_);
    }
  }

  /// First half of a pass; fills the block's `saved` if `save`. `next` is the expert whose first half
  /// is computed next, or null if that is not known; output() takes the expert whose second half is
  /// next.
  void hidden(const Block& block, Range columns, bool save, Scratch& scratch,
              [[maybe_unused]] const ExpertOf* next = nullptr) const {
    if constexpr (requires { network_.hidden(block, columns, save, &network_); }) {
      network_.hidden(block, columns, save, network_of(next));
    } else if constexpr (fused) {
      network_.hidden(block, columns, save);
    } else {
      for_each_piece(block, [&](const Block& piece) {
        const ConstMatrixView<Scalar> x = constant(gather(piece.x, scratch.x));
        MatrixView<Scalar> y = piece.scratch;
        if (save) {
          network_.forward(x, columns_of(piece.saved, 0, network_.tape_width()), y);
          columns_of(piece.saved, network_.tape_width(), width_) = y;
        } else {
          network_.evaluate(x, y);
        }
      });
    }
  }

  /// Second half: adds columns of weight·network(x) to the tokens' rows of y (T x D).
  void output(const Block& block, Range columns, MatrixView<Scalar> y,
              [[maybe_unused]] const ExpertOf* next = nullptr) const {
    if constexpr (requires { network_.output(block, columns, y, &network_); }) {
      network_.output(block, columns, y, network_of(next));
    } else if constexpr (fused) {
      network_.output(block, columns, y);
    } else {
      combine(GatheredRows<Scalar>(block.scratch), block.weight, columns.first, columns.count,
              block.rows_of(y));
    }
  }

  /// First half of backward, from dy (T x D), the gradient w.r.t. the weighted sum.
  void hidden_backward(const Block& block, const MatrixRef<Scalar>& dy, Range columns,
                       Scratch& scratch) {
    if constexpr (fused) {
      network_.hidden_backward(block, dy, columns);
    } else {
      for_each_piece(block, [&](const Block& piece) {
        MatrixView<Scalar> dy_rows = gather(piece.rows_of(dy), scratch.dy);
        for (Index i = 0; i < dy_rows.rows(); ++i) dy_rows.row(i) *= piece.weight[i];
        network_.backward(constant(gather(piece.x, scratch.x)),
                          constant(columns_of(piece.saved, 0, network_.tape_width())),
                          constant(dy_rows), piece.scratch);
      });
    }
  }

  /// Second half: adds columns of the gradient w.r.t. x to the tokens' rows of dx (T x D).
  void output_backward(const Block& block, Range columns, MatrixView<Scalar> dx) const {
    if constexpr (fused) {
      network_.output_backward(block, columns, dx);
    } else {
      combine<Scalar>(GatheredRows<Scalar>(block.scratch), nullptr, columns.first, columns.count,
                      block.rows_of(dx));
    }
  }

  /// Adds to some rows of the gradients of the network's weights, or writes over them.
  void add_gradients(const Block& block, const MatrixRef<Scalar>& dy, Range rows,
                     bool replace = false) {
    if constexpr (fused) network_.add_gradients(block, dy, rows, replace);
  }

  /// dweight (n) = ⟨network(x), dy⟩, the gradient w.r.t. the slots' weights.
  void weight_gradients(const Block& block, const MatrixRef<Scalar>& dy, Scalar* dweight) const {
    if constexpr (fused) {
      network_.weight_gradients(block, dy, dweight);
    } else {
      const MatrixView<Scalar> output = columns_of(block.saved, network_.tape_width(), width_);
      const GatheredRows<Scalar> dy_rows = block.rows_of(dy);
      for (Index i = 0; i < dy_rows.count(); ++i) {
        dweight[i] = dot(width_, row_data(output, i), dy_rows.row(i));
      }
    }
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Net::visit_parameters(self.network_, visit);
  }

 private:
  static const Net* network_of(const ExpertOf* expert) {
    return expert != nullptr ? &expert->network_ : nullptr;
  }

  template <class F>
  static void for_each_piece(const Block& block, F&& f) {
    for (Index first = 0; first < block.x.count(); first += expert_block_rows) {
      f(block.slice({first, std::min(expert_block_rows, block.x.count() - first)}));
    }
  }

  static ConstMatrixView<Scalar> constant(const MatrixView<Scalar>& m) {
    return {m.data(), m.rows(), m.cols(), Eigen::OuterStride<>(m.outerStride())};
  }

  static MatrixView<Scalar> gather(const GatheredRows<Scalar>& rows, Matrix<Scalar>& scratch) {
    for (Index i = 0; i < rows.count(); ++i) {
      std::copy_n(rows.row(i), rows.width(), row_data(scratch, i));
    }
    return moe::rows_of(scratch, 0, rows.count());
  }

  Index width_;
  Net network_;
};

/// Whether E is an expert of a layer, such as Expert<Network>, and not a bare network.
template <class E>
inline constexpr bool is_expert = requires {
  typename E::Network;
  requires std::derived_from<E, ExpertOf<typename E::Network>>;
};

}  // namespace detail

/// A network over its slice of the slots. `Expert<FeedForward>` is float,
/// `Expert<FeedForward, double>` double; a user's network is a class template over its scalar too.
template <template <class> class Network, class Scalar = float>
class Expert : public detail::ExpertOf<Network<Scalar>> {
  static_assert(detail::check_network_requirements<Network<Scalar>>());

 public:
  using detail::ExpertOf<Network<Scalar>>::ExpertOf;
};

}  // namespace moe
