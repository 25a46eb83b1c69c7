#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <span>
#include <string_view>

#include "moe/routing/choices.hpp"
#include "moe/routing/shared_batch.hpp"
#include "moe/routing/select_largest.hpp"

/// \file
/// A limit to the tokens of an expert, and which of them are dropped where there are more.
///
/// [G21] D. Lepikhin, H. Lee, Y. Xu, D. Chen, O. Firat, Y. Huang, M. Krikun, N. Shazeer, Z. Chen,
/// "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", ICLR 2021
/// (arXiv 2006.16668), algorithm 1.
/// [F22] W. Fedus, B. Zoph, N. Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models
/// with Simple and Efficient Sparsity", JMLR 2022 (arXiv 2101.03961), section 2.2.

namespace moe {

/// In which order the choices of a batch take the places of their experts; those that find none are
/// dropped.
enum class PlaceOrder {
  rows,            ///< token by token [F22]
  first_choices,   ///< all tokens' first choices, then all second ones, and so on [G21]
  largest_weight,  ///< by the gate's weight, so that those of lowest weight are dropped
};
constexpr std::array<std::string_view, 3> enumerator_names(PlaceOrder) {
  return {"rows", "first_choices", "largest_weight"};
}

namespace detail {

/// The places of an expert: factor·T·K/E rounded up, so there is at least one where there are
/// tokens, and at most T. (Megatron-Core does so; Mesh TensorFlow rounds down, but not below 4.)
inline Index expert_capacity(double factor, Index tokens, Index top_k, Index experts) {
  const double places = factor * static_cast<double>(tokens) * static_cast<double>(top_k) /
                        static_cast<double>(experts);
  // 1.1·10 is a little more than 11 in binary numbers, and should be 11 places.
  return static_cast<Index>(std::ceil(std::min(places * (1 - 1e-12), static_cast<double>(tokens))));
}

/// What drop_over_capacity() needs of memory.
template <class Scalar>
struct CapacityScratch {
  IndexedVector<Index> order;  ///< choices
  IndexedVector<Index> taken;  ///< E

  Choices<Scalar> all;      ///< of all processes, where they share a batch
  IndexedVector<Index> kept;  ///< T·K, the experts of our choices, -1 where dropped
};

/// Drops the choices that find no place; one that was dropped before takes none. Ties of weights go
/// to the lower token, and NaN comes last. O(T·K + E), and O(T·K·log(T·K)) by weight.
template <class Scalar>
void drop_over_capacity(PlaceOrder how, Index capacity, Index experts, Choices<Scalar>& choices,
                        CapacityScratch<Scalar>& scratch) {
  resize(scratch.order, choices.size());
  std::iota(scratch.order.begin(), scratch.order.end(), Index{0});
  if (how == PlaceOrder::first_choices) {
    const Index tokens = choices.tokens();
    for (Index i = 0; i < choices.size(); ++i) {
      scratch.order[i] = i % tokens * choices.top_k + i / tokens;
    }
  } else if (how == PlaceOrder::largest_weight) {
    std::sort(scratch.order.begin(), scratch.order.end(), ByScore<Scalar>(choices.weight.data()));
  }
  assign(scratch.taken, experts, Index{0});
  for (const Index choice : scratch.order) {
    const auto c = to_size(choice);
    if (choices.keeps[c] == 0) continue;
    if (++scratch.taken[choices.expert[c]] > capacity) choices.keeps[c] = 0;
  }
}

/// The same where the choices may be of a part of a batch: places are those of all processes'
/// tokens, and each process finds out what becomes of all choices.
template <class Scalar>
void drop_over_capacity(PlaceOrder how, Index capacity, Index experts,
                        const SharedBatch* batch, Choices<Scalar>& choices,
                        CapacityScratch<Scalar>& scratch) {
  if (batch == nullptr) return drop_over_capacity(how, capacity, experts, choices, scratch);
  Choices<Scalar>& all = scratch.all;
  all.resize(batch->tokens(), choices.top_k);
  copy_vector(std::span<const Index>(choices.expert), scratch.kept);
  for (std::size_t c = 0; c < choices.keeps.size(); ++c) {
    if (choices.keeps[c] == 0) scratch.kept[c] = -1;
  }
  batch->gather(std::span<const Index>(scratch.kept), choices.top_k, std::span<Index>(all.expert));
  if (how == PlaceOrder::largest_weight) {
    batch->gather(std::span<const Scalar>(choices.weight), choices.top_k,
                  std::span<Scalar>(all.weight));
  }
  for (std::size_t c = 0; c < all.keeps.size(); ++c) all.keeps[c] = all.expert[c] >= 0 ? 1 : 0;
  drop_over_capacity(how, capacity, experts, all, scratch);
  std::copy_n(all.keeps.begin() + batch->first_token() * choices.top_k, choices.size(),
              choices.keeps.begin());
}

}  // namespace detail
}  // namespace moe
