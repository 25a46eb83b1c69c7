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

TEST_CASE("embedding: gradient agrees with differences", "[nn][embedding]") {
  const Index width = GENERATE(1, 5, 19);
  const double scale = GENERATE(0.1, 10.0);
  Embedding<double> embedding({.vocabulary = 6, .width = width, .init_stddev = scale}, 1);
  const std::vector<Index> ids{5, 0, 3, 3, 1, 5, 5};
  const Matrix<double> dy = random_matrix(7, width, 2);
  Embedding<double>::Tape tape;
  embedding.forward(ids, tape);
  embedding.backward(dy, tape);
  test::check_parameter_gradients(embedding,
                                  [&] { return embedding.evaluate(ids).cwiseProduct(dy).sum(); });
}

TEMPLATE_TEST_CASE("embedding: the same bits on any number of threads", "[nn][embedding]", float,
                   double) {
  std::vector<Index> ids(900);
  for (Index t = 0; t < 900; ++t) ids[detail::to_size(t)] = t * t % 11;
  const auto dy = random_matrix<TestType>(900, 300, 2);
  Embedding<TestType> embedding({.vocabulary = 11, .width = 300}, 1);
  // Tokens in their order, a column at a time.
  Matrix<TestType> expected = Matrix<TestType>::Zero(11, 300);
  for (Index t = 0; t < 900; ++t) expected.row(ids[detail::to_size(t)]) += dy.row(t);
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    typename Embedding<TestType>::Tape tape;
    zero_gradients(embedding);
    embedding.forward(ids, tape);
    embedding.backward(dy, tape);
    CHECK(test::same_bits(tape.y.row(899), embedding.weight.value.row(ids[899])));
    CHECK(test::same_bits(embedding.evaluate(ids), tape.y));
    CHECK(test::same_bits(embedding.weight.gradient(), expected));
  }
}

TEST_CASE("embedding: starts normal with the given standard deviation", "[nn][embedding]") {
  const Embedding<double> embedding({.vocabulary = 500, .width = 40, .init_stddev = 0.3}, 7);
  const double mean_square = embedding.weight.value.squaredNorm() / (500 * 40);
  CHECK_THAT(std::sqrt(mean_square), Catch::Matchers::WithinAbs(0.3, 0.01));
}

TEST_CASE("embedding: no tokens", "[nn][embedding]") {
  Embedding<float> embedding({.vocabulary = 3, .width = 2}, 0);
  Embedding<float>::Tape tape;
  const Matrix<float>& y = embedding.forward({}, tape);
  CHECK(y.rows() == 0);
  CHECK(y.cols() == 2);
  embedding.backward(Matrix<float>(0, 2), tape);
  CHECK(embedding.weight.gradient().isZero(0));
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
  CHECK_THROWS_WITH(embedding.backward(Matrix<float>::Ones(3, 2), tape),
                    "moe: Embedding::backward: dy has 3 rows, there were 2 ids");
  CHECK_THROWS_WITH(embedding.backward(Matrix<float>::Ones(2, 5), tape),
                    "moe: Embedding::backward: dy has 5 columns, the embedding 2");
  CHECK(embedding.weight.gradient().isZero(0));
}

TEST_CASE("embedding: no backward after an evaluation or another's forward", "[nn][embedding]") {
  Embedding<float> embedding({.vocabulary = 3, .width = 2}, 0);
  const Embedding<float> larger({.vocabulary = 9, .width = 2}, 0);
  Embedding<float>::Tape tape;
  const Matrix<float> dy = Matrix<float>::Ones(1, 2);
  const char* const refused = "moe: Embedding::backward without a forward pass on this tape";
  embedding.forward(std::vector<Index>{1}, tape);
  embedding.evaluate(std::vector<Index>{2}, tape);
  CHECK_THROWS_WITH(embedding.backward(dy, tape), refused);
  larger.forward(std::vector<Index>{8}, tape);
  CHECK_THROWS_WITH(embedding.backward(dy, tape), refused);
  CHECK(embedding.weight.gradient().isZero(0));
}
