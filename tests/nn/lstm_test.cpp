#include "moe/nn/lstm.hpp"

#include <array>

#include "../support.hpp"

using namespace moe;
using test::random_matrix;
using test::same_bits;

namespace {

template <class Scalar>
using State = typename LSTM<Scalar>::State;
template <class Scalar>
using Tape = typename LSTM<Scalar>::Tape;

template <class Scalar>
State<Scalar> random_state(Index sequences, Index hidden, std::uint64_t seed, double scale = 1.0) {
  return {random_matrix<Scalar>(sequences, hidden, seed, scale),
          random_matrix<Scalar>(sequences, hidden, seed + 1000, scale)};
}

/// The textbook, a scalar at a time.
template <class Scalar>
Matrix<Scalar> naive(const LSTM<Scalar>& lstm, const Matrix<Scalar>& x, State<Scalar>& state) {
  const Index H = lstm.config().hidden;
  const Index B = state.hidden.rows();
  Matrix<Scalar> y(x.rows(), H);
  const auto sigmoid = [](double a) { return 1 / (1 + std::exp(-a)); };
  for (Index t = 0; t < x.rows() / B; ++t) {
    const State<Scalar> before = state;
    for (Index b = 0; b < B; ++b) {
      for (Index j = 0; j < H; ++j) {
        std::array<double, 4> z;
        for (Index gate = 0; gate < 4; ++gate) {
          const Index column = gate * H + j;
          double sum = static_cast<double>(lstm.bias.value(0, column));
          for (Index k = 0; k < x.cols(); ++k) {
            sum += static_cast<double>(x(t * B + b, k) * lstm.weight_ih.value(k, column));
          }
          for (Index k = 0; k < H; ++k) {
            sum += static_cast<double>(before.hidden(b, k) * lstm.weight_hh.value(k, column));
          }
          z[detail::to_size(gate)] = sum;
        }
        const double cell = sigmoid(z[1]) * static_cast<double>(before.cell(b, j)) +
                            sigmoid(z[0]) * std::tanh(z[2]);
        state.cell(b, j) = static_cast<Scalar>(cell);
        state.hidden(b, j) = static_cast<Scalar>(sigmoid(z[3]) * std::tanh(cell));
        y(t * B + b, j) = state.hidden(b, j);
      }
    }
  }
  return y;
}

}  // namespace

TEMPLATE_TEST_CASE("lstm: equals the textbook", "[nn][lstm]", float, double) {
  const auto [sequences, steps, inputs, hidden] =
      GENERATE(std::array<Index, 4>{1, 1, 1, 1}, std::array<Index, 4>{3, 5, 4, 6},
               std::array<Index, 4>{2, 3, 5, 33}, std::array<Index, 4>{37, 4, 9, 32});
  LSTM<TestType> lstm({.inputs = inputs, .hidden = hidden}, 1);
  lstm.bias.value = random_matrix<TestType>(1, 4 * hidden, 2);
  const auto x = random_matrix<TestType>(steps * sequences, inputs, 3);
  State<TestType> state = random_state<TestType>(sequences, hidden, 4);
  State<TestType> expected_state = state;
  const Matrix<TestType> expected = naive(lstm, x, expected_state);
  CHECK(test::relative_error(lstm.evaluate(x, state), expected) < test::tolerance<TestType>);
  CHECK(test::relative_error(state.hidden, expected_state.hidden) < test::tolerance<TestType>);
  CHECK(test::relative_error(state.cell, expected_state.cell) < test::tolerance<TestType>);
}

TEST_CASE("lstm: gradients with respect to the states, and with one to the final state",
          "[nn][lstm]") {
  const auto [sequences, steps, inputs, hidden] =
      GENERATE(std::array<Index, 4>{1, 1, 1, 1}, std::array<Index, 4>{2, 4, 3, 5},
               std::array<Index, 4>{3, 2, 2, 9}, std::array<Index, 4>{1, 6, 4, 2});
  const double scale = GENERATE(0.1, 1.0, 2.0);
  LSTM<double> lstm({.inputs = inputs, .hidden = hidden}, 1);
  Matrix<double> x = random_matrix(steps * sequences, inputs, 2, scale);
  State<double> initial = random_state<double>(sequences, hidden, 3, scale);
  const Matrix<double> dy = random_matrix(steps * sequences, hidden, 4);
  const State<double> dfinal = random_state<double>(sequences, hidden, 5);
  const auto loss = [&] {
    State<double> state = initial;
    double sum = lstm.evaluate(x, state).cwiseProduct(dy).sum();
    sum += state.hidden.cwiseProduct(dfinal.hidden).sum();
    sum += state.cell.cwiseProduct(dfinal.cell).sum();
    return sum;
  };
  Tape<double> tape;
  State<double> state = initial;
  lstm.forward(x, state, tape);
  lstm.backward(dy, tape, dfinal);
  CHECK(test::relative_error(tape.dx, test::difference_gradient(x, loss)) < 1e-7);
  CHECK(test::relative_error(tape.dstate.hidden, test::difference_gradient(initial.hidden, loss)) <
        1e-7);
  CHECK(test::relative_error(tape.dstate.cell, test::difference_gradient(initial.cell, loss)) <
        1e-7);
  test::check_parameter_gradients(lstm, loss);

  // None with respect to the final state is one of zero.
  lstm.backward(dy, tape);
  const State<double> without = tape.dstate;
  const Matrix<double> zero = Matrix<double>::Zero(sequences, hidden);
  lstm.backward(dy, tape, {zero, zero});
  CHECK(same_bits(tape.dstate.hidden, without.hidden));
  CHECK(same_bits(tape.dstate.cell, without.cell));
}

TEMPLATE_TEST_CASE("lstm: a sequence in two pieces equals the whole", "[nn][lstm]", float, double) {
  LSTM<TestType> lstm({.inputs = 5, .hidden = 7}, 1);
  const auto x = random_matrix<TestType>(8 * 3, 5, 2);
  const auto dy = random_matrix<TestType>(8 * 3, 7, 3);
  const State<TestType> initial = random_state<TestType>(3, 7, 4);
  Tape<TestType> whole, first, second;
  State<TestType> state = initial;
  lstm.forward(x, state, whole);
  State<TestType> carried = initial;
  lstm.forward(x.topRows(9), carried, first);
  lstm.forward(x.bottomRows(15), carried, second);
  CHECK(same_bits(first.y, whole.y.topRows(9)));
  CHECK(same_bits(second.y, whole.y.bottomRows(15)));
  CHECK(same_bits(carried.hidden, state.hidden));
  CHECK(same_bits(carried.cell, state.cell));

  // With the gradient of the state as dfinal, the gradient does not stop at the cut.
  lstm.backward(dy, whole);
  lstm.backward(dy.bottomRows(15), second);
  lstm.backward(dy.topRows(9), first, second.dstate);
  CHECK(same_bits(first.dx, whole.dx.topRows(9)));
  CHECK(same_bits(second.dx, whole.dx.bottomRows(15)));
  CHECK(same_bits(first.dstate.hidden, whole.dstate.hidden));
  CHECK(same_bits(first.dstate.cell, whole.dstate.cell));
}

TEMPLATE_TEST_CASE("lstm: states have the same bits on any number of threads, and a sequence alone",
                   "[nn][lstm]", float, double) {
  // Large enough for several tasks of sequences.
  const auto x = random_matrix<TestType>(40 * 7, 20, 2);
  const auto dy = random_matrix<TestType>(40 * 7, 33, 3);
  const State<TestType> initial = random_state<TestType>(40, 33, 4);
  Tape<TestType> expected;
  for (const int threads : {1, 2, 3, 8}) {
    const test::Threads scope(threads);
    LSTM<TestType> lstm({.inputs = 20, .hidden = 33}, 1);
    Tape<TestType> tape;
    State<TestType> state = initial;
    lstm.forward(x, state, tape);
    lstm.backward(dy, tape);
    if (threads == 1) expected = tape;
    State<TestType> evaluated = initial;
    lstm.evaluate(x, evaluated);
    CHECK(same_bits(evaluated.cell, state.cell));
    CHECK(same_bits(state.cell, expected.cell.bottomRows(40)));
    CHECK(same_bits(tape.dstate.hidden, expected.dstate.hidden));
    State<TestType> alone{initial.hidden.row(17), initial.cell.row(17)};
    Matrix<TestType> x_alone(7, 20);
    for (Index t = 0; t < 7; ++t) x_alone.row(t) = x.row(t * 40 + 17);
    const Matrix<TestType> y_alone = lstm.evaluate(x_alone, alone);
    for (Index t = 0; t < 7; ++t) CHECK(same_bits(y_alone.row(t), expected.y.row(t * 40 + 17)));
  }
}

TEST_CASE("lstm: names and initial values", "[nn][lstm]") {
  const LSTM<float> lstm({.inputs = 3, .hidden = 4}, 1);
  std::vector<std::string> names;
  for_each_parameter(lstm, [&](const std::string& name, const auto&) { names.push_back(name); });
  CHECK(names == std::vector<std::string>{"weight_ih", "weight_hh", "bias"});
  CHECK(lstm.weight_ih.value.rows() == 3);
  CHECK(lstm.weight_ih.value.cols() == 16);
  CHECK(lstm.weight_ih.value.cwiseAbs().maxCoeff() <= 0.5f);
  Matrix<float> bias = Matrix<float>::Zero(1, 16);
  bias.middleCols(4, 4).setOnes();
  CHECK(lstm.bias.value == bias);
}

TEST_CASE("lstm: no steps and no sequences", "[nn][lstm]") {
  LSTM<float> lstm({.inputs = 3, .hidden = 4}, 1);
  Tape<float> tape;
  State<float> state = random_state<float>(2, 4, 1);
  const State<float> before = state;
  CHECK(lstm.forward(Matrix<float>(0, 3), state, tape).rows() == 0);
  CHECK(same_bits(state.cell, before.cell));
  lstm.backward(Matrix<float>(0, 4), tape, before);
  CHECK(same_bits(tape.dstate.hidden, before.hidden));

  State<float> none = lstm.initial_state(0);
  CHECK(lstm.forward(Matrix<float>(0, 3), none, tape).cols() == 4);
  CHECK(lstm.backward(Matrix<float>(0, 4), tape).cols() == 3);
  CHECK(lstm.weight_hh.gradient().isZero(0));
}

TEST_CASE("lstm: NaN stays in its sequence", "[nn][lstm]") {
  const LSTM<float> lstm({.inputs = 3, .hidden = 21}, 1);
  Matrix<float> x = random_matrix<float>(6, 3, 2);
  x(2, 1) = std::numeric_limits<float>::quiet_NaN();
  State<float> state = lstm.initial_state(2);
  const Matrix<float> y = lstm.evaluate(x, state);
  CHECK(y.row(0).allFinite());
  CHECK(y.row(2).array().isNaN().all());
  CHECK(y.row(4).array().isNaN().all());
  CHECK(y.row(5).allFinite());
}

TEST_CASE("lstm: what is wrong is named and changes nothing", "[nn][lstm]") {
  CHECK_THROWS_WITH(LSTM<float>({.inputs = 0, .hidden = 1}, 0),
                    "moe: LSTM::Config.inputs = 0, must be at least 1");
  CHECK_THROWS_WITH(LSTM<float>({.inputs = 1, .hidden = 0}, 0),
                    "moe: LSTM::Config.hidden = 0, must be at least 1");
  LSTM<float> lstm({.inputs = 3, .hidden = 4}, 0);
  Tape<float> tape;
  State<float> state = lstm.initial_state(2);
  const auto ones = [](Index rows, Index columns) -> Matrix<float> {
    return Matrix<float>::Ones(rows, columns);
  };
  CHECK_THROWS_WITH(lstm.forward(ones(5, 3), state, tape),
                    "moe: LSTM: x has 5 rows, not a multiple of the 2 sequences");
  State<float> narrow{ones(2, 3), ones(2, 4)};
  CHECK_THROWS_WITH(lstm.forward(ones(6, 3), narrow, tape),
                    "moe: LSTM: state.hidden is 2 x 3, must be 2 x 4");
  State<float> uneven{ones(2, 4), ones(3, 4)};
  CHECK_THROWS_WITH(lstm.forward(ones(6, 3), uneven, tape),
                    "moe: LSTM: state.cell is 3 x 4, must be 2 x 4");
  CHECK(state.hidden.isZero(0));
  CHECK(tape.y.size() == 0);

  lstm.forward(ones(6, 3), state, tape);
  CHECK_THROWS_WITH(lstm.backward(ones(6, 4), tape, {ones(3, 4), ones(3, 4)}),
                    "moe: LSTM: state.hidden is 3 x 4, must be 2 x 4");
  CHECK(lstm.weight_ih.gradient().isZero(0));
}

TEST_CASE(
    "lstm: x in the memory of the initial state, which evaluate writes before it reads x, is "
    "refused",
    "[nn][lstm]") {
  const LSTM<float> lstm({.inputs = 4, .hidden = 4}, 1);
  Tape<float> tape;
  State<float> state = random_state<float>(2, 4, 2);
  lstm.forward(random_matrix<float>(6, 4, 3), state, tape);
  const State<float> before = tape.initial;
  for (const Matrix<float>* x : {&tape.initial.hidden, &tape.initial.cell}) {
    CHECK_THROWS_WITH(lstm.evaluate(*x, state, tape),
                      Catch::Matchers::Contains("LSTM::evaluate: x overlaps memory"));
  }
  CHECK(same_bits(tape.initial.hidden, before.hidden));
  CHECK(same_bits(tape.initial.cell, before.cell));
  CHECK(tape.trained);
}
