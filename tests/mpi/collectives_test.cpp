#include <cstdio>
#include <string>

#include "whole.hpp"

using namespace moe;
using mpi::Communicator;
using test::random_matrix;

namespace {

struct Collectives {
  std::int64_t step = 0;  ///< forward and backward
  std::int64_t evaluation = 0;
};

/// Of `rows` rows a rank; all of them differ from one row by `spread` at most where that is not 0, and
/// are that row if it is below 0.
template <class Gate>
Collectives count(const std::string& name, const typename Gate::Config& gate, Index rows = 100,
                  double spread = 0) {
  using Scalar = typename Gate::Scalar;
  const Communicator communicator(MPI_COMM_WORLD, 30);
  using Parallel = mpi::ExpertParallel<MoELayer<Expert<FeedForward, Scalar>, Gate>>;
  Parallel layer({.width = 16, .expert = {.hidden = 8}, .gate = gate, .seed = 1}, communicator);
  test::randomize_by_name(layer, 0.5);
  auto x = random_matrix<Scalar>(rows, 16, static_cast<std::uint64_t>(communicator.rank()));
  if (spread != 0) {
    const auto row = random_matrix<Scalar>(1, 16, 7);
    const auto factor = static_cast<Scalar>(std::max(spread, 0.0));
    for (Index t = 0; t < rows; ++t) x.row(t) = row + factor * x.row(t);
  }
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
    std::printf("%s: %d collectives in a step, %d in evaluate()\n", name.c_str(),
                static_cast<int>(found.step), static_cast<int>(found.evaluation));
  }
  return found;
}

void check(const Collectives& found, std::int64_t step, std::int64_t evaluation) {
  CHECK(found.step <= step);
  CHECK(found.evaluation <= evaluation);
}

template <class Scalar>
typename TopKGate<Scalar>::Config with_capacity(PlaceOrder order) {
  return {.experts = 8,
          .top_k = 2,
          .capacity_factor = 1,
          .evaluation_capacity_factor = 1,
          .place_order = order};
}

}  // namespace

TEST_CASE("collectives: a step of a layer takes few", "[mpi]") {
  check(count<NoisyTopKGate<>>("NoisyTopKGate", {.experts = 8, .top_k = 2}), 6, 4);
  check(count<HierarchicalGate<>>("HierarchicalGate",
                                  {.groups = 4, .group_experts = 2, .top_k_groups = 2, .top_k = 1}),
        6, 4);
  check(count<ProductKeyGate<>>("ProductKeyGate", {.row_keys = 4, .column_keys = 2, .top_k = 2}), 6,
        4);
  check(count<TopKGate<>>("TopKGate", {.experts = 8, .top_k = 2, .switch_loss_weight = 0.1}), 6, 4);
  check(count<SharedExpertGate<NoisyTopKGate<>>>(
            "SharedExpertGate of a NoisyTopKGate",
            {.shared = 1, .gated = true, .routed = {.experts = 8, .top_k = 2}}),
        6, 4);
  check(
      count<TopKGate<>>("TopKGate with a capacity by rows", with_capacity<float>(PlaceOrder::rows)),
      7, 5);
  check(count<TopKGate<>>("TopKGate with a capacity by first choices",
                          with_capacity<float>(PlaceOrder::first_choices)),
        7, 5);
  check(count<TopKGate<>>("TopKGate with a capacity by largest weight",
                          with_capacity<float>(PlaceOrder::largest_weight)),
        9, 7);
  check(count<BalancedGate<>>("BalancedGate", {.experts = 8, .top_k = 2}), 9, 4);
  check(count<ExpertChoiceGate<>>("ExpertChoiceGate", {.experts = 8, .capacity_factor = 2}), 9, 7);
}

TEST_CASE("collectives: a choice among many tokens, or among equal ones, takes few", "[mpi]") {
  const auto check_choices = [](const std::string& what, Index rows, double spread) {
    for (const Index experts : {8, 96}) {
      const std::string of = ", " + std::to_string(experts) + " experts, " + what + " " +
                             std::to_string(rows) + " rows";
      check(count<ExpertChoiceGate<>>("ExpertChoiceGate, float" + of,
                                      {.experts = experts, .capacity_factor = 2}, rows, spread),
            10, 8);
      check(
          count<ExpertChoiceGate<double>>("ExpertChoiceGate, double" + of,
                                          {.experts = experts, .capacity_factor = 2}, rows, spread),
          10, 8);
    }
    check(count<TopKGate<double>>("TopKGate by largest weight, double, " + what,
                                  with_capacity<double>(PlaceOrder::largest_weight), rows, spread),
          10, 8);
    check(count<BalancedGate<double>>("BalancedGate, double, " + what, {.experts = 8, .top_k = 2},
                                      rows, spread),
          10, 4);
  };
  check_choices("random", 3000, 0);
  check_choices("equal", 300, -1);
}

// What leading bits do not tell apart: thousands of scores of a rank, of which all or many differ.
TEST_CASE("collectives: a choice among scores that differ in their last bits alone", "[mpi]") {
  for (const Index experts : {8, 96, 600}) {
    const Index rows = experts == 600 ? 300 : 3000;
    const std::string of = std::to_string(experts) + " experts, scores that are all but equal";
    check(count<ExpertChoiceGate<double>>("ExpertChoiceGate, double, " + of,
                                          {.experts = experts, .capacity_factor = 2}, rows, 1e-12),
          10, 8);
    check(count<ExpertChoiceGate<>>("ExpertChoiceGate, float, " + of,
                                    {.experts = experts, .capacity_factor = 2}, rows, 1e-4),
          10, 8);
    check(count<BalancedGate<double>>("BalancedGate, double, " + of,
                                      {.experts = experts, .top_k = 2}, rows, 1e-12),
          10, 4);
  }
  check(count<TopKGate<double>>("TopKGate by largest weight, double, scores that are all but equal",
                                with_capacity<double>(PlaceOrder::largest_weight), 3000, 1e-12),
        10, 8);
}
