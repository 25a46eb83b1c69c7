#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string_view>
#include <type_traits>
#include <utility>

#include "moe/experts/expert.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/kernels/bfloat16_rows.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/gemm_bfloat16.hpp"
#include "moe/kernels/limits.hpp"
#include "moe/kernels/weighted_rows.hpp"
#include "moe/parameter.hpp"

/// \file
/// The computations of a FeedForward, forward and backward, for weights of any storage.

namespace moe {

/// The configuration of FeedForward, which defines the letters used here.
struct FeedForwardConfig {
  Index width = 0;   ///< D; 0 inside a layer's configuration stands for the layer's width
  Index hidden = 0;  ///< H, at least 1
  Activation activation = Activation::relu;  ///< act
  bool gated = false;                        ///< whether it is the gated form
  bool bias = !gated;                        ///< b_1, b_2 and, gated, b_3
  /// The largest input of act, and the largest magnitude of the gated form's linear factor before
  /// its offset; finite, >= 0; 0 means no limit.
  double limit = 0;
  /// Of the gated form, finite; must be 0 in the plain form; gpt-oss has 1, and a limit of 7.
  double linear_offset = 0;
  bool weighted_input = false;  ///< the slot's weight multiplies x and not y, as in Llama 4
  /// Whether backward computes the pre-activations again, and the tape does not save them [S17 App. D]:
  /// the tape has H fewer numbers for each slot (gated, 2·H), and backward a quarter more arithmetic
  /// (gated, a third). All results keep their bits.
  bool recompute = false;
  /// The precision in which the tape stores the pre-activations. With bfloat16 they take half the
  /// memory of float, a quarter of that of double, and backward reads them rounded to 8 bits of
  /// precision; y keeps its bits. Must be `full` with recompute, which saves nothing.
  Precision saved = Precision::full;
  /// The precision to which the operands of the products with the weights, forward and backward,
  /// are rounded. With bfloat16, copies of both operands are rounded to 8 bits of precision (to
  /// nearest even; NaN stays NaN, a magnitude below 2^-126 becomes 0), and the sums are floats;
  /// weights, biases, gradients, activations and y stay float. Where the program is compiled for
  /// AVX512-BF16, vdpbf16ps adds two products at once: it replaces results below 2^-126 by 0 and
  /// rounds sums differently from multiply-adds. bfloat16 is faster only with AVX512-BF16 and many
  /// tokens per expert: docs/layer.md says how many. Without AVX512-BF16, multiply-adds of the same
  /// rounded numbers give the same up to the rounding of sums. A token's bits depend neither on the
  /// other tokens nor on the number of threads. Must be `full` unless Scalar is float. This does
  /// not change the products of adapters' low-rank matrices, nor those with narrow weights.
  Precision products = Precision::full;

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
    visit("saved", self.saved);
    visit("products", self.products);
  }
};

namespace detail {

/// A weight as the operand B of a product.
template <class Scalar>
MatrixOperand<Scalar> operand(const Parameter<Scalar>& weight) {
  return weight.value;
}
/// The address in a weight from which to prefetch before its product begins.
template <class Scalar>
const Scalar* first_number(const Parameter<Scalar>& weight) {
  return weight.value.data();
}

/// Adds rows of Aᵀ·B to the gradient of W, or overwrites them, if W is trained.
template <class Scalar>
void add_weight_gradient(Parameter<Scalar>& weight,
                         const std::type_identity_t<GatheredRows<Scalar>>& a,
                         const std::type_identity_t<GatheredRows<Scalar>>& b, Range rows,
                         Start start, Precision products) {
  if (!weight.trained) return;
  gemm_serial(
      GemmTN<Scalar>{.a = a, .b = b, .c = view(weight.gradient()), .rows = rows, .start = start},
      products);
}

/// C = A·W or A·Wᵀ, whose operand B is operand(W). `scratch` has the rows of A.
template <class Weight, class Product, class Scalar>
void multiply_by(const Weight&, const MatrixView<Scalar>& /*scratch*/, const Product& product,
                 Precision products) {
  gemm_serial(product, products);
}

/// The passes of a FeedForward, with the formulas. A `Weight` is a Parameter or another type with these
/// functions: operand() returns the operand B of a product, first_number() an address to prefetch or null,
/// and multiply_by() and add_weight_gradient() compute its products.
template <class Scalar_, class Weight>
class FeedForwardPasses {
 public:
  using Scalar = Scalar_;
  using Block = ExpertBlock<Scalar>;
  using Config = FeedForwardConfig;

  const Config& config() const { return config_; }
  Index tape_width() const {
    if (config_.recompute) return 0;
    if (config_.saved == Precision::full) return pre_width();
    constexpr auto bytes = static_cast<Index>(sizeof(Scalar));
    return (pre_width() * bfloat16_bytes + bytes - 1) / bytes;
  }

  /// A row holds the hidden row, the pre-activations or their gradient, with recompute the
  /// pre-activations once more, with biases and weighted inputs the gradient without the weight,
  /// and the parts of ⟨dy·W_2ᵀ, a⟩. Its length is an odd number of cache lines, since rows at a
  /// distance of a power of two would compete for the same few sets of a cache.
  Index scratch_width() const { return odd_lines(parts_column() + panels()); }

  Index columns() const { return config_.hidden; }

  // w·a, then y += (w·a)·W_2 + w·b_2; where the weight multiplies the input, a and b_2 have no
  // factor w.

  void hidden(const Block& block, Range columns, bool save,
              const FeedForwardPasses* next = nullptr) const {
    const bool saves = save && !config_.recompute;
    const bool rounds = saves && config_.saved == Precision::bfloat16;
    const MatrixView<Scalar> pre = saves && !rounds ? block.saved : pre_of(block);
    const auto epilogue = [&](Index row, Index rows, Index column, Index width) {
      activate(block, pre, {row, rows}, column, width);
      if (rounds) save_rounded(block, pre, {row, rows}, column, width);
    };
    compute_pre(block, columns, pre, epilogue, next);
  }

  void output(const Block& block, Range columns, MatrixView<Scalar> y,
              const FeedForwardPasses* next = nullptr) const {
    multiply(block, down_,
             GemmNN<Scalar, Operand>{
                 .a = hidden_of(block),
                 .b = operand(down_),
                 .c = block.rows_of(y),
                 .columns = columns,
                 .start = Start::accumulate,
                 .bias = {.values = values_of(down_bias_), .factors = output_factors(block)},
                 .prefetch_next = next != nullptr ? first_number(next->down_) : nullptr});
  }

  // With u = dy·W_2ᵀ: ⟨u, a⟩ is the gradient of the slot's weight without the share of b_2, and w·u
  // is the gradient of a, from which dpre, that of the pre-activations, is computed; then dx +=
  // dpre·W_1ᵀ.

  void hidden_backward(const Block& block, const MatrixRef<Scalar>& dy, Range columns) const {
    const MatrixView<Scalar> pre = config_.recompute ? again_of(block) : block.saved;
    if (config_.recompute) compute_pre(block, columns, pre, {});
    const MatrixView<Scalar> u =
        columns_of(pre_of(block), config_.gated ? config_.hidden : 0, config_.hidden);
    const auto epilogue = [&](Index row, Index rows, Index column, Index width) {
      activate_backward(block, pre, columns, {row, rows}, column, width);
    };
    multiply(block, down_,
             GemmNT<Scalar, Operand>{.a = block.rows_of(dy),
                                     .b = operand(down_),
                                     .c = u,
                                     .columns = columns,
                                     .epilogue = epilogue});
  }

  void output_backward(const Block& block, Range columns, MatrixView<Scalar> dx) const {
    for_each_first_weight(*this, block, [&](const Weight& weight, MatrixView<Scalar> dpre) {
      multiply(block, weight,
               GemmNT<Scalar, Operand>{.a = dpre,
                                       .b = operand(weight),
                                       .c = block.rows_of(dx),
                                       .columns = columns,
                                       .start = Start::accumulate});
    });
  }

  // dW_1 += xᵀ·dpre, dW_2 += (w·a)ᵀ·dy, db_1 += Σ dpre, db_2 += Σ w·dy, for those that are trained.
  // Where the weight multiplies the input, dW_1 += xᵀ·dz with dz = w·dpre, and the others are as
  // with w = 1.

  Index gradient_rows() const { return pre_parts() * config_.width + config_.hidden; }

  void add_gradients(const Block& block, const MatrixRef<Scalar>& dy, Range rows,
                     bool replace = false) {
    const Start start = start_of(replace);
    Index first = 0;
    for_each_weight_product(
        block, dy,
        [&](Weight& weight, const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b) {
          const Range own = common_range(rows, {first, a.width()});
          if (own.count > 0) {
            add_weight_gradient(weight, a, b, {own.first - first, own.count}, start,
                                config_.products);
          }
          first += a.width();
        });
    if (rows.first == 0) add_bias_gradients(block, dy, replace);
  }

  void weight_gradients(const Block& block, const MatrixRef<Scalar>& dy, Scalar* dweight) const {
    const MatrixView<Scalar> parts = columns_of(block.scratch, parts_column(), panels());
    const GatheredRows<Scalar> dy_rows = block.rows_of(dy);
    for (Index i = 0; i < parts.rows(); ++i) {
      dweight[i] = sum(panels(), row_data(parts, i));
      if (!config_.bias || config_.weighted_input) continue;
      dweight[i] += dot(config_.width, down_bias_.value.data(), dy_rows.row(i));
    }
  }

 protected:
  using Operand = decltype(operand(std::declval<const Weight&>()));

  /// This class, const where a class derived from it is.
  template <class Derived>
  using Same =
      std::conditional_t<std::is_const_v<Derived>, const FeedForwardPasses, FeedForwardPasses>;

  /// Throws std::invalid_argument for a configuration out of range.
  explicit FeedForwardPasses(const Config& config)
      : config_(checked(config)),
        gate_bias_(1, config.gated && config.bias ? config.hidden : 0),
        up_bias_(1, config.bias ? config.hidden : 0),
        down_bias_(1, config.bias ? config.width : 0) {}

  /// Calls visit(name, weight), or visit(name, bias), for those that the configuration has, in a
  /// fixed order.
  template <class Self, class Visitor>
  static void visit_parts(Self& derived, const Visitor& visit) {
    auto& self = static_cast<Same<Self>&>(derived);
    const Config& config = self.config_;
    if (config.gated) visit("gate.weight", self.gate_);
    if (config.gated && config.bias) visit("gate.bias", self.gate_bias_);
    visit("up.weight", self.up_);
    if (config.bias) visit("up.bias", self.up_bias_);
    visit("down.weight", self.down_);
    if (config.bias) visit("down.bias", self.down_bias_);
  }

  using P = Packet<Scalar>;

  static const Config& checked(const Config& config) {
    require(config.width >= 1, "FeedForward::Config.width = ", config.width,
            ", must be at least 1");
    require(config.hidden >= 1, "FeedForward::Config.hidden = ", config.hidden,
            ", must be at least 1");
    require_activation("FeedForward::Config.activation", config.activation);
    const auto limit = static_cast<Scalar>(config.limit);
    require(config.limit == 0 || (std::isfinite(limit) && limit > 0),
            "FeedForward::Config.limit = ", config.limit,
            ", must be 0, or finite and above 0 as a Scalar");
    require(std::isfinite(static_cast<Scalar>(config.linear_offset)),
            "FeedForward::Config.linear_offset = ", config.linear_offset,
            ", must be finite as a Scalar");
    require(config.gated || config.linear_offset == 0,
            "FeedForward::Config.linear_offset = ", config.linear_offset,
            ", must be 0 without gated");
    require_precision("FeedForward::Config.saved", config.saved);
    require_precision("FeedForward::Config.products", config.products);
    require(std::is_same_v<Scalar, float> || config.products == Precision::full,
            "FeedForward::Config.products = ", name_of(config.products),
            ", must be full unless Scalar is float");
    require(!config.recompute || config.saved == Precision::full,
            "FeedForward::Config.saved = ", name_of(config.saved),
            ", must be full with recompute, which saves nothing");
    return config;
  }

  static std::string_view name_of(Precision precision) {
    return enumerator_names(precision)[static_cast<std::size_t>(precision)];
  }
  static void require_precision(std::string_view field, Precision value) {
    const auto number = static_cast<int>(value);
    const auto precisions = static_cast<int>(enumerator_names(value).size());
    require(number >= 0 && number < precisions, field, " = ", number, ", must be one of the ",
            precisions, " precisions");
  }

  /// Columns rounded up to an odd number of cache lines.
  static Index odd_lines(Index columns) {
    constexpr Index line = cache_line<Scalar>;
    const Index lines = (columns + line - 1) / line;
    return (lines + (lines % 2 == 0 ? 1 : 0)) * line;
  }

  /// The number of pre-activations of a hidden unit.
  Index pre_parts() const { return config_.gated ? 2 : 1; }
  Index pre_width() const { return pre_parts() * config_.hidden; }
  bool saves_unweighted() const { return config_.weighted_input && config_.bias; }
  Index parts_column() const {
    const Index matrices = 1 + (config_.recompute ? 1 : 0) + (saves_unweighted() ? 1 : 0);
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

  /// The values of a bias for a product, or null without biases.
  const Scalar* values_of(const Parameter<Scalar>& bias) const {
    return config_.bias ? bias.value.data() : nullptr;
  }
  /// b_1.
  const Parameter<Scalar>& first_bias() const { return config_.gated ? gate_bias_ : up_bias_; }
  /// values_of() for the products with x. Where the slots' weights multiply x, they are applied after
  /// these products, and the biases after them.
  const Scalar* first_values_of(const Parameter<Scalar>& bias) const {
    return config_.weighted_input ? nullptr : values_of(bias);
  }
  /// The factors of what the slots add to the tokens, for the block's rows from `row` on.
  RowFactors<Scalar> output_factors(const Block& block, Index row = 0) const {
    if (config_.weighted_input) return {};
    return {block.weight + row, 1};
  }

  /// Calls f(W, dpre) for the weights that multiply x; dpre is of these pre-activations, n x H.
  template <class Self, class F>
  static void for_each_first_weight(Self& derived, const Block& block, F&& f) {
    auto& self = static_cast<Same<Self>&>(derived);
    const Index hidden = self.config_.hidden;
    const MatrixView<Scalar> dpre = self.pre_of(block);
    if (self.config_.gated) f(self.gate_, columns_of(dpre, 0, hidden));
    f(self.up_, columns_of(dpre, (self.pre_parts() - 1) * hidden, hidden));
  }
  /// Calls f(W, A, B) for every weight W, whose gradient is Aᵀ·B, in the order in which
  /// gradient_rows() counts their rows.
  template <class F>
  void for_each_weight_product(const Block& block, const MatrixRef<Scalar>& dy, F&& f) {
    for_each_first_weight(*this, block, [&](Weight& weight, MatrixView<Scalar> dpre) {
      f(weight, block.x, GatheredRows<Scalar>(dpre));
    });
    f(down_, GatheredRows<Scalar>(hidden_of(block)), block.rows_of(dy));
  }

  void add_bias_gradients(const Block& block, const MatrixRef<Scalar>& dy, bool replace) {
    if (!config_.bias) return;
    const auto add = [&](const GatheredRows<Scalar>& from, const RowFactors<Scalar>& factors,
                         Parameter<Scalar>& bias) {
      if (!bias.trained) return;
      Matrix<Scalar>& gradient = bias.gradient();
      if (replace) resize_to_zero(gradient, 1, bias.size());
      add_scaled_rows(from, factors, gradient.data());
    };
    const MatrixView<Scalar> unweighted =
        config_.weighted_input ? unweighted_of(block) : pre_of(block);
    add(columns_of(unweighted, 0, config_.hidden), {}, config_.gated ? gate_bias_ : up_bias_);
    if (config_.gated) {
      add(columns_of(unweighted, config_.hidden, config_.hidden), {}, up_bias_);
    }
    add(block.rows_of(dy), output_factors(block), down_bias_);
  }

  /// Computes a product with a weight, of forward or of the gradient w.r.t. the input.
  template <class Product>
  void multiply(const Block& block, const Weight& weight, const Product& product) const {
    multiply_by(weight, block.scratch, product, config_.products);
  }

  /// Columns of the pre-activations (n x pre_width()).
  void compute_pre(const Block& block, Range columns, MatrixView<Scalar> pre, Epilogue epilogue,
                   const FeedForwardPasses* next = nullptr) const {
    const ScatteredRows<Scalar> first(columns_of(pre, 0, config_.hidden));
    if (config_.gated) {
      const ScatteredRows<Scalar> linear(columns_of(pre, config_.hidden, config_.hidden));
      multiply(block, gate_,
               GemmNN<Scalar, Operand>{.a = block.x,
                                       .b = operand(gate_),
                                       .c = first,
                                       .columns = columns,
                                       .bias = {.values = first_values_of(gate_bias_)},
                                       .prefetch_next = first_number(up_)});
      multiply(block, up_,
               GemmNN<Scalar, Operand>{
                   .a = block.x,
                   .b = operand(up_),
                   .c = linear,
                   .columns = columns,
                   .bias = {.values = first_values_of(up_bias_)},
                   .epilogue = epilogue,
                   .prefetch_next = next != nullptr ? first_number(next->gate_) : nullptr});
    } else {
      multiply(block, up_,
               GemmNN<Scalar, Operand>{
                   .a = block.x,
                   .b = operand(up_),
                   .c = first,
                   .columns = columns,
                   .bias = {.values = first_values_of(up_bias_)},
                   .epilogue = epilogue,
                   .prefetch_next = next != nullptr ? first_number(next->up_) : nullptr});
    }
  }

  // activate() and activate_backward() work on a tile; tile_of(m, column)(row, part) is the address
  // of its columns in the part-th H columns of m. What they read and write besides C is not near
  // it, so they prefetch it. Forward prefetches the next tile's hidden rows, which are only
  // written. For backward the whole next tile would be too much: it prefetches the pre-activations
  // of the next panel, and in its first panel those of the next tile too.

  auto tile_of(MatrixView<Scalar> matrix, Index column) const {
    return [this, matrix, column](Index row, Index part = 0) mutable {
      return row_data(matrix, row) + part * config_.hidden + column;
    };
  }

  template <class F>
  static void for_each_next(const Block& block, Range rows, F&& f) {
    const Index first = rows.first + rows.count;
    for (Index i = first; i < std::min(first + rows.count, block.x.count()); ++i) f(i);
  }

  /// Memory for a tile's pre-activations where the tape saves something else.
  struct Tile {
    Scalar data[to_size(direct_rows * tile_columns<Scalar>)];
  };
  /// The pre-activations of a tile: x itself, or with weighted inputs w·x + b, in `made`. The
  /// tile's columns of the bias begin at `column`.
  GatheredRows<Scalar> weighted(const Block& block, Range rows, const Parameter<Scalar>& bias,
                                Index column, const GatheredRows<Scalar>& x, Tile& made) const {
    if (!config_.weighted_input) return x;
    constexpr Index stride = tile_columns<Scalar>;
    weigh_rows(x, {block.weight + rows.first, 1},
               config_.bias ? bias.value.data() + column : nullptr,
               {made.data, stride, rows.count, x.width()});
    return {made.data, stride, rows.count, x.width()};
  }

  /// The input of act: x, or with a limit min(x, limit), stored in y.
  GatheredRows<Scalar> limited(const GatheredRows<Scalar>& x,
                               const ScatteredRows<Scalar>& y) const {
    if (config_.limit == 0) return x;
    limit_above(static_cast<Scalar>(config_.limit), x, y);
    return {y.row(0), y.step(), y.count(), y.width()};
  }
  /// Calls f with the function that turns the second pre-activations of the gated form into its
  /// linear factor.
  template <class F>
  void with_linear_factor(F&& f) const {
    if (config_.limit == 0 && config_.linear_offset == 0) return f(PlainFactor<Scalar>());
    f(LinearFactor<Scalar>(static_cast<Scalar>(config_.limit),
                           static_cast<Scalar>(config_.linear_offset)));
  }

  // In a tape of bfloat16 the codes of a row begin at the first byte of its Scalars.

  static std::byte* code_of(MatrixView<Scalar> saved, Index row, Index column) {
    return reinterpret_cast<std::byte*>(row_data(saved, row)) + column * bfloat16_bytes;
  }
  /// Saves a tile of pre-activations.
  void save_rounded(const Block& block, MatrixView<Scalar> pre, Range rows, Index column,
                    Index width) const {
    auto from = tile_of(pre, column);
    for (Index part = 0; part < pre_parts(); ++part) {
      for (Index row = rows.first; row < rows.first + rows.count; ++row) {
        round_to_bfloat16(width, from(row, part),
                          code_of(block.saved, row, part * config_.hidden + column));
      }
    }
  }
  /// A tile of what save_rounded() saved.
  GatheredRows<Scalar> widened(MatrixView<Scalar> saved, Range rows, Index part, Index column,
                               Index width, Tile& made) const {
    constexpr Index stride = tile_columns<Scalar>;
    for (Index r = 0; r < rows.count; ++r) {
      widen_bfloat16(width, code_of(saved, rows.first + r, part * config_.hidden + column),
                     made.data + r * stride);
    }
    return {made.data, stride, rows.count, width};
  }

  /// hidden = w·act(pre), gated w·act(pre) ⊙ linear.
  void activate(const Block& block, MatrixView<Scalar> pre, Range rows, Index column,
                Index width) const {
    using namespace Eigen::internal;
    auto hidden = tile_of(hidden_of(block), column);
    auto from = tile_of(pre, column);
    for_each_next(block, rows, [&](Index row) { prefetch_strip(hidden(row)); });
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
    const RowFactors<Scalar> factors = output_factors(block, rows.first);
    if (!config_.gated) return detail::activate(config_.activation, input, y, factors);
    detail::activate(config_.activation, input, y);
    const GatheredRows<Scalar> linear = pre_of_part(1, up_bias_, second);
    with_linear_factor([&](const auto& factor) {
      for (Index r = 0; r < rows.count; ++r) {
        const P w = broadcast(*factors.at(r));
        map(
            width, y.row(r),
            [=](const P& v, const P& l) { return pmul(w, pmul(v, factor.value(l))); }, y.row(r),
            linear.row(r));
      }
    });
  }

  /// In: dpre holds u, in the gated form in its second part. Out: dpre = w·u ⊙ act'(pre), in the
  /// gated form w·u ⊙ linear ⊙ act'(pre) and w·u ⊙ act(pre). The hidden rows are computed as in
  /// activate(), and ⟨u, a⟩ is added to this panel's part of the weight's gradient. With weighted
  /// inputs dpre is computed without w first, for the gradients of the biases and of the weight,
  /// ⟨z, dpre⟩, and is then multiplied by w.
  void activate_backward(const Block& block, MatrixView<Scalar> pre, Range columns, Range rows,
                         Index column, Index width) const {
    using namespace Eigen::internal;
    auto hidden = tile_of(hidden_of(block), column);
    auto gradient = tile_of(pre_of(block), column);
    auto from = tile_of(pre, column);
    const bool rounded = config_.saved == Precision::bfloat16;
    const auto prefetch_row = [&](Index row, Index further) {
      for (Index part = 0; part < pre_parts(); ++part) {
        if (rounded) {
          prefetch_far<(strip_lines + 1) / 2>(code_of(pre, row, part * config_.hidden + column),
                                              further * bfloat16_bytes);
        } else {
          prefetch_far<strip_lines>(from(row, part), further);
        }
      }
    };
    constexpr Index panel = expert_block_columns<Scalar>;
    if (column < columns.first + panel) {
      for_each_next(block, rows, [&](Index row) { prefetch_row(row, 0); });
    }
    if (column + panel < columns.first + columns.count) {
      for (Index row = rows.first; row < rows.first + rows.count; ++row) prefetch_row(row, panel);
    }
    Tile first;
    Tile second;
    Tile wide[2];
    const auto saved_part = [&](Index part) -> GatheredRows<Scalar> {
      if (rounded) return widened(pre, rows, part, column, width, wide[part]);
      return {from(rows.first, part), pre.outerStride(), rows.count, width};
    };
    const GatheredRows<Scalar> saved_first = saved_part(0);
    const GatheredRows<Scalar> saved_second = config_.gated ? saved_part(1) : saved_first;
    const GatheredRows<Scalar> x = weighted(block, rows, first_bias(), column, saved_first, first);
    const Index stride = block.scratch.outerStride();
    const ScatteredRows<Scalar> y(hidden(rows.first), stride, rows.count, width);
    const ScatteredRows<Scalar> dx(gradient(rows.first), stride, rows.count, width);
    const GatheredRows<Scalar> input = limited(x, y);
    const RowFactors<Scalar> factors = output_factors(block, rows.first);
    Scalar parts[to_size(direct_rows)];
    if (!config_.gated) {
      detail::activate_backward(config_.activation, input, y, dx, parts, factors);
    } else {
      // From a gradient of 1, dpre becomes act'(pre); the other factors and ⟨u, a⟩ are computed
      // below.
      for (Index r = 0; r < rows.count; ++r) std::fill_n(dx.row(r), width, Scalar{1});
      detail::activate_backward(config_.activation, input, y, dx, parts);
      const GatheredRows<Scalar> pre_linear =
          weighted(block, rows, up_bias_, column, saved_second, second);
      with_linear_factor([&](const auto& factor) {
        for (Index r = 0; r < rows.count; ++r) {
          const P w = broadcast(*factors.at(r));
          P part = broadcast(Scalar{0});
          const Scalar* linear = pre_linear.row(r);
          Scalar* a = y.row(r);
          Scalar* dpre = dx.row(r);
          Scalar* dlinear = gradient(rows.first + r, 1);
          for_each_packet<Scalar>(width, [&](const PacketSpan& at) {
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
      limit_above_backward(static_cast<Scalar>(config_.limit), x, dx);
    }
    if (config_.weighted_input) {
      std::fill_n(parts, rows.count, Scalar{0});
      auto unweighted = tile_of(unweighted_of(block), column);
      for (Index part = 0; part < pre_parts(); ++part) {
        const ScatteredRows<Scalar> d(gradient(rows.first, part), stride, rows.count, width);
        for (Index r = 0; r < rows.count && saves_unweighted(); ++r) {
          std::copy_n(d.row(r), width, unweighted(rows.first + r, part));
        }
        weigh_rows_backward(part == 0 ? saved_first : saved_second, {block.weight + rows.first, 1},
                            d, parts);
      }
    }
    for (Index r = 0; r < rows.count; ++r) add_part(block, rows.first + r, column, parts[r]);
  }

  /// Adds to a part of a weight's gradient. There is one part per panel of columns, and one task
  /// adds it up, strip by strip, so the sum of the parts has the same bits however the columns are
  /// split.
  void add_part(const Block& block, Index row, Index column, Scalar value) const {
    const Index panel = column / expert_block_columns<Scalar>;
    MatrixView<Scalar> scratch = block.scratch;
    Scalar& part = row_data(scratch, row)[parts_column() + panel];
    part = column % expert_block_columns<Scalar> == 0 ? value : part + value;
  }

  Config config_;
  Weight gate_;                  ///< W_1 of the gated form, D x H
  Parameter<Scalar> gate_bias_;  ///< its b_1, 1 x H
  Weight up_;                    ///< W_1 of the plain form, W_3 of the gated one, D x H
  Parameter<Scalar> up_bias_;    ///< b_1 of the plain form, b_3 of the gated one, 1 x H
  Weight down_;                  ///< W_2, H x D
  Parameter<Scalar> down_bias_;  ///< b_2, 1 x D
};

}  // namespace detail
}  // namespace moe
