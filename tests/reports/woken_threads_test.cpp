// Report: a small layer on a machine that others use takes seconds instead of hundredths of one,
// since every pass wakes threads that wait for each other in a busy loop.

#include "../support.hpp"
#include "moe/moe.hpp"

#if defined(_OPENMP) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)

#include <dlfcn.h>

#include <atomic>

namespace {

std::atomic<int> regions{0};

template <class Function>
Function next_one(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

}  // namespace

// A program's own function takes the place of libgomp's, which stays reachable.
extern "C" {
void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_parallel(void (*f)(void*), void* data, unsigned threads, unsigned flags) {
  static const auto begin = next_one<decltype(&GOMP_parallel)>("GOMP_parallel");
  ++regions;
  begin(f, data, threads, flags);
}
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*f)(void*), void* data, unsigned threads,
                                             long start, long end, long step, long chunk,
                                             unsigned flags);
void GOMP_parallel_loop_nonmonotonic_dynamic(void (*f)(void*), void* data, unsigned threads,
                                             long start, long end, long step, long chunk,
                                             unsigned flags) {
  static const auto begin = next_one<decltype(&GOMP_parallel_loop_nonmonotonic_dynamic)>(
      "GOMP_parallel_loop_nonmonotonic_dynamic");
  ++regions;
  begin(f, data, threads, start, end, step, chunk, flags);
}
}

using namespace moe;

namespace {

template <class F>
int regions_in(F&& f) {
  const int before = regions;
  f();
  return regions - before;
}

template <class Layer>
int regions_of_training(const typename Layer::Config& config) {
  Layer layer(config);
  const Matrix<float> x = test::random_matrix<float>(64, config.width, 2);
  const Matrix<float> target = x.cwiseAbs();
  typename Layer::Tape tape;
  Adam<float> adam;
  return regions_in([&] {
    for (std::uint64_t step = 1; step <= 20; ++step) {
      const Matrix<float> error = layer.forward(x, tape, {.step = step}) - target;
      zero_gradients(layer);
      layer.backward(error / 32, tape);
      clip_gradients(layer, 1.0);
      adam.update(layer, 1e-2);
      layer.evaluate(x, tape);
    }
  });
}

}  // namespace

TEST_CASE("report: a small layer of FeedForward experts begins no parallel region", "[reports]") {
  const test::Threads threads(2);
  const auto expert = FeedForward<float>::Config{.hidden = 16};
  using E = Expert<FeedForward>;
  CHECK(regions_of_training<MoELayer<E>>(
            {.width = 8, .expert = expert, .gate = {.experts = 4, .top_k = 2}, .seed = 1}) == 0);
  CHECK(regions_of_training<MoELayer<E, TopKGate<>>>({.width = 8,
                                                      .expert = expert,
                                                      .gate = {.experts = 4,
                                                               .top_k = 2,
                                                               .jitter = 0.1,
                                                               .switch_loss_weight = 0.01,
                                                               .z_loss_weight = 1},
                                                      .output = Activation::sigmoid,
                                                      .seed = 1}) == 0);
  CHECK(regions_of_training<MoELayer<E, BalancedGate<>>>(
            {.width = 8, .expert = expert, .gate = {.experts = 4, .top_k = 2}, .seed = 1}) == 0);
  CHECK(regions_of_training<MoELayer<E, ExpertChoiceGate<>>>(
            {.width = 8, .expert = expert, .gate = {.experts = 4}, .seed = 1}) == 0);
  CHECK(regions_of_training<MoELayer<E, HierarchicalGate<>>>(
            {.width = 8,
             .expert = expert,
             .gate = {.groups = 2, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
             .seed = 1}) == 0);
}

TEST_CASE("report: a small model of nn modules begins no parallel region", "[reports]") {
  const test::Threads threads(2);
  Embedding<> embedding({.vocabulary = 10, .width = 8}, 1);
  LSTM<> lstm({.inputs = 8, .hidden = 8}, 2);
  const Dropout<> dropout({.rate = 0.5}, 3);
  Linear<> linear({.inputs = 8, .outputs = 10}, 4);
  const SoftmaxCrossEntropy<> loss;
  Embedding<>::Tape a;
  LSTM<>::Tape b;
  Dropout<>::Tape c;
  Linear<>::Tape d;
  SoftmaxCrossEntropy<>::Tape e;
  const std::vector<Index> words{1, 2, 3, 4};
  CHECK(regions_in([&] {
          auto state = lstm.initial_state(2);
          const auto& h = lstm.forward(embedding.forward(words, a), state, b);
          loss.forward(linear.forward(dropout.forward(h, c, {.step = 1}), d), words, e);
          embedding.backward(
              lstm.backward(dropout.backward(linear.backward(loss.backward(e), d), c), b), a);
        }) == 0);
}

TEST_CASE("report: enough work is shared, and the counter sees it", "[reports]") {
  const test::Threads threads(2);
  CHECK(regions_in([] { parallel_for(2, [](Index, Index) {}); }) == 1);
  CHECK(regions_in([] { parallel_for(2, least_shared_work, [](Index, Index) {}); }) == 1);
  const Work less{least_shared_work.multiply_adds - 1};
  CHECK(regions_in([&] { parallel_for(2, less, [](Index, Index) {}); }) == 0);
  Linear<> linear({.inputs = 128, .outputs = 128}, 1);
  Linear<>::Tape tape;
  const Matrix<float> x = test::random_matrix<float>(512, 128, 1);
  CHECK(regions_in([&] { linear.evaluate(x, tape); }) == 1);
}

#endif

TEST_CASE("report: work that is too little for two threads has the bits of one", "[reports]") {
  using namespace moe;
  const auto run = [](Index tokens) {
    MoELayer<Expert<FeedForward>> layer(
        {.width = 16, .expert = {.hidden = 32}, .gate = {.experts = 4, .top_k = 2}, .seed = 1});
    MoELayer<Expert<FeedForward>>::Tape tape;
    const Matrix<float> x = test::random_matrix<float>(tokens, 16, 2);
    layer.forward(x, tape, {.step = 1});
    layer.backward(x, tape);
    return std::pair(Matrix<float>(tape.y), Matrix<float>(tape.dx));
  };
  for (const Index tokens : {64, 5000}) {
    const auto alone = [&] {
      const test::Threads threads(1);
      return run(tokens);
    }();
    const test::Threads threads(2);
    const auto shared = run(tokens);
    CHECK(test::same_bits(alone.first, shared.first));
    CHECK(test::same_bits(alone.second, shared.second));
  }
}
