#include "moe/nn/embedding.hpp"

#include "../support.hpp"

using namespace moe;
using test::random_matrix;

TEST_CASE("embedding: rows go out by id and gradients come back to them", "[nn][embedding]") {
  Embedding<float> embedding({.vocabulary = 3, .width = 2}, 0);
  embedding.weight.value << 1, 2, 3, 4, 5, 6;
  const std::vector<Index> ids{2, 0, 2};
  Embedding<float>::Tape tape;
  Matrix<float> y(3, 2);
  y << 5, 6, 1, 2, 5, 6;
  CHECK(embedding.forward(ids, tape) == y);

  Matrix<float> dy(3, 2);
  dy << 1, 2, 10, 20, 100, 200;
  Matrix<float> dweight(3, 2);
  dweight << 10, 20, 0, 0, 101, 202;
  embedding.backward(dy, tape);
  CHECK(embedding.weight.gradient() == dweight);
  embedding.backward(dy, tape);
  CHECK(embedding.weight.gradient() == 2 * dweight);
}

TEMPLATE_TEST_CASE("embedding: a word's gradient is summed in the order of the tokens",
                   "[nn][embedding]", float, double) {
  std::vector<Index> ids(900);
  for (Index t = 0; t < 900; ++t) ids[detail::to_size(t)] = t * t % 11;
  const auto dy = random_matrix<TestType>(900, 300, 2);
  Embedding<TestType> embedding({.vocabulary = 11, .width = 300}, 1);
  Matrix<TestType> expected = Matrix<TestType>::Zero(11, 300);
  for (Index t = 0; t < 900; ++t) expected.row(ids[detail::to_size(t)]) += dy.row(t);
  typename Embedding<TestType>::Tape tape;
  embedding.forward(ids, tape);
  embedding.backward(dy, tape);
  CHECK(test::same_bits(tape.y.row(899), embedding.weight.value.row(ids[899])));
  CHECK(test::same_bits(embedding.weight.gradient(), expected));
}

TEST_CASE("embedding: starts normal with the given standard deviation", "[nn][embedding]") {
  const Embedding<double> embedding({.vocabulary = 500, .width = 40, .init_stddev = 0.3}, 7);
  const double mean_square = embedding.weight.value.squaredNorm() / (500 * 40);
  CHECK_THAT(std::sqrt(mean_square), Catch::Matchers::WithinAbs(0.3, 0.01));
}

TEST_CASE("embedding: what is wrong is named and changes nothing", "[nn][embedding]") {
  CHECK_THROWS_WITH(Embedding<float>({.vocabulary = 0, .width = 1}, 0),
                    "moe: Embedding::Config.vocabulary = 0, must be at least 1");
  CHECK_THROWS_WITH(Embedding<float>({.vocabulary = 1, .width = 0}, 0),
                    "moe: Embedding::Config.width = 0, must be at least 1");
  CHECK_THROWS_WITH(Embedding<float>({.vocabulary = 1, .width = 1, .init_stddev = -1}, 0),
                    "moe: Embedding::Config.init_stddev = -1, must be finite and at least 0");
  Embedding<float> embedding({.vocabulary = 3, .width = 2}, 0);
  Embedding<float>::Tape tape;
  const std::vector<Index> good{1, 2};
  embedding.forward(good, tape);
  for (const Index bad : {Index{3}, Index{-1}}) {
    const std::vector<Index> ids{0, bad, 0};
    CHECK_THROWS_WITH(embedding.forward(ids, tape), "moe: Embedding: id " + std::to_string(bad) +
                                                        " is outside the vocabulary of 3");
  }
  CHECK(tape.ids == good);
  CHECK(tape.y.rows() == 2);
}
