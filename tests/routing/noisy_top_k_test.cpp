#include "moe/routing/noisy_top_k.hpp"

#include <numeric>
#include <vector>

#include "../naive_layer.hpp"

using namespace moe;
using test::random_matrix;
using test::same_bits;
using Indices = std::vector<Index>;

namespace {

template <class Scalar>
using TopK = detail::NoisyTopK<Scalar>;

/// What is left of a forward and a backward pass over some rows.
template <class Scalar>
struct Passes {
  TopK<Scalar> top_k;
  typename TopK<Scalar>::Tape tape;
  Routing<Scalar> routing;
  std::vector<Scalar> load = std::vector<Scalar>(5);
  Matrix<Scalar> dx;

  explicit Passes(Index rows = 7, Index chosen = 2, bool noise = true)
      : top_k({.width = 4, .experts = 5, .top_k = chosen, .noise = noise}, 9),
        dx(Matrix<Scalar>::Zero(rows, 4)) {
    test::randomize(top_k, 1);
    zero_gradients(top_k);
    top_k.prepare(rows, noise, tape, routing);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("noisy top-k: rows may come in pieces", "[routing]", float, double) {
  using S = TestType;
  const Matrix<S> x = random_matrix<S>(7, 4, 1);
  const GatheredRows<S> rows(x);
  const Matrix<S> dweight = random_matrix<S>(1, 14, 2);
  const Matrix<S> dload = random_matrix<S>(1, 5, 3);
  const detail::NoiseSource key{.key = {.step = 4}};

  Passes<S> whole;
  whole.top_k.forward(rows, nullptr, key, 0, whole.tape, whole.routing);
  whole.top_k.compute_load(0, 7, whole.tape, whole.load.data());
  whole.top_k.prepare_backward(whole.tape);
  whole.top_k.backward(rows, 0, dweight.data(), dload.data(), whole.tape, whole.routing,
                       ScatteredRows<S>(view(whole.dx)));

  Passes<S> pieces;
  pieces.top_k.prepare_backward(pieces.tape);
  for (const auto& [first, count] : {std::pair<Index, Index>{3, 4}, {0, 3}}) {
    const GatheredRows<S> piece = rows.slice(first, count);
    pieces.top_k.forward(piece, nullptr, key, first, pieces.tape, pieces.routing);
    pieces.top_k.backward(piece, first, dweight.data(), dload.data(), pieces.tape, pieces.routing,
                          ScatteredRows<S>(rows_of(pieces.dx, first, count)));
  }
  pieces.top_k.compute_load(0, 7, pieces.tape, pieces.load.data());
  CHECK(pieces.routing.expert == whole.routing.expert);
  CHECK(pieces.routing.weight == whole.routing.weight);
  CHECK(pieces.load == whole.load);
  CHECK(same_bits(pieces.dx, whole.dx));
  const test::Named expected = test::gradients_of(whole.top_k);
  for (const auto& [name, gradient] : test::gradients_of(pieces.top_k)) {
    INFO(name);
    CHECK(test::relative_error(gradient, expected.at(name)) < test::tolerance<S>);
  }
}

TEMPLATE_TEST_CASE("noisy top-k: many rows go in batches, which leave the same bits", "[routing]",
                   float, double) {
  using S = TestType;
  constexpr Index count = 2 * detail::task_rows + 91;
  const Matrix<S> x = random_matrix<S>(50, 4, 1);
  Indices list(detail::to_size(count));
  for (Index i = 0; i < count; ++i) list[detail::to_size(i)] = 7 * i % 50;
  const GatheredRows<S> rows(x, list.data(), count);
  const Index top_k = GENERATE(2, 5);
  const bool noise = GENERATE(false, true);
  const Matrix<S> dweight = random_matrix<S>(1, top_k * count, 2);
  const Matrix<S> dload = random_matrix<S>(1, 5, 3);
  const bool listed = GENERATE(false, true);  // whether the list keys the noise as well
  const auto run = [&](Index most, Passes<S>& passes) {
    passes.top_k.prepare_backward(passes.tape);
    for (Index first = 0; first < count; first += most) {
      const Index size = std::min(most, count - first);
      const Index* token = listed ? list.data() + first : nullptr;
      passes.top_k.forward(rows.slice(first, size), token, {.key = {.step = 4}}, first, passes.tape,
                           passes.routing);
      passes.top_k.backward(rows.slice(first, size), first, dweight.data(), dload.data(),
                            passes.tape, passes.routing,
                            ScatteredRows<S>(rows_of(passes.dx, first, size)));
    }
  };
  Passes<S> pieces(count, top_k, noise);
  run(100, pieces);
  const test::Named expected = test::gradients_of(pieces.top_k);
  for (const int threads : {1, 2, 3}) {
    CAPTURE(threads);
    const test::Threads scope(threads);
    Passes<S> whole(count, top_k, noise);
    // The first batch writes over what is cleared lazily, the others add.
    detail::track_gradients(whole.top_k);
    zero_gradients(whole.top_k, Updates::lazy);
    run(count, whole);
    if (noise) CHECK(same_bits(whole.tape.noise, pieces.tape.noise));
    if (noise && top_k < 5) CHECK(same_bits(whole.tape.probability, pieces.tape.probability));
    CHECK(whole.routing.expert == pieces.routing.expert);
    CHECK(whole.routing.weight == pieces.routing.weight);
    CHECK(same_bits(whole.dx, pieces.dx));
    for (const auto& [name, gradient] : test::gradients_of(whole.top_k)) {
      INFO(name);
      CHECK(gradient == expected.at(name));
    }
  }
}

TEMPLATE_TEST_CASE("noisy top-k: a listed token draws its own noise, wherever its row is",
                   "[routing]", float, double) {
  using S = TestType;
  const Matrix<S> x = random_matrix<S>(7, 4, 1);
  Passes<S> straight;
  straight.top_k.forward(GatheredRows<S>(x), nullptr, {.key = {.step = 4}}, 0, straight.tape,
                         straight.routing);
  const Indices list{6, 2, 2, 0, 5, 1, 3};
  Passes<S> listed;
  listed.top_k.forward(GatheredRows<S>(x, list.data(), 7), list.data(), {.key = {.step = 4}}, 0,
                       listed.tape, listed.routing);
  for (Index row = 0; row < 7; ++row) {
    const Index token = list[detail::to_size(row)];
    CHECK(same_bits(listed.tape.noisy.row(row), straight.tape.noisy.row(token)));
    CHECK(same_bits(listed.tape.probability.row(row), straight.tape.probability.row(token)));
  }
  std::vector<S> load(5);
  listed.top_k.compute_load(1, 2, listed.tape, load.data());
  for (Index i = 0; i < 5; ++i) {
    const S twice = 2 * straight.tape.probability(2, i);
    CHECK(load[detail::to_size(i)] == twice);
  }
}

TEST_CASE("noisy top-k: a cleared gradient is written over, another added to", "[routing]") {
  const Matrix<double> x = random_matrix<double>(7, 4, 1);
  const Matrix<double> dweight = random_matrix<double>(1, 14, 2);
  const Matrix<double> dload = random_matrix<double>(1, 5, 3);
  Passes<double> passes;
  detail::track_gradients(passes.top_k);
  const auto run = [&] {
    passes.top_k.forward(GatheredRows<double>(x), nullptr, {.key = {.step = 0}}, 0, passes.tape,
                         passes.routing);
    passes.top_k.prepare_backward(passes.tape);
    passes.top_k.backward(GatheredRows<double>(x), 0, dweight.data(), dload.data(), passes.tape,
                          passes.routing, ScatteredRows<double>(view(passes.dx)));
    return test::gradients_of(passes.top_k);
  };
  const test::Named once = run();
  const test::Named twice = run();
  zero_gradients(passes.top_k, Updates::lazy);
  const test::Named again = run();
  for (const auto& [name, gradient] : once) {
    INFO(name);
    CHECK(test::relative_error(twice.at(name), 2 * gradient) < 1e-14);
    CHECK(same_bits(again.at(name), gradient));
  }
}
