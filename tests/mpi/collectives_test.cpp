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
}
