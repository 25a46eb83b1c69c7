/// What does moving tokens cost: sorting slots by expert, and combining rows back into tokens?

#include <span>

#include "machine.hpp"

namespace {

using bench::Index;

moe::Routing<float> make_routing(const benchmark::State& state) {
  const moe::NoisyTopKGate<float> gate({.width = 8, .experts = state.range(2),
                                        .active = state.range(3)});
  moe::NoisyTopKGate<float>::Tape tape;
  moe::Routing<float> routing =
      gate.forward(bench::random_matrix<float>(state.range(0), 8, 1), tape);
  moe::group_by_expert(routing);
  return routing;
}

void dispatch(benchmark::State& state) {
  bench::use_threads(1);
  moe::Routing<float> routing = make_routing(state);
  for (auto _ : state) {
    moe::group_by_expert(routing);
    benchmark::DoNotOptimize(routing.row_token.data());
  }
  bench::report<float>(state, routing.tokens(), 0, 1);
}

void combine(benchmark::State& state) {
  bench::use_threads(1);
  const moe::Routing<float> routing = make_routing(state);
  const auto rows = bench::random_matrix<float>(routing.slots(), state.range(1), 2);
  moe::Matrix<float> y = moe::Matrix<float>::Zero(routing.tokens(), state.range(1));
  for (auto _ : state) {
    moe::detail::combine<float>(routing, routing.weight, rows, y);
    benchmark::DoNotOptimize(y.data());
  }
  bench::report<float>(state, routing.tokens(), static_cast<double>(2 * rows.size()), 1);
}

void grid(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D", "E", "K"})->Unit(benchmark::kMicrosecond);
  for (const Index experts : {8, 64, 1024}) {
    for (const Index active : {1, 2, 8}) b->Args({1024, 512, experts, active});
  }
}
BENCHMARK(dispatch)->Apply(grid);
BENCHMARK(combine)->Apply(grid);

}  // namespace
