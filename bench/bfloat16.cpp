/// How much faster does a layer train with products in bfloat16, and how near the processor's limit is
/// that?
///
/// MoELayer with NoisyTopKGate, K = 2, one core; `float` and bfloat16 take turns. `bfloat16_x` is the
/// time with products in float over that with products in bfloat16, which is the time of the row, and
/// `dot_fraction` the share of vdpbf16ps's peak that the latter reaches, where the processor has it. The
/// gate's products stay float and count among the operations.

#include <string>

#include "measure.hpp"

namespace {

using bench::Index;
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;

/// A layer and what its passes write.
struct Party {
  Party(const bench::Shape& shape, moe::Precision products)
      : layer({.width = shape.width,
               .expert = {.hidden = shape.hidden, .products = products},
               .gate = {.experts = shape.experts, .top_k = shape.top_k},
               .seed = 1}) {}
  Layer layer;
  Layer::Tape tape;
};

void run(benchmark::State& state, bool backward) {
  bench::use_threads(1);
  constexpr Index top_k = 2;
  const Index experts = state.range(3);
  const bench::Shape shape = {.tokens = state.range(0) * experts / top_k,
                              .width = state.range(1),
                              .hidden = state.range(2),
                              .experts = experts,
                              .top_k = top_k};
  Party full(shape, moe::Precision::full);
  Party rounded(shape, moe::Precision::bfloat16);
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<float>(shape.tokens, shape.width, 2);
  std::vector<bench::Party> parties;
  for (Party* party : {&full, &rounded}) {
    parties.emplace_back([party, backward, &x, &dy] {
      party->layer.forward(x, party->tape, {.step = 0});
      if (backward) party->layer.backward(dy, party->tape);
    });
  }
  const std::vector<double> seconds = bench::best_seconds(parties, 1.5);
  const double operations = (backward ? bench::step_work<float>(shape, experts)
                                      : bench::forward_work<float>(shape, experts))
                                .operations;
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds[1]);
  state.counters["float_ms"] = 1e3 * seconds[0];
  state.counters["bfloat16_x"] = seconds[0] / seconds[1];
  state.counters["GFLOPs"] = operations / seconds[1] * 1e-9;
#ifdef __AVX512BF16__
  static const double peak = bench::best_rate(1, bench::detail::try_bfloat16_dots, 0.5);
  state.counters["dot_fraction"] = operations / seconds[1] / peak;
#endif
}

void forward(benchmark::State& state) { run(state, false); }
void forward_backward(benchmark::State& state) { run(state, true); }

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"tokens", "D", "H", "E"});
  for (const Index tokens : {32, 128}) b->Args({tokens, 256, 512, 8});
  for (const Index tokens : {8, 32, 128, 256}) b->Args({tokens, 512, 2048, 8});
  for (const Index tokens : {32, 128}) b->Args({tokens, 1024, 4096, 8});
  for (const Index tokens : {32, 128}) b->Args({tokens, 512, 1024, 64});
}
BENCHMARK(forward)->Apply(grid);
BENCHMARK(forward_backward)->Apply(grid);

}  // namespace
