#include <cstdio>

#include "whole.hpp"

using namespace moe;
using mpi::Communicator;
using test::random_matrix;

namespace {

struct Collectives {
  std::int64_t step = 0;  ///< forward and backward
  std::int64_t evaluation = 0;
};

template <class Gate>
Collectives count(const char* name, const typename Gate::Config& gate) {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  using Parallel = mpi::ExpertParallel<MoELayer<Expert<FeedForward>, Gate>>;
  Parallel layer({.width = 16, .expert = {.hidden = 8}, .gate = gate, .seed = 1}, communicator);
  test::randomize_by_name(layer, 0.5);
  const auto x = random_matrix<float>(100, 16, static_cast<std::uint64_t>(communicator.rank()));
  typename Parallel::Tape tape;
  Collectives found;
  for (std::uint64_t step = 0; step < 2; ++step) {  // the first one is no other
    communicator.traffic() = {};
    layer.forward(x, tape, {.step = step});
    layer.backward(x, tape);
    if (step > 0) CHECK(found.step == communicator.traffic().collectives);
    found.step = communicator.traffic().collectives;
  }
  communicator.traffic() = {};
  layer.evaluate(x, tape);
  found.evaluation = communicator.traffic().collectives;
  if (communicator.rank() == 0) {
    std::printf("%s: %d collectives in a step, %d in evaluate()\n", name,
                static_cast<int>(found.step), static_cast<int>(found.evaluation));
  }
  return found;
}

}  // namespace

TEST_CASE("collectives: a step of a layer takes few", "[mpi]") {
  const auto check = [](const Collectives& found, std::int64_t step, std::int64_t evaluation) {
    CHECK(found.step <= step);
    CHECK(found.evaluation <= evaluation);
  };
  check(count<NoisyTopKGate<>>("NoisyTopKGate", {.experts = 8, .top_k = 2}), 9, 6);
  check(count<HierarchicalGate<>>("HierarchicalGate",
                                  {.groups = 4, .group_experts = 2, .top_k_groups = 2, .top_k = 1}),
        9, 6);
  check(count<TopKGate<>>("TopKGate", {.experts = 8, .top_k = 2, .switch_loss_weight = 0.1}), 9, 6);
  for (const PlaceOrder order :
       {PlaceOrder::rows, PlaceOrder::first_choices, PlaceOrder::largest_weight}) {
    const std::string name = "TopKGate with a capacity by " +
                             std::string(enumerator_names(order)[static_cast<std::size_t>(order)]);
    check(count<TopKGate<>>(name.c_str(), {.experts = 8,
                                           .top_k = 2,
                                           .capacity_factor = 1,
                                           .evaluation_capacity_factor = 1,
                                           .place_order = order}),
          14, 11);
  }
  check(count<BalancedGate<>>("BalancedGate", {.experts = 8, .top_k = 2}), 14, 6);
  check(count<ExpertChoiceGate<>>("ExpertChoiceGate", {.experts = 8, .capacity_factor = 2}), 14,
        11);
  check(count<SharedExpertGate<NoisyTopKGate<>>>(
            "SharedExpertGate of a NoisyTopKGate",
            {.shared = 1, .gated = true, .routed = {.experts = 8, .top_k = 2}}),
        9, 6);
}
