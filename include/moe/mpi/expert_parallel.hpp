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
/// It has the same functions as the layer, and computes what the layer would compute for the batch of
/// the tokens of all ranks, first those of rank 0: the same y, dx and gradients, up to the order of
/// sums. Every run with the same number of ranks gives the same bits. The noise of a token depends on
/// its place in that batch, and tape.balance() is that of the whole batch. dy must be the gradient of
/// a loss of the whole batch: if the loss is a mean, divide by the number of tokens of all ranks,
/// tape.exchange.batch.tokens.
///
/// It can be moved, not copied. An object that was moved from cannot be used.
///
/// The constructor, forward(), backward(), evaluate() and the functions that add, copy and remove
/// experts are collective, also on a rank that has no tokens: all ranks make the same call with the
/// same Pass.step, first_token, sequences, loss_scale and noise_factor, and with Pass.batch null.
/// first_token is that of the first row of rank 0. An exception on one rank is thrown on all, as an
/// Error.
///
/// An expert's gradients include those of all ranks' tokens, on the rank that has the expert; they are
/// never divided by the number of ranks. backward() sums the gradients of the gate over the ranks, so
/// that they have the same bits on all. For the gradients of other modules call sum_gradients(); clip
/// with mpi::clip_gradients().
template <class Layer>
using ExpertParallel = typename Layer::template WithDispatch<RankDispatch>;

}  // namespace moe::mpi
