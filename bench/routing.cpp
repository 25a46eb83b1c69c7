/// What do choosing experts and moving tokens cost?
///
/// `share`: gate, dispatch and combine in per cent of the whole layer's time, measured as the layer
/// with experts that do nothing. `gate`: the gate alone, over E. One core.

#include <span>
#include <vector>

#include "measure.hpp"

namespace {

using bench::Index;
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
using Gate = moe::NoisyTopKGate<float>;

/// An expert network that gives the layer nothing to wait for.
template <class Scalar_>
struct Nothing {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };
  struct Scratch {};
  explicit Nothing(const Config&, std::uint64_t = 0) {}
  Index tape_width() const { return 0; }
  template <class... Arguments>
  void forward(Arguments&&...) const {}
  template <class... Arguments>
  void evaluate(Arguments&&...) const {}
  template <class... Arguments>
  void backward(Arguments&&...) {}
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
};

/// The same work without the experts': the gate's products.
bench::Shape gate_only(bench::Shape shape) {
  shape.hidden = 0;
  return shape;
}

void share(benchmark::State& state, bool backward) {
  bench::use_threads(1);
  const bench::Shape shape = bench::shape_of(state);
  const Gate::Config gate{.experts = shape.experts, .top_k = shape.top_k};
  Layer layer({.width = shape.width, .expert = {.hidden = shape.hidden}, .gate = gate, .seed = 1});
  moe::MoELayer<moe::Expert<Nothing>> empty({.width = shape.width, .gate = gate, .seed = 1});
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const auto dy = bench::random_matrix<float>(shape.tokens, shape.width, 2);
  Layer::Tape tape;
  decltype(empty)::Tape empty_tape;
  const std::vector<double> seconds =
      bench::best_seconds({[&] {
                             layer.forward(x, tape, {.step = 0});
                             if (backward) layer.backward(dy, tape);
                           },
                           [&] {
                             empty.forward(x, empty_tape, {.step = 0});
                             if (backward) {
                               empty.backward(dy, empty_tape);
                             }
                           }});
  const bench::Shape gates = gate_only(shape);
  bench::report<float>(
      state, seconds[1],
      backward ? bench::step_work<float>(gates, 0) : bench::forward_work<float>(gates, 0), 1);
  state.counters["layer_ms"] = seconds[0] * 1e3;
  state.counters["percent_of_layer"] = 100 * seconds[1] / seconds[0];
}
void share_forward(benchmark::State& state) { share(state, false); }
void share_forward_backward(benchmark::State& state) { share(state, true); }

void gate_forward_backward(benchmark::State& state) {
  bench::use_threads(1);
  const bench::Shape shape = gate_only(bench::shape_of(state));
  Gate gate({.width = shape.width, .experts = shape.experts, .top_k = shape.top_k}, 0);
  const auto x = bench::random_matrix<float>(shape.tokens, shape.width, 1);
  const std::vector<float> dweight(static_cast<std::size_t>(shape.slots()), 0.1f);
  moe::Matrix<float> dx(shape.tokens, shape.width);
  Gate::Tape tape;
  const double seconds = bench::best_seconds([&] {
    gate.forward(x, tape, {.step = 0});
    dx.setZero();
    gate.backward(x, dweight, tape, dx);
  });
  bench::report<float>(state, seconds, bench::step_work<float>(shape, 0), 1);
  state.counters["ns_per_token"] = seconds * 1e9 / static_cast<double>(shape.tokens);
}

void one(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"T", "D", "H", "E", "K"})->Args({4096, 512, 2048, 64, 2});
}
BENCHMARK(share_forward)->Apply(one);
BENCHMARK(share_forward_backward)->Apply(one);

void gates(benchmark::internal::Benchmark* b) {
  bench::row(b)->ArgNames({"T", "D", "H", "E", "K"});
  for (const Index experts : {8, 64, 512}) b->Args({1024, 512, 0, experts, 2});
  b->Args({1024, 512, 0, 64, 8});
}
BENCHMARK(gate_forward_backward)->Apply(gates);

}  // namespace
