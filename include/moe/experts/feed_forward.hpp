#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "moe/experts/expert.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/limits.hpp"
#include "moe/kernels/weighted_rows.hpp"
#include "moe/random.hpp"

/// \file
/// The network of most experts: two linear maps with an activation between them.

namespace moe {

/// The plain form is y = a·W_2 + b_2 with
///
///     a = act(min(x·W_1 + b_1, limit))
///
/// and the gated form (N. Shazeer, "GLU Variants Improve Transformer", 2020; SwiGLU with
/// Activation::silu) the same y with
///
///     a = act(min(x·W_1 + b_1, limit)) ⊙ (clamp(x·W_3 + b_3, -limit, limit) + linear_offset).
///
/// Config says whether there are biases and a limit; by default the plain form has biases and the
/// gated one none, there is no limit, and the offset is 0. Beyond a limit the gradient is 0. A slot of
/// weight w adds w·y(x) to its token, or with Config.weighted_input y(w·x).
///
/// Parameters and their names: plain, up.weight (W_1, D x H), up.bias (b_1, 1 x H), down.weight (W_2,
/// H x D), down.bias (b_2, 1 x D); gated, gate.weight (W_1), gate.bias (b_1), up.weight (W_3),
/// up.bias (b_3), down.weight (W_2), down.bias (b_2); the biases with Config.bias only. A map of n
/// inputs starts uniform in ±1/sqrt(n), its bias too, as PyTorch's Linear does.
///
/// It is a FusedNetwork: its first half makes the hidden row a, weighted already, its second half
/// multiplies that by W_2 and adds it to the tokens. For backward it saves a slot's pre-activations
/// only (H numbers, 2·H gated), or nothing with Config::recompute: the gradient of the slot's
/// weight is ⟨dy·W_2ᵀ, a⟩ + ⟨b_2, dy⟩, and dy·W_2ᵀ is needed anyway. With the weight on the input it
/// saves z = x·W_1, gated x·W_3 too, of which w·z + b is the pre-activation and ⟨z, dpre⟩ the weight's
/// gradient.
template <class Scalar_ = float>
class FeedForward {
 public:
  using Scalar = Scalar_;
  using Block = ExpertBlock<Scalar>;

  struct Config {
    Index width = 0;   ///< D; 0 inside a layer's configuration stands for the layer's width
    Index hidden = 0;  ///< H
    Activation activation = Activation::relu;
    bool gated = false;
    bool bias = !gated;  ///< b_1, b_2 and, gated, b_3
    /// Of act's input from above, and of the gated form's other factor on both sides, >= 0; 0: none.
    double limit = 0;
    double linear_offset = 0;     ///< of the gated form, finite: gpt-oss has 1 and a limit of 7
    bool weighted_input = false;  ///< the slot's weight multiplies x and not y, as in Llama 4
    /// Keep no pre-activations for backward and compute them again there: a quarter more arithmetic
    /// in backward, gated a third, for a tape without the S x H numbers, gated S x 2·H [S17 App.
    /// D]. All results keep their bits.
    bool recompute = false;

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("width", self.width);
      visit("hidden", self.hidden);
      visit("activation", self.activation);
      visit("gated", self.gated);
      visit("bias", self.bias);
      visit("limit", self.limit);
      visit("linear_offset", self.linear_offset);
      visit("weighted_input", self.weighted_input);
      visit("recompute", self.recompute);
    }
  };

  /// Throws std::invalid_argument for a configuration out of range.
  FeedForward(const Config& config, std::uint64_t seed)
      : config_(checked(config)),
        gate_(config.gated ? config.width : 0, config.gated ? config.hidden : 0),
        gate_bias_(1, config.gated && config.bias ? config.hidden : 0),
        up_(config.width, config.hidden),
        up_bias_(1, config.bias ? config.hidden : 0),
        down_(config.hidden, config.width),
        down_bias_(1, config.bias ? config.width : 0) {
    const Scalar up_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.width));
    const Scalar down_bound = Scalar{1} / std::sqrt(static_cast<Scalar>(config.hidden));
    fill_uniform(gate_.value, up_bound, derive_seed(seed, 0));
    fill_uniform(up_.value, up_bound, derive_seed(seed, 1));
    fill_uniform(up_bias_.value, up_bound, derive_seed(seed, 2));
    fill_uniform(down_.value, down_bound, derive_seed(seed, 3));
    fill_uniform(down_bias_.value, down_bound, derive_seed(seed, 4));
    fill_uniform(gate_bias_.value, up_bound, derive_seed(seed, 5));
  }

  const Config& config() const { return config_; }
  Index tape_width() const { return config_.recompute ? 0 : pre_width(); }

  /// The hidden row, the pre-activations or their gradient, the pre-activations once more where
  /// they are computed again, and the parts of ⟨dy·W_2ᵀ, a⟩: an odd number of cache lines, since at
  /// a power of two all rows would compete for the same few places of a cache.
  Index scratch_width() const {
    constexpr Index line = detail::cache_line<Scalar>;
    const Index lines = (parts_column() + panels() + line - 1) / line;
    return (lines + (lines % 2 == 0 ? 1 : 0)) * line;
  }

  Index columns() const { return config_.hidden; }
  Index gradient_rows() const { return (config_.gated ? 2 : 1) * config_.width + config_.hidden; }

  // w·a, then y += (w·a)·W_2 + w·b_2; with the weight on the input a and b_2 have none.

  void hidden(const Block& block, Range columns, bool save,
              const FeedForward* next = nullptr) const {
    const MatrixView<Scalar> pre = save && !config_.recompute ? block.saved : pre_of(block);
    const auto epilogue = [&](Index row, Index rows, Index column, Index width) {
      activate(block, pre, {row, rows}, column, width);
    };
    compute_pre(block, columns, pre, epilogue, next);
  }

  void output(const Block& block, Range columns, MatrixView<Scalar> y,
              const FeedForward* next = nullptr) const {
    detail::gemm_serial(detail::GemmNN<Scalar>{
        .a = hidden_of(block),
        .b = down_.value,
        .c = block.rows_of(y),
        .columns = columns,
        .start = detail::Start::accumulate,
        .bias = {.values = values_of(down_bias_), .factors = output_factors(block)},
        .prefetch_next = next != nullptr ? next->down_.value.data() : nullptr});
  }

  // With u = dy·W_2ᵀ: ⟨u, a⟩ is the weight's gradient but for the bias's share, and w·u that of a, from
  // which comes that of the pre-activations; then dx += dpre·W_1ᵀ.

  void hidden_backward(const Block& block, const MatrixRef<Scalar>& dy, Range columns) const {
    const MatrixView<Scalar> pre = config_.recompute ? again_of(block) : block.saved;
    if (config_.recompute) compute_pre(block, columns, pre, {});
    const MatrixView<Scalar> u =
        columns_of(pre_of(block), config_.gated ? config_.hidden : 0, config_.hidden);
    const auto epilogue = [&](Index row, Index rows, Index column, Index width) {
      activate_backward(block, pre, columns, {row, rows}, column, width);
    };
    detail::gemm_serial(detail::GemmNT<Scalar>{.a = block.rows_of(dy),
                                               .b = down_.value,
                                               .c = u,
                                               .columns = columns,
                                               .epilogue = epilogue});
  }

  void output_backward(const Block& block, Range columns, MatrixView<Scalar> dx) const {
    const MatrixView<Scalar> dpre = pre_of(block);
    for (Index part = 0; part < (config_.gated ? 2 : 1); ++part) {
      detail::gemm_serial(
          detail::GemmNT<Scalar>{.a = columns_of(dpre, part * config_.hidden, config_.hidden),
                                 .b = config_.gated && part == 0 ? gate_.value : up_.value,
                                 .c = block.rows_of(dx),
                                 .columns = columns,
                                 .start = detail::Start::accumulate});
    }
  }

  // dW_1 += xᵀ·dpre, dW_2 += (w·a)ᵀ·dy, db_1 += Σ dpre, db_2 += Σ w·dy, of those that are trained. With
  // the weight on the input dW_1 += xᵀ·dz, dz = w·dpre, and the others as without one.

  void add_gradients(const Block& block, const MatrixRef<Scalar>& dy, Range rows,
                     bool replace = false) {
    const detail::Start start = replace ? detail::Start::zero : detail::Start::accumulate;
    const MatrixView<Scalar> dpre = pre_of(block);
    const GatheredRows<Scalar> dfirst(columns_of(dpre, 0, config_.hidden));
    Index first = 0;
    const auto add = [&](const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b,
                         Parameter<Scalar>& weight) {
      const Index from = std::max(rows.first, first);
      const Index to = std::min(rows.first + rows.count, first + weight.value.rows());
      if (from < to && weight.trained) {
        detail::gemm_serial(detail::GemmTN<Scalar>{.a = a,
                                                   .b = b,
                                                   .c = view(weight.gradient()),
                                                   .rows = {from - first, to - from},
                                                   .start = start});
      }
      first += weight.value.rows();
    };
    const GatheredRows<Scalar> dup(
        columns_of(dpre, config_.gated ? config_.hidden : 0, config_.hidden));
    if (config_.gated) add(block.x, dfirst, gate_);
    add(block.x, dup, up_);
    const GatheredRows<Scalar> dy_rows = block.rows_of(dy);
    add(GatheredRows<Scalar>(hidden_of(block)), dy_rows, down_);
    if (!config_.bias || rows.first > 0) return;
    const auto add_bias = [&](const GatheredRows<Scalar>& from,
                              const detail::RowFactors<Scalar>& factors, Parameter<Scalar>& bias) {
      if (!bias.trained) return;
      Matrix<Scalar>& gradient = bias.gradient();
      if (replace) detail::resize_to_zero(gradient, 1, bias.size());
      detail::add_scaled_rows(from, factors, gradient.data());
    };
    const MatrixView<Scalar> unweighted = config_.weighted_input ? unweighted_of(block) : dpre;
    add_bias(columns_of(unweighted, 0, config_.hidden), {}, config_.gated ? gate_bias_ : up_bias_);
    if (config_.gated) {
      add_bias(columns_of(unweighted, config_.hidden, config_.hidden), {}, up_bias_);
    }
    add_bias(dy_rows, output_factors(block), down_bias_);
  }

  void weight_gradients(const Block& block, const MatrixRef<Scalar>& dy, Scalar* dweight) const {
    const MatrixView<Scalar> parts = columns_of(block.scratch, parts_column(), panels());
    const GatheredRows<Scalar> dy_rows = block.rows_of(dy);
    for (Index i = 0; i < parts.rows(); ++i) {
      dweight[i] = detail::sum(panels(), detail::row_data(parts, i));
      if (!config_.bias || config_.weighted_input) continue;
      dweight[i] += detail::dot(config_.width, down_bias_.value.data(), dy_rows.row(i));
    }
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    const Config& config = self.config_;
    if (config.gated) visit("gate.weight", self.gate_);
    if (config.gated && config.bias) visit("gate.bias", self.gate_bias_);
    visit("up.weight", self.up_);
    if (config.bias) visit("up.bias", self.up_bias_);
    visit("down.weight", self.down_);
    if (config.bias) visit("down.bias", self.down_bias_);
  }

 private:
  using P = detail::Packet<Scalar>;

  static const Config& checked(const Config& config) {
    detail::require(config.width >= 1, "FeedForward::Config.width = ", config.width,
                    ", must be at least 1");
    detail::require(config.hidden >= 1, "FeedForward::Config.hidden = ", config.hidden,
                    ", must be at least 1");
    detail::require_activation("FeedForward::Config.activation", config.activation);
    const auto limit = static_cast<Scalar>(config.limit);
    detail::require(config.limit == 0 || (std::isfinite(limit) && limit > 0),
                    "FeedForward::Config.limit = ", config.limit,
                    ", must be 0, or finite and above 0 as a Scalar");
    detail::require(std::isfinite(static_cast<Scalar>(config.linear_offset)),
                    "FeedForward::Config.linear_offset = ", config.linear_offset,
                    ", must be finite as a Scalar");
    detail::require(config.gated || config.linear_offset == 0,
                    "FeedForward::Config.linear_offset = ", config.linear_offset,
                    ", must be 0 without gated");
    return config;
  }

  Index pre_width() const { return (config_.gated ? 2 : 1) * config_.hidden; }
  bool keeps_unweighted() const { return config_.weighted_input && config_.bias; }
  Index parts_column() const {
    const Index matrices = 1 + (config_.recompute ? 1 : 0) + (keeps_unweighted() ? 1 : 0);
    return config_.hidden + matrices * pre_width();
  }
  Index panels() const {
    return (config_.hidden + expert_block_columns<Scalar> - 1) / expert_block_columns<Scalar>;
  }

  MatrixView<Scalar> hidden_of(const Block& block) const {
    return columns_of(block.scratch, 0, config_.hidden);
  }
  MatrixView<Scalar> pre_of(const Block& block) const {
    return columns_of(block.scratch, config_.hidden, pre_width());
  }
  MatrixView<Scalar> again_of(const Block& block) const {
    return columns_of(block.scratch, config_.hidden + pre_width(), pre_width());
  }

  /// dpre before it is weighted, for the biases of weighted inputs.
  MatrixView<Scalar> unweighted_of(const Block& block) const {
    return columns_of(block.scratch, parts_column() - pre_width(), pre_width());
  }

  /// A bias as the products take it.
  const Scalar* values_of(const Parameter<Scalar>& bias) const {
    return config_.bias ? bias.value.data() : nullptr;
  }
  /// b_1.
  const Parameter<Scalar>& first_bias() const { return config_.gated ? gate_bias_ : up_bias_; }
  /// One of the first products, after which the weights come where they are of the input.
  const Scalar* first_values_of(const Parameter<Scalar>& bias) const {
    return config_.weighted_input ? nullptr : values_of(bias);
  }
  /// Of what the slots add to the tokens, of the block's rows from one on.
  detail::RowFactors<Scalar> output_factors(const Block& block, Index row = 0) const {
    if (config_.weighted_input) return {};
    return {block.weight + row, 1};
  }

  /// Columns of the pre-activations (n x pre_width()).
  void compute_pre(const Block& block, Range columns, MatrixView<Scalar> pre,
                   detail::Epilogue epilogue, const FeedForward* next = nullptr) const {
    const ScatteredRows<Scalar> first(columns_of(pre, 0, config_.hidden));
    if (config_.gated) {
      const ScatteredRows<Scalar> linear(columns_of(pre, config_.hidden, config_.hidden));
      detail::gemm_serial(detail::GemmNN<Scalar>{.a = block.x,
                                                 .b = gate_.value,
                                                 .c = first,
                                                 .columns = columns,
                                                 .bias = {.values = first_values_of(gate_bias_)},
                                                 .prefetch_next = up_.value.data()});
      detail::gemm_serial(detail::GemmNN<Scalar>{
          .a = block.x,
          .b = up_.value,
          .c = linear,
          .columns = columns,
          .bias = {.values = first_values_of(up_bias_)},
          .epilogue = epilogue,
          .prefetch_next = next != nullptr ? next->gate_.value.data() : nullptr});
    } else {
      detail::gemm_serial(detail::GemmNN<Scalar>{
          .a = block.x,
          .b = up_.value,
          .c = first,
          .columns = columns,
          .bias = {.values = first_values_of(up_bias_)},
          .epilogue = epilogue,
          .prefetch_next = next != nullptr ? next->up_.value.data() : nullptr});
    }
  }

  // Both work on a tile; m(row, part) is where its columns are in the part-th H columns of m. What
  // they read and write beside C is far away, so they prefetch it. Forward prefetches the next tile's
  // hidden rows, which are only written. Backward, for which that would be too much, prefetches the
  // pre-activations of the next panel, and in its first panel those of the next tile too.

  auto tile_of(MatrixView<Scalar> matrix, Index column) const {
    return [this, matrix, column](Index row, Index part = 0) mutable {
      return detail::row_data(matrix, row) + part * config_.hidden + column;
    };
  }

  template <class F>
  static void for_each_next(const Block& block, Range rows, F&& f) {
    const Index first = rows.first + rows.count;
    for (Index i = first; i < std::min(first + rows.count, block.x.count()); ++i) f(i);
  }

  /// Memory for a tile's pre-activations where what is saved is something else.
  struct Tile {
    Scalar data[detail::to_size(detail::direct_rows * detail::tile_columns<Scalar>)];
  };
  /// The pre-activations of a tile: x itself, or with weighted inputs w·x + b, in `made`. The tile has
  /// columns of the bias from `column` on.
  GatheredRows<Scalar> weighted(const Block& block, Range rows, const Parameter<Scalar>& bias,
                                Index column, const GatheredRows<Scalar>& x, Tile& made) const {
    if (!config_.weighted_input) return x;
    constexpr Index stride = detail::tile_columns<Scalar>;
    detail::weigh_rows(x, {block.weight + rows.first, 1},
                       config_.bias ? bias.value.data() + column : nullptr,
                       {made.data, stride, rows.count, x.width()});
    return {made.data, stride, rows.count, x.width()};
  }

  /// What act is applied to: x, or with a limit what it leaves of x, in y.
  GatheredRows<Scalar> limited(const GatheredRows<Scalar>& x,
                               const ScatteredRows<Scalar>& y) const {
    if (config_.limit == 0) return x;
    detail::limit_above(static_cast<Scalar>(config_.limit), x, y);
    return {y.row(0), y.step(), y.count(), y.width()};
  }
  /// Calls f with what the second pre-activations of the gated form go through.
  template <class F>
  void with_linear_factor(F&& f) const {
    if (config_.limit == 0 && config_.linear_offset == 0) return f(detail::PlainFactor<Scalar>());
    f(detail::LinearFactor<Scalar>(static_cast<Scalar>(config_.limit),
                                   static_cast<Scalar>(config_.linear_offset)));
  }

  /// hidden = w·act(pre), gated w·act(pre) ⊙ linear.
  void activate(const Block& block, MatrixView<Scalar> pre, Range rows, Index column,
                Index width) const {
    using namespace Eigen::internal;
    auto hidden = tile_of(hidden_of(block), column);
    auto from = tile_of(pre, column);
    for_each_next(block, rows, [&](Index row) { detail::prefetch_strip(hidden(row)); });
    Tile first;
    Tile second;
    const auto pre_of_part = [&](Index part, const Parameter<Scalar>& bias, Tile& made) {
      return weighted(block, rows, bias, column,
                      {from(rows.first, part), pre.outerStride(), rows.count, width}, made);
    };
    const GatheredRows<Scalar> x = pre_of_part(0, first_bias(), first);
    const ScatteredRows<Scalar> y(hidden(rows.first), block.scratch.outerStride(), rows.count,
                                  width);
    const GatheredRows<Scalar> input = limited(x, y);
    const detail::RowFactors<Scalar> factors = output_factors(block, rows.first);
    if (!config_.gated) return detail::activate(config_.activation, input, y, factors);
    detail::activate(config_.activation, input, y);
    const GatheredRows<Scalar> linear = pre_of_part(1, up_bias_, second);
    with_linear_factor([&](const auto& factor) {
      for (Index r = 0; r < rows.count; ++r) {
        const P w = detail::broadcast(*factors.at(r));
        detail::map(
            width, y.row(r),
            [=](const P& v, const P& l) { return pmul(w, pmul(v, factor.value(l))); }, y.row(r),
            linear.row(r));
      }
    });
  }

  /// In: dpre holds u, gated in its second part. Out: dpre = w·u ⊙ act'(pre), gated
  /// w·u ⊙ linear ⊙ act'(pre) and w·u ⊙ act(pre); hidden as activate() makes it; and its product
  /// with u, without the weight, is added to this panel's part. With weighted inputs dpre is w times
  /// that without a weight, which the biases get, and its product with z is added.
  void activate_backward(const Block& block, MatrixView<Scalar> pre, Range columns, Range rows,
                         Index column, Index width) const {
    using namespace Eigen::internal;
    auto hidden = tile_of(hidden_of(block), column);
    auto gradient = tile_of(pre_of(block), column);
    auto from = tile_of(pre, column);
    const auto ask = [&](Index row, Index further) {
      for (Index part = 0; part < (config_.gated ? 2 : 1); ++part) {
        detail::prefetch_far<detail::strip_lines>(from(row, part), further);
      }
    };
    constexpr Index panel = expert_block_columns<Scalar>;
    if (column < columns.first + panel) {
      for_each_next(block, rows, [&](Index row) { ask(row, 0); });
    }
    if (column + panel < columns.first + columns.count) {
      for (Index row = rows.first; row < rows.first + rows.count; ++row) ask(row, panel);
    }
    Tile first;
    Tile second;
    const auto saved_part = [&](Index part) {
      return GatheredRows<Scalar>(from(rows.first, part), pre.outerStride(), rows.count, width);
    };
    const GatheredRows<Scalar> x =
        weighted(block, rows, first_bias(), column, saved_part(0), first);
    const Index stride = block.scratch.outerStride();
    const ScatteredRows<Scalar> y(hidden(rows.first), stride, rows.count, width);
    const ScatteredRows<Scalar> dx(gradient(rows.first), stride, rows.count, width);
    const GatheredRows<Scalar> input = limited(x, y);
    const detail::RowFactors<Scalar> factors = output_factors(block, rows.first);
    Scalar parts[detail::to_size(detail::direct_rows)];
    if (!config_.gated) {
      detail::activate_backward(config_.activation, input, y, dx, parts, factors);
    } else {
      // From 1 dpre becomes act'(pre); what is multiplied with that, and u's part, comes after.
      for (Index r = 0; r < rows.count; ++r) std::fill_n(dx.row(r), width, Scalar{1});
      detail::activate_backward(config_.activation, input, y, dx, parts);
      const GatheredRows<Scalar> pre_linear =
          weighted(block, rows, up_bias_, column, saved_part(1), second);
      with_linear_factor([&](const auto& factor) {
        for (Index r = 0; r < rows.count; ++r) {
          const P w = detail::broadcast(*factors.at(r));
          P part = detail::broadcast(Scalar{0});
          const Scalar* linear = pre_linear.row(r);
          Scalar* a = y.row(r);
          Scalar* dpre = dx.row(r);
          Scalar* dlinear = gradient(rows.first + r, 1);
          detail::for_each_packet<Scalar>(width, [&](const detail::PacketSpan& at) {
            const P value = at.load(a);
            const P before = at.load(linear);
            const P l = factor.value(before);
            const P u = at.load(dlinear);
            part = pmadd(u, pmul(value, l), part);
            at.store(a, pmul(w, pmul(value, l)));
            at.store(dpre, pmul(pmul(pmul(w, u), l), at.load(dpre)));
            at.store(dlinear, factor.backward(before, pmul(pmul(w, u), value)));
          });
          parts[r] = predux(part);
        }
      });
    }
    if (config_.limit > 0) {
      detail::limit_above_backward(static_cast<Scalar>(config_.limit), x, dx);
    }
    if (config_.weighted_input) {
      std::fill_n(parts, rows.count, Scalar{0});
      auto unweighted = tile_of(unweighted_of(block), column);
      for (Index part = 0; part < (config_.gated ? 2 : 1); ++part) {
        const ScatteredRows<Scalar> d(gradient(rows.first, part), stride, rows.count, width);
        for (Index r = 0; r < rows.count && keeps_unweighted(); ++r) {
          std::copy_n(d.row(r), width, unweighted(rows.first + r, part));
        }
        detail::weigh_rows_backward(saved_part(part), {block.weight + rows.first, 1}, d, parts);
      }
    }
    for (Index r = 0; r < rows.count; ++r) add_part(block, rows.first + r, column, parts[r]);
  }

  /// The parts of a weight's gradient, one a panel of columns: each is added up by one task, strip by
  /// strip, so the whole has the same bits however the columns are split.
  void add_part(const Block& block, Index row, Index column, Scalar value) const {
    const Index panel = column / expert_block_columns<Scalar>;
    MatrixView<Scalar> scratch = block.scratch;
    Scalar& part = detail::row_data(scratch, row)[parts_column() + panel];
    part = column % expert_block_columns<Scalar> == 0 ? value : part + value;
  }

  Config config_;
  Parameter<Scalar> gate_;       ///< W_1 of the gated form, D x H
  Parameter<Scalar> gate_bias_;  ///< its b_1, 1 x H
  Parameter<Scalar> up_;         ///< W_1 of the plain form, W_3 of the gated one, D x H
  Parameter<Scalar> up_bias_;    ///< b_1 of the plain form, b_3 of the gated one, 1 x H
  Parameter<Scalar> down_;       ///< W_2, H x D
  Parameter<Scalar> down_bias_;  ///< b_2, 1 x D
};

}  // namespace moe
