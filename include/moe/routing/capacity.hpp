#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <span>
#include <string_view>

#include "moe/routing/choices.hpp"
#include "moe/routing/pass.hpp"
#include "moe/routing/select_largest.hpp"
#include "moe/routing/shared_batch.hpp"
#include "moe/routing/shared_selection.hpp"
#include "moe/routing/switch_loss.hpp"

/// \file
/// The capacity of experts: the largest number of tokens of each, and which choices are dropped when
/// there are more.
///
/// [G21] D. Lepikhin, H. Lee, Y. Xu, D. Chen, O. Firat, Y. Huang, M. Krikun, N. Shazeer, Z. Chen,
/// "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", ICLR 2021
/// (arXiv 2006.16668), algorithm 1.
/// [F22] W. Fedus, B. Zoph, N. Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models
/// with Simple and Efficient Sparsity", JMLR 2022 (arXiv 2101.03961), section 2.2.
/// [R21] C. Riquelme, J. Puigcerver, B. Mustafa, M. Neumann, R. Jenatton, A. Susano Pinto, D. Keysers, N.
/// Houlsby, "Scaling Vision with Sparse Mixture of Experts", NeurIPS 2021 (arXiv 2106.05974), section
/// 4.1, Batch Prioritized Routing.

namespace moe {

/// The order in which the choices of a batch take the places of their experts. A choice that finds no
/// place left is dropped.
enum class PlaceOrder {
  rows,            ///< token by token [F22]
  first_choices,   ///< all tokens' first choices, then all second ones, and so on [G21]
  largest_weight,  ///< by the gate's weight, so that those of lowest weight are dropped
  best_tokens,  ///< as first_choices, but tokens in descending order of the weight of their first
                ///< choice [R21]; not where processes share a batch
};
constexpr std::array<std::string_view, 4> enumerator_names(PlaceOrder) {
  return {"rows", "first_choices", "largest_weight", "best_tokens"};
}

namespace detail {

/// The places of an expert: factor·T·K/E rounded up, and at most T. So if there are tokens there is at
/// least one place. (As in Megatron-Core; Mesh TensorFlow rounds down, but not below 4.)
inline Index expert_capacity(double factor, Index tokens, Index top_k, Index experts) {
  const double places = factor * static_cast<double>(tokens) * static_cast<double>(top_k) /
                        static_cast<double>(experts);
  // 1.1·10 is a little more than 11 in binary numbers, and should be 11 places.
  return static_cast<Index>(std::ceil(std::min(places * (1 - 1e-12), static_cast<double>(tokens))));
}

/// The sequences of a batch, if each has places of its own.
struct PlaceSequences {
  Index count = 1;                        ///< divides the number of rows
  RowOrder order = RowOrder::time_major;  ///< of the rows
  const ValidTokens* tokens = nullptr;  ///< the rows of the choices' tokens; null for one sequence

  Index of(Index token) const {
    return count == 1 ? 0 : sequence_of_token(*tokens, token, count, order);
  }
  /// Which of count·E counts of tokens, one for each expert of each sequence, a choice adds to.
  template <class Scalar>
  Index count_of(const Choices<Scalar>& choices, Index choice, Index experts) const {
    return of(choice / choices.top_k) * experts + choices.expert[choice];
  }
};

/// The scratch of drop_over_capacity().
template <class Scalar>
struct CapacityScratch {
  IndexedVector<Index> order;      ///< choices
  IndexedVector<Scalar> priority;  ///< T, of tokens
  IndexedVector<Index> tokens;     ///< T, by priority
  IndexedVector<Index> taken;      ///< sequences x E, or turns x sequences x E

  // For a batch that processes share.
  IndexedVector<Index> of_turn;    ///< as large as `taken`: the numbers of choices of all processes
  SharedSelection<Scalar> shared;  ///< by weight
};

/// Drops the choices that find no place left: each expert has `capacity` places in each sequence.
/// Choices that were dropped before take none. Ties of weights go to the lower token, and NaN comes
/// last. O(T·K + sequences·E); for largest_weight and best_tokens O(T·K·log(T·K) + sequences·E).
template <class Scalar>
void drop_over_capacity(PlaceOrder how, Index capacity, Index experts,
                        const PlaceSequences& sequences, Choices<Scalar>& choices,
                        CapacityScratch<Scalar>& scratch) {
  resize(scratch.order, choices.size());
  std::iota(scratch.order.begin(), scratch.order.end(), Index{0});
  if (how == PlaceOrder::first_choices || how == PlaceOrder::best_tokens) {
    const Index tokens = choices.tokens();
    resize(scratch.tokens, tokens);
    std::iota(scratch.tokens.begin(), scratch.tokens.end(), Index{0});
    if (how == PlaceOrder::best_tokens) {
      resize(scratch.priority, tokens);
      for (Index t = 0; t < tokens; ++t) scratch.priority[t] = choices.weight[t * choices.top_k];
      std::sort(scratch.tokens.begin(), scratch.tokens.end(),
                ByScore<Scalar>(scratch.priority.data()));
    }
    for (Index i = 0; i < choices.size(); ++i) {
      scratch.order[i] = scratch.tokens[i % tokens] * choices.top_k + i / tokens;
    }
  } else if (how == PlaceOrder::largest_weight) {
    std::sort(scratch.order.begin(), scratch.order.end(), ByScore<Scalar>(choices.weight.data()));
  }
  assign(scratch.taken, sequences.count * experts, Index{0});
  for (const Index choice : scratch.order) {
    if (choices.keeps[choice] == 0) continue;
    const Index count = sequences.count_of(choices, choice, experts);
    if (++scratch.taken[count] > capacity) choices.keeps[choice] = 0;
  }
}

/// Throws std::invalid_argument for an order that is not possible if processes share a batch.
inline void check_shared_order(PlaceOrder how) {
  require(how != PlaceOrder::best_tokens,
          "PlaceOrder::best_tokens: not possible in a batch that several processes share; use "
          "first_choices or largest_weight");
}

/// The first call of a SharedBatch that drop_over_capacity() makes. Throws as check_shared_order()
/// does.
template <class Scalar>
SharedCall capacity_call(PlaceOrder how, Index top_k, Index experts, Index sequences = 1) {
  check_shared_order(how);
  const Index counts = sequences * experts;
  if (how == PlaceOrder::largest_weight) return SharedSelection<Scalar>::first_call(counts);
  const Index turns = how == PlaceOrder::first_choices ? top_k : 1;
  return {SharedCall::sum_and_prefix, turns * counts};
}

/// The same for choices that may be a part of a larger batch: the tokens of all processes share the
/// places. Throws as check_shared_order() does.
template <class Scalar>
void drop_over_capacity(PlaceOrder how, Index capacity, Index experts,
                        const PlaceSequences& sequences, const SharedBatch* batch,
                        Choices<Scalar>& choices, CapacityScratch<Scalar>& scratch) {
  if (batch == nullptr) {
    return drop_over_capacity(how, capacity, experts, sequences, choices, scratch);
  }
  check_shared_order(how);
  // Each expert of each sequence has places of its own.
  const Index counts = sequences.count * experts;
  const auto count_of = [&](Index choice) { return sequences.count_of(choices, choice, experts); };
  if (how == PlaceOrder::largest_weight) {
    scratch.shared.find(counts, capacity, *batch, [&](auto&& visit) {
      for (Index c = 0; c < choices.size(); ++c) {
        if (choices.keeps[c] != 0) visit(count_of(c), choices.weight[c]);
      }
    });
    for (Index c = 0; c < choices.size(); ++c) {
      if (choices.keeps[c] == 0) continue;
      if (!scratch.shared.takes(count_of(c), choices.weight[c])) choices.keeps[c] = 0;
    }
    return;
  }
  // Places go turn by turn: first choices, second ones, ..., or all in one turn.
  const Index turns = how == PlaceOrder::first_choices ? choices.top_k : 1;
  const auto place_of = [&](Index choice) { return choice % turns * counts + count_of(choice); };
  assign(scratch.taken, turns * counts, Index{0});
  for (Index c = 0; c < choices.size(); ++c) {
    if (choices.keeps[c] != 0) ++scratch.taken[place_of(c)];
  }
  resize(scratch.of_turn, turns * counts);
  batch->sum_and_prefix(std::span<Index>(scratch.taken), std::span<Index>(scratch.of_turn));
  for (Index i = 0; i < counts && turns > 1; ++i) {
    Index before = 0;
    for (Index turn = 0; turn < turns; ++turn) {
      scratch.taken[turn * counts + i] += before;
      before += scratch.of_turn[turn * counts + i];
    }
  }
  for (Index c = 0; c < choices.size(); ++c) {
    if (choices.keeps[c] != 0 && ++scratch.taken[place_of(c)] > capacity) choices.keeps[c] = 0;
  }
}

}  // namespace detail
}  // namespace moe
