/// How near the machine's limit is the whole layer, as the experts get more tokens?
///
/// MoELayer with NoisyTopKGate, one core; slices vary as a fresh gate's do, S/E tokens on average.

#include "measure.hpp"

namespace {

using bench::Index;

template <class Scalar>
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>>;

bench::Shape shape_of(const benchmark::State& state) {
  constexpr Index top_k = 2;
  const Index experts = state.range(3);
  return {.tokens = state.range(0) * experts / top_k,
          .width = state.range(1),
          .hidden = state.range(2),
          .experts = experts,
          .top_k = top_k};
}

template <class Scalar>
Layer<Scalar> make_layer(const bench::Shape& shape) {
  return Layer<Scalar>({.width = shape.width,
                        .expert = {.hidden = shape.hidden},
                        .gate = {.experts = shape.experts, .top_k = shape.top_k},
                        .seed = 1});
}

template <class Scalar>
void forward(benchmark::State& state) {
  bench::use_threads(1);
  const bench::Shape shape = shape_of(state);
  const Layer<Scalar> layer = make_layer<Scalar>(shape);
  const auto x = bench::random_matrix<Scalar>(shape.tokens, shape.width, 1);
  typename Layer<Scalar>::Tape tape;
  const double seconds = bench::best_seconds([&] { layer.forward(x, tape, {.step = 0}); });
  const Index used = bench::used_experts(tape.dispatch);
  bench::report<Scalar>(state, seconds, bench::forward_work<Scalar>(shape, used), 1);
}

/// Gradients are added to what is there, as the contract of backward() says.
template <class Scalar>
void forward_backward(benchmark::State& state) {
  bench::use_threads(1);
  const bench::Shape shape = shape_of(state);
  Layer<Scalar> layer = make_layer<Scalar>(shape);
  const auto x = bench::random_matrix<Scalar>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<Scalar>(shape.tokens, shape.width, 2);
  typename Layer<Scalar>::Tape tape;
  const double seconds = bench::best_seconds([&] {
    layer.forward(x, tape, {.step = 0});
    layer.backward(dy, tape);
  });
  const Index used = bench::used_experts(tape.dispatch);
  bench::report<Scalar>(state, seconds, bench::step_work<Scalar>(shape, used), 1);
}

/// The first shape fits into most caches (8 MiB of weights), the others into none (64 to 256 MiB).
void grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"tokens", "D", "H", "E"});
  for (const Index tokens : {4, 8, 32, 128}) b->Args({tokens, 256, 512, 8});
  for (const Index tokens : {4, 8, 32, 128, 512}) b->Args({tokens, 512, 2048, 8});
  for (const Index tokens : {4, 8, 32, 128}) b->Args({tokens, 512, 1024, 64});
  for (const Index tokens : {4, 8, 32, 128}) b->Args({tokens, 1024, 4096, 8});
  for (const Index tokens : {4, 8, 32, 128}) b->Args({tokens, 256, 512, 256});
}
void double_grid(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"tokens", "D", "H", "E"});
  for (const Index tokens : {4, 8, 32, 128}) b->Args({tokens, 512, 1024, 16});
}
BENCHMARK(forward<float>)->Apply(grid);
BENCHMARK(forward_backward<float>)->Apply(grid);
BENCHMARK(forward<double>)->Apply(double_grid);
BENCHMARK(forward_backward<double>)->Apply(double_grid);

}  // namespace
