#pragma once

/// \file
/// Explicit instantiations of what programs use most, in float and double. With MOE_EXTERN_TEMPLATES, moe.hpp
/// includes this file, and the compiler makes no object code for them: for each of the two types
/// another file must be compiled with MOE_INSTANTIATE defined as that type, and with the same
/// flags. CMake's moe::compiled is such a library, and defines MOE_EXTERN_TEMPLATES for the targets
/// that link it.

#include "moe/experts/expert.hpp"
#include "moe/experts/feed_forward.hpp"
#include "moe/gates/balanced_gate.hpp"
#include "moe/gates/expert_choice_gate.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/noisy_top_k_gate.hpp"
#include "moe/gates/product_key_gate.hpp"
#include "moe/gates/shared_expert_gate.hpp"
#include "moe/gates/top_k_gate.hpp"
#include "moe/kernels/activations.hpp"
#include "moe/kernels/gemm.hpp"
#include "moe/kernels/gemm_bfloat16.hpp"
#include "moe/layer/moe_layer.hpp"
#include "moe/nn/linear.hpp"
#include "moe/nn/lstm.hpp"
#include "moe/nn/softmax_cross_entropy.hpp"
#include "moe/optim/adam.hpp"
#include "moe/optim/sgd.hpp"
#include "moe/random.hpp"

#ifdef MOE_INSTANTIATE
#define MOE_EXTERN
#else
#define MOE_EXTERN extern
#endif

// A function that is not inline is neither instantiated nor compiled where it is extern. The members of
// a class are inline: they are still instantiated, so that they can be inlined, but no object code
// is made for them.
#define MOE_INSTANTIATIONS(Scalar)                                                                \
  MOE_EXTERN template void detail::gemm_serial<Scalar>(const GemmNN<Scalar>&);                    \
  MOE_EXTERN template void detail::gemm_serial<Scalar>(const GemmNT<Scalar>&);                    \
  MOE_EXTERN template void detail::gemm_serial<Scalar>(const GemmTN<Scalar>&);                    \
  MOE_EXTERN template void detail::gemm<Scalar>(const GemmNN<Scalar>&);                           \
  MOE_EXTERN template void detail::gemm<Scalar>(const GemmNT<Scalar>&);                           \
  MOE_EXTERN template void detail::gemm<Scalar>(const GemmTN<Scalar>&);                           \
  MOE_EXTERN template void detail::gemm_serial<GemmNN<Scalar>>(const GemmNN<Scalar>&, Precision); \
  MOE_EXTERN template void detail::gemm_serial<GemmNT<Scalar>>(const GemmNT<Scalar>&, Precision); \
  MOE_EXTERN template void detail::gemm_serial<GemmTN<Scalar>>(const GemmTN<Scalar>&, Precision); \
  MOE_EXTERN template void detail::activate<Scalar>(Activation, const GatheredRows<Scalar>&,      \
                                                    const ScatteredRows<Scalar>&,                 \
                                                    const detail::RowFactors<Scalar>&);           \
  MOE_EXTERN template void detail::activate_backward<Scalar>(                                     \
      Activation, const GatheredRows<Scalar>&, const ScatteredRows<Scalar>&,                      \
      const ScatteredRows<Scalar>&, Scalar*, const detail::RowFactors<Scalar>&);                  \
  MOE_EXTERN template void detail::fill_noise<Scalar>(                                            \
      std::uint64_t, const NoiseKey&, Index, Index, detail::FunctionRef<Index(Index)>, Scalar*);  \
  MOE_EXTERN template class NoisyTopKGate<Scalar>;                                                \
  MOE_EXTERN template class TopKGate<Scalar>;                                                     \
  MOE_EXTERN template class HierarchicalGate<Scalar>;                                             \
  MOE_EXTERN template class ProductKeyGate<Scalar>;                                               \
  MOE_EXTERN template class BalancedGate<Scalar>;                                                 \
  MOE_EXTERN template class ExpertChoiceGate<Scalar>;                                             \
  MOE_EXTERN template class SharedExpertGate<NoisyTopKGate<Scalar>>;                              \
  MOE_EXTERN template class FeedForward<Scalar>;                                                  \
  MOE_EXTERN template class Expert<FeedForward, Scalar>;                                          \
  MOE_EXTERN template class detail::ExpertPass<Expert<FeedForward, Scalar>>;                      \
  MOE_EXTERN template class MoELayer<Expert<FeedForward, Scalar>, NoisyTopKGate<Scalar>>;         \
  MOE_EXTERN template class MoELayer<Expert<FeedForward, Scalar>, TopKGate<Scalar>>;              \
  MOE_EXTERN template class Linear<Scalar>;                                                       \
  MOE_EXTERN template class LSTM<Scalar>;                                                         \
  MOE_EXTERN template class SoftmaxCrossEntropy<Scalar>;                                          \
  MOE_EXTERN template class SGD<Scalar>;                                                          \
  MOE_EXTERN template class Adam<Scalar>;

namespace moe {
#ifdef MOE_INSTANTIATE
MOE_INSTANTIATIONS(MOE_INSTANTIATE)
#else
MOE_INSTANTIATIONS(float)
MOE_INSTANTIATIONS(double)
#endif
}  // namespace moe

#undef MOE_INSTANTIATIONS
#undef MOE_EXTERN
