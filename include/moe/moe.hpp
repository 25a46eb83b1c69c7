#pragma once

/// \file
/// The whole library but io/ and mpi/, which have dependencies of their own.

#include "moe/config.hpp"
#include "moe/experts/expert.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/matrix.hpp"
#include "moe/nn/dropout.hpp"
#include "moe/nn/embedding.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/lstm.hpp"
#include "moe/nn/softmax_cross_entropy.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/gradient_clipping.hpp"
#include "moe/optim/learning_rate.hpp"
#include "moe/optim/sgd.hpp"
#include "moe/parallel.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"
#include "moe/routing/balance_loss.hpp"
#include "moe/routing/gate.hpp"
#include "moe/routing/noisy_top_k_gate.hpp"
#include "moe/routing/routing.hpp"
#include "moe/version.hpp"
