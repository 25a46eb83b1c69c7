#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <utility>

#include "moe/adapt/lora_config.hpp"
#include "moe/adapt/low_rank.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/routing/config_checks.hpp"

/// \file
/// Lora<FeedForward>: an expert whose weights are frozen, with low-rank adapters that are trained.

namespace moe {

/// The configuration of an adapted FeedForward.
struct LoraFeedForwardConfig {
  Index width = 0;  ///< D; 0 inside a layer's configuration stands for the layer's width
  FeedForwardConfig network{};  ///< its width is 0 or D
  LoraConfig lora{};            ///< of the adapters

  template <class Self, class Visitor>
  static constexpr void visit_fields(Self& self, Visitor visit) {
    visit("width", self.width);
    visit("network", self.network);
    visit("lora", self.lora);
  }
};

namespace detail {

/// A frozen weight and the low-rank matrix that is added to it. `Base` is a Parameter or a narrow
/// weight.
template <class Scalar, class Base>
struct LoraWeight {
  Base base;  ///< K x N
  LowRank<Scalar> low_rank{};
  Index column = 0;  ///< the first column of t_a and t_b in an expert's scratch

  /// n x r, factor·(the rows that the matrix multiplies)·A.
  MatrixView<Scalar> t_a(const MatrixView<Scalar>& scratch) const {
    return columns_of(scratch, column, low_rank.rank());
  }
  /// n x r, factor·(the gradient w.r.t. these rows' product)·Bᵀ.
  MatrixView<Scalar> t_b(const MatrixView<Scalar>& scratch) const {
    return columns_of(scratch, column + low_rank.rank(), low_rank.rank());
  }

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    if constexpr (is_parameter<Base>) visit("weight", self.base);
    LowRank<Scalar>::visit_parameters(self.low_rank, visit);
  }
};

template <class Scalar, class Base>
auto operand(const LoraWeight<Scalar, Base>& weight) {
  return operand(weight.base);
}
template <class Scalar, class Base>
const Scalar* first_number(const LoraWeight<Scalar, Base>& weight) {
  return first_number(weight.base);
}

/// The low-rank product comes first, so that the epilogue of the other product reads the whole sum.
template <class Scalar, class Base, class Product>
void multiply_by(const LoraWeight<Scalar, Base>& weight, const MatrixView<Scalar>& scratch,
                 const Product& product, Precision products) {
  if (weight.low_rank.rank() == 0) return multiply_by(weight.base, scratch, product, products);
  constexpr bool transposed = std::is_same_v<Product, GemmNT<Scalar, decltype(product.b)>>;
  multiply_low_rank(weight.low_rank, transposed ? weight.t_b(scratch) : weight.t_a(scratch),
                    product);
  Product rest = product;
  rest.start = Start::accumulate;
  multiply_by(weight.base, scratch, rest, products);
}

template <class Scalar, class Base>
void add_weight_gradient(LoraWeight<Scalar, Base>& weight,
                         const std::type_identity_t<GatheredRows<Scalar>>& a,
                         const std::type_identity_t<GatheredRows<Scalar>>& b, Range rows,
                         Start start, Precision products) {
  add_weight_gradient(weight.base, a, b, rows, start, products);
}

/// A copy of a parameter that is not trained, without its gradient.
template <class Scalar>
Parameter<Scalar> frozen_copy(const Parameter<Scalar>& from) {
  Parameter<Scalar> copy;
  copy.value = from.value;
  copy.trained = false;
  copy.stored.rows = from.stored.rows;
  copy.stored.columns = from.stored.columns;
  return copy;
}

/// The network that is adapted, given the type in which its weights are stored: a Scalar, or a
/// narrow format (moe/adapt/narrow_lora.hpp).
template <class Stored>
struct LoraBase {
  using Scalar = Stored;
  using Weight = Parameter<Scalar>;
  using Network = FeedForward<Scalar>;

  /// Calls f(name, part) for every weight and bias.
  template <class F>
  static void visit_parts(const Network& network, F&& f) {
    Network::visit_parameters(network, std::forward<F>(f));
  }
  static Network make(const FeedForwardConfig& config, std::uint64_t seed) {
    return Network(config, seed);
  }
  /// The values of a weight.
  static const Matrix<Scalar>& numbers(const Weight& weight) { return weight.value; }
};

}  // namespace detail

/// A FeedForward whose weights and biases are frozen, with trained low-rank adapters on some of its maps:
/// x·W becomes x·W + factor·(x·A)·B. B is zero initially, so that the network computes the same as
/// the FeedForward; with rank 0 its results always have the same bits.
///
/// No gradient of W is computed, and optimizers take no memory for it; A·B is never formed. A row of a pass
/// takes r·(inputs + outputs) more multiply-adds for each map with an adapter.
///
/// Parameters: those of the FeedForward, under the same names, with `trained` false; and after each
/// weight with an adapter, "up.weight" for example, "up.lora_A.weight" (A, inputs x r) and
/// "up.lora_B.weight" (B, r x outputs). A user may set `trained` of any of them.
///
/// `Stored` is float or double; or, with moe/adapt/narrow_lora.hpp, a narrow format such as Int8: then the
/// frozen weights are narrow and are not parameters.
template <class Stored = float>
class LoraFeedForward : public detail::FeedForwardPasses<
                            typename detail::LoraBase<Stored>::Scalar,
                            detail::LoraWeight<typename detail::LoraBase<Stored>::Scalar,
                                               typename detail::LoraBase<Stored>::Weight>> {
  using Frozen = detail::LoraBase<Stored>;
  using Weight = detail::LoraWeight<typename Frozen::Scalar, typename Frozen::Weight>;
  using Base = detail::FeedForwardPasses<typename Frozen::Scalar, Weight>;

 public:
  using typename Base::Block;
  using typename Base::Scalar;
  using Config = LoraFeedForwardConfig;      ///< see LoraFeedForwardConfig
  using Network = typename Frozen::Network;  ///< the network that is adapted
  /// Whether the frozen weights are narrow, and so no parameters.
  static constexpr bool has_narrow_weights = !std::is_floating_point_v<Stored>;

  /// Fresh weights with fresh adapters. Throws std::invalid_argument for a configuration out of range.
  LoraFeedForward(const Config& config, std::uint64_t seed)
      : LoraFeedForward(Frozen::make(completed(config).network, derive_seed(seed, 0)), config.lora,
                        derive_seed(seed, 1)) {}

  /// A copy of a network with fresh adapters. Throws std::invalid_argument for a configuration out
  /// of range.
  LoraFeedForward(const Network& network, const LoraConfig& lora, std::uint64_t seed)
      : Base(network.config()),
        config_{network.config().width, network.config(),
                detail::checked_lora<Scalar>("LoraConfig", lora)} {
    const bool any = lora.up || lora.down || (lora.gate && network.config().gated);
    detail::require(lora.rank == 0 || any, "LoraConfig.rank = ", lora.rank,
                    ", but gate, up and down leave no map with an adapter");
    Index number = 0;
    Frozen::visit_parts(network, [&](std::string_view name, const auto& from) {
      Base::visit_parts(*this, [&](std::string_view part, auto& to) {
        if constexpr (std::is_same_v<decltype(to), Weight&>) {
          if constexpr (std::is_convertible_v<decltype(from), const typename Frozen::Weight&>) {
            if (part == name) adapt(name, from, number++, seed, to);
          }
        } else if constexpr (std::is_convertible_v<decltype(from), const Parameter<Scalar>&>) {
          if (part == name) to = detail::frozen_copy(from);
        }
      });
    });
  }

  /// The configuration, with the widths filled in where they were 0.
  const Config& config() const { return config_; }

  /// The FeedForward that computes the same up to rounding, with weights W + factor·A·B. Throws
  /// std::invalid_argument if a parameter no longer has its original shape.
  FeedForward<Scalar> merged() const {
    detail::check_shapes(*this, "LoraFeedForward");
    auto network = FeedForward<Scalar>::zeros(config_.network);
    Base::visit_parts(*this, [&](std::string_view name, const auto& from) {
      FeedForward<Scalar>::visit_parameters(network, [&](std::string_view part, auto& to) {
        if (part != name) return;
        if constexpr (detail::is_parameter<std::remove_cvref_t<decltype(from)>>) {
          to.value = from.value;
        } else {
          to.value = Frozen::numbers(from.base);
          Matrix<Scalar> scaled;
          detail::add_low_rank(from.low_rank, scaled, to.value);
        }
      });
    });
    return network;
  }

  /// Multiply-adds of a row.
  Index row_work() const {
    Index work = 0;
    Base::visit_parts(*this, [&](std::string_view, const auto& part) {
      if constexpr (std::is_same_v<decltype(part), const Weight&>) {
        work += config_.network.width * config_.network.hidden + part.low_rank.size();
      }
    });
    return work;
  }

  /// That of a FeedForward, and room for x·A and dy·Bᵀ of every map; see FusedNetwork.
  Index scratch_width() const { return Base::odd_lines(rank_column(Base::pre_parts() + 1)); }

  // prepares() is whether there is such room to fill, and the next four fill it.

  /// See PreparedNetwork.
  bool prepares() const { return config_.lora.rank > 0; }
  /// See PreparedNetwork.
  void prepare_hidden(const Block& block) const {
    Base::for_each_first_weight(*this, block, [&](const Weight& weight, MatrixView<Scalar>) {
      multiply_by_a(weight, block.x, block);
    });
  }
  /// See PreparedNetwork.
  void prepare_output(const Block& block) const {
    multiply_by_a(this->down_, Base::hidden_of(block), block);
  }
  /// See PreparedNetwork.
  void prepare_hidden_backward(const Block& block, const MatrixRef<Scalar>& dy) const {
    if (config_.network.recompute) prepare_hidden(block);
    multiply_by_b(this->down_, block.rows_of(dy), block);
  }
  /// See PreparedNetwork.
  void prepare_output_backward(const Block& block) const {
    Base::for_each_first_weight(*this, block, [&](const Weight& weight, MatrixView<Scalar> dpre) {
      multiply_by_b(weight, dpre, block);
      if (weight.low_rank.b.trained && !config_.network.recompute) {
        multiply_by_a(weight, block.x, block);
      }
    });
    if (this->down_.low_rank.b.trained) prepare_output(block);
  }

  /// Rows of the gradients of what is trained: of the weights, if one is trained, and of the adapters.
  Index gradient_rows() const {
    Index rows = weight_rows();
    visit_adapters(
        *this, [&](std::string_view, const auto& low_rank) { rows += low_rank.gradient_rows(); });
    // The gradients of the biases are added with row 0, so there is at least one row.
    return std::max<Index>(1, rows);
  }

  /// Adds to the gradients of the trained parameters, or overwrites them; see FusedNetwork.
  void add_gradients(const Block& block, const MatrixRef<Scalar>& dy, Range rows,
                     bool replace = false) {
    Index first = weight_rows();
    Base::add_gradients(block, dy, detail::common_range(rows, {0, first}), replace);
    Base::for_each_weight_product(
        block, dy,
        [&](Weight& weight, const GatheredRows<Scalar>& a, const GatheredRows<Scalar>& b) {
          const Index count = weight.low_rank.gradient_rows();
          const Range own = detail::common_range(rows, {first, count});
          detail::add_low_rank_gradients(weight.low_rank, a, b, weight.t_a(block.scratch),
                                         weight.t_b(block.scratch), {own.first - first, own.count},
                                         detail::start_of(replace));
          first += count;
        });
  }

  /// The parameters named above.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Base::visit_parts(self, [&](std::string_view name, auto& part) {
      if constexpr (detail::is_parameter<std::remove_cvref_t<decltype(part)>>) {
        visit(name, part);
      } else {
        visit(map_of(name), part);
      }
    });
  }
  /// visit(map, adapter) for every map that can have one: "gate", "up" or "down".
  template <class Self, class Visitor>
  static void visit_adapters(Self& self, Visitor visit) {
    Base::visit_parts(self, [&](std::string_view name, auto& part) {
      if constexpr (!detail::is_parameter<std::remove_cvref_t<decltype(part)>>) {
        visit(map_of(name), part.low_rank);
      }
    });
  }

 private:
  /// "up" of "up.weight".
  static std::string_view map_of(std::string_view weight) {
    return weight.substr(0, weight.find('.'));
  }
  static Config completed(Config config) {
    if (config.width == 0) config.width = config.network.width;
    detail::complete_width("LoraFeedForward", "network", config.width, config.network.width);
    return config;
  }

  /// Puts an adapter on the map of this number.
  void adapt(std::string_view name, const typename Frozen::Weight& from, Index number,
             std::uint64_t seed, Weight& to) {
    using detail::frozen_copy;
    to.base = frozen_copy(from);
    const std::string_view map = map_of(name);
    const LoraConfig& lora = config_.lora;
    const bool has_adapter = map == "gate" ? lora.gate : map == "up" ? lora.up : lora.down;
    if (lora.rank == 0 || !has_adapter) return;
    const bool is_down = map == "down";
    const FeedForwardConfig& network = config_.network;
    to.low_rank = {is_down ? network.hidden : network.width,
                   is_down ? network.width : network.hidden, lora.rank, detail::lora_factor(lora),
                   derive_seed(seed, static_cast<std::uint64_t>(number))};
    to.column = rank_column(number);
  }

  /// The first column of a map's t_a and t_b in the scratch.
  Index rank_column(Index map) const {
    return Base::parts_column() + Base::panels() + 2 * config_.lora.rank * map;
  }
  /// Base::gradient_rows() rounded up to whole blocks of gradient_block_rows, so that the adapters' rows
  /// begin at a block; 0 if no weight is trained.
  Index weight_rows() const {
    bool is_any_trained = false;
    Base::visit_parts(*this, [&](std::string_view, const auto& part) {
      if constexpr (std::is_same_v<decltype(part), const Weight&>) {
        if constexpr (detail::is_parameter<typename Frozen::Weight>) {
          is_any_trained = is_any_trained || part.base.trained;
        }
      }
    });
    return is_any_trained ? detail::LowRank<Scalar>::in_blocks(Base::gradient_rows()) : 0;
  }

  static void multiply_by_a(const Weight& weight, const GatheredRows<Scalar>& rows,
                            const Block& block) {
    if (weight.low_rank.rank() == 0) return;
    detail::multiply_by_a(weight.low_rank, rows, weight.t_a(block.scratch));
  }
  static void multiply_by_b(const Weight& weight, const GatheredRows<Scalar>& rows,
                            const Block& block) {
    if (weight.low_rank.rank() == 0) return;
    detail::multiply_by_b(weight.low_rank, rows, weight.t_b(block.scratch));
  }

  Config config_;
};

template <template <class> class Network, class Stored = float>
class Lora;

/// An adapted expert: `MoELayer<Lora<FeedForward>>`, made from a trained layer by adapt().
template <class Stored>
class Lora<FeedForward, Stored> : public detail::ExpertOf<LoraFeedForward<Stored>> {
 public:
  using detail::ExpertOf<LoraFeedForward<Stored>>::ExpertOf;
};

}  // namespace moe
