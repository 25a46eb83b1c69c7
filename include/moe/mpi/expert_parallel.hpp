#pragma once

#include "moe/layer/moe_layer.hpp"
#include "moe/mpi/rank_dispatch.hpp"

/// \file
/// The mixture-of-experts layer over several machines [S17 sec. 3.1].

namespace moe::mpi {

/// A layer whose experts are spread over the ranks of a communicator, see Placement.
///
///     using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
///     moe::mpi::Communicator communicator;
///     moe::mpi::ExpertParallel<Layer> layer({.width = 128,
///                                            .expert = {.hidden = 256},
///                                            .gate = {.experts = 64, .top_k = 4},
///                                            .seed = 1}, communicator);
///     decltype(layer)::Tape tape;
///     const auto& y = layer.forward(x, tape, {.step = step});   // x: this rank's tokens
///
/// It has the verbs of the layer, and computes what the layer would compute on the tokens of all
/// ranks one behind the other, first those of rank 0: the same y and dx for them, and the same
/// gradients, up to the order of sums. In every run on as many ranks they have the same bits. The
/// noise of a token depends on its place in that batch, and tape.balance() speaks of all of it. dy is
/// the gradient of a loss of the whole batch, so where that is a mean, divide by the number of
/// tokens of all ranks, tape.exchange.batch.tokens.
///
/// It is moved, not copied, and what it was moved from is of no use.
///
/// All verbs and the constructor are collective, also on a rank that has no tokens: all ranks make
/// the same call with the same Pass.step. What goes wrong on one is thrown on all, as an Error.
///
/// An expert's gradients are those of all ranks' tokens, on the rank that holds it; they are never
/// divided by the number of ranks. Gradients of the gate are summed over the ranks in backward(),
/// and have the same bits everywhere. So do those of other modules after sum_gradients(); clip with
/// mpi::clip_gradients().
template <class Layer>
using ExpertParallel = typename Layer::template WithDispatch<RankDispatch>;

}  // namespace moe::mpi
