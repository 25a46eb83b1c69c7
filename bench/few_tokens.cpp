/// Does serving a few tokens read the weights as fast as memory allows?
///
/// evaluate() with one to four tokens an expert, every weight coming from beyond the cache, and one
/// token alone with 8 of 16 experts. One core.

#include "fixed_gate.hpp"
#include "measure.hpp"

namespace {

using bench::Index;

void evaluate(benchmark::State& state) {
  bench::use_threads(1);
  const Index top_k = state.range(4);
  const bench::Shape shape{.tokens = state.range(0),
                           .width = state.range(1),
                           .hidden = state.range(2),
                           .experts = state.range(3),
                           .top_k = top_k,
                           .gate_products = 0};
  const bench::FixedLayer<float> layer({.width = shape.width,
                                        .expert = {.hidden = shape.hidden},
                                        .gate = {.experts = shape.experts, .top_k = top_k},
                                        .seed = 1});
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  bench::FixedLayer<float>::Tape tape;
  const double seconds = bench::best_seconds([&] { layer.evaluate(x, tape); });
  const Index used = bench::used_experts(tape.dispatch);
  const bench::Work work = bench::evaluate_work<float>(shape, used);
  bench::report<float>(state, seconds, work, 1);
  state.counters["GBs"] = work.bytes / seconds * 1e-9;
}

void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"T", "D", "H", "E", "K"});
  for (const Index tokens : {1, 2, 3, 4}) b->Args({16 * tokens, 512, 2048, 32, 2});
  for (const Index tokens : {1, 2, 4}) b->Args({4 * tokens, 1024, 4096, 8, 2});
  for (const Index tokens : {1, 2, 4}) b->Args({128 * tokens, 256, 512, 256, 2});
  b->Args({1, 768, 2048, 16, 8});
}
BENCHMARK(evaluate)->Apply(grid);

}  // namespace
