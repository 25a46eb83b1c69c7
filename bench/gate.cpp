/// What does the gate cost: scores, noise, choice, losses, and the way back?

#include <span>
#include <vector>

#include "machine.hpp"

namespace {

using bench::Index;
using Gate = moe::NoisyTopKGate<float>;

Gate make_gate(const benchmark::State& state) {
  return Gate({.width = state.range(1), .experts = state.range(2), .active = state.range(3)});
}

void forward(benchmark::State& state) {
  bench::use_threads(1);
  const Gate gate = make_gate(state);
  const auto x = bench::random_matrix<float>(state.range(0), state.range(1), 1);
  Gate::Tape tape;
  for (auto _ : state) {
    gate.forward(x, tape);
    benchmark::DoNotOptimize(tape.balance.loss);
  }
  const auto products = static_cast<double>(2 * x.size() * state.range(2));
  bench::report<float>(state, x.rows(), 2 * products, 1);
}

void backward(benchmark::State& state) {
  bench::use_threads(1);
  Gate gate = make_gate(state);
  const auto x = bench::random_matrix<float>(state.range(0), state.range(1), 1);
  Gate::Tape tape;
  const std::vector<float> dweight(static_cast<std::size_t>(gate.forward(x, tape).slots()), 0.1f);
  for (auto _ : state) {
    benchmark::DoNotOptimize(gate.backward(dweight, tape).data());
  }
  const auto products = static_cast<double>(2 * x.size() * state.range(2));
  bench::report<float>(state, x.rows(), 4 * products, 1);
}

void grid(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "D", "E", "K"})->Unit(benchmark::kMillisecond);
  for (const Index width : {128, 512}) {
    for (const Index experts : {8, 64, 512}) b->Args({1024, width, experts, 2});
  }
  b->Args({1024, 512, 64, 8});
}
BENCHMARK(forward)->Apply(grid);
BENCHMARK(backward)->Apply(grid);

}  // namespace
