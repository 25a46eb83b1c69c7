#include "moe/routing/switch_loss.hpp"

#include "../support.hpp"

using namespace moe;
using Indices = std::vector<Index>;

namespace {

template <class Scalar>
Scalar measure(detail::SwitchLoss<Scalar>& loss, const Matrix<Scalar>& score,
               const Vector<Scalar>& scale, const Indices& choices, SwitchCount count,
               Index sequences = 1, RowOrder order = RowOrder::time_major,
               std::span<const std::uint8_t> valid = {}) {
  ValidTokens tokens;
  const Index rows = valid.empty() ? score.rows() : static_cast<Index>(valid.size());
  find_valid_tokens(rows, valid, nullptr, tokens);
  const Index top_k =
      score.rows() > 0 ? static_cast<Index>(choices.size()) / score.rows() : Index{1};
  detail::BatchSum sum(nullptr);
  loss.accumulate(score, scale, std::span<const Index>(choices), top_k, count, sequences, order,
                  tokens, sum);
  return loss.finish();
}
template <class Scalar>
Scalar measure(detail::SwitchLoss<Scalar>& loss, const Matrix<Scalar>& p, const Indices& choices,
               SwitchCount count, Index sequences = 1, RowOrder order = RowOrder::time_major,
               std::span<const std::uint8_t> valid = {}) {
  const Vector<Scalar> ones = Vector<Scalar>::Ones(p.rows());
  return measure(loss, p, ones, choices, count, sequences, order, valid);
}

}  // namespace

TEST_CASE("switch loss: where the rows of a sequence are", "[routing]") {
  for (Index row = 0; row < 12; ++row) {
    CHECK(detail::sequence_of(row, 12, 3, RowOrder::time_major) == row % 3);
    CHECK(detail::sequence_of(row, 12, 3, RowOrder::sequence_major) == row / 4);
    CHECK(detail::sequence_of(row, 12, 1, RowOrder::sequence_major) == 0);
  }
}

TEMPLATE_TEST_CASE("switch loss: four tokens worked by hand", "[routing]", float, double) {
  using S = TestType;
  const auto near = [](double value) { return Catch::Matchers::WithinAbs(value, 1e-6); };
  const Matrix<S> p = Matrix<S>{{6, 2, 0}, {2, 4, 2}, {0, 4, 4}, {4, 0, 4}} / S{8};
  const Indices choices = {0, 1, 1, 2, 2, 1, 0, 2};
  detail::SwitchLoss<S> loss;
  const auto value = [&](auto... arguments) {
    return static_cast<double>(measure(loss, p, choices, arguments...));
  };
  // P = (12, 10, 10)/32. Counts (2, 3, 3), first choices (2, 1, 1).
  CHECK_THAT(value(SwitchCount::per_slot), near(3 * (24 + 30 + 30) / (8.0 * 32)));
  CHECK_THAT(value(SwitchCount::per_token), near(3 * (24 + 30 + 30) / (4.0 * 32)));
  CHECK_THAT(value(SwitchCount::first_choice), near(3 * (24 + 10 + 10) / (4.0 * 32)));
  CHECK_THAT(static_cast<double>(loss.probability()(0, 0)), near(12.0 / 32));
  // Sequences {0, 2} and {1, 3}: P = (6, 6, 4)/16 and (6, 4, 6)/16, counts (1, 2, 1), (1, 1, 2).
  CHECK_THAT(value(SwitchCount::per_slot, Index{2}),
             near(3 * ((6 + 12 + 4) + (6 + 4 + 12)) / (4.0 * 16) / 2));
  // Sequences {0, 1} and {2, 3}: P = (8, 6, 2)/16 and (4, 4, 8)/16, counts (1, 2, 1), (1, 1, 2).
  CHECK_THAT(value(SwitchCount::per_slot, Index{2}, RowOrder::sequence_major),
             near(3 * ((8 + 12 + 2) + (4 + 4 + 16)) / (4.0 * 16) / 2));
  // ∂/∂P_ti = 3·f_i/T of the sequence: of row 3, weight 8: 8·3·(1, 1, 2)/4/4, added.
  std::vector<S> dp = {1, 1, 1};
  loss.add_gradient(S{8}, 3, dp.data());
  CHECK_THAT(static_cast<double>(dp[0]), near(2.5));
  CHECK_THAT(static_cast<double>(dp[1]), near(2.5));
  CHECK_THAT(static_cast<double>(dp[2]), near(4));
  loss.add_gradient(S{8}, 1, dp.data());
  CHECK_THAT(static_cast<double>(dp[1]), near(5.5));
}

TEST_CASE("switch loss: more rows than are summed at once", "[routing]") {
  for (const Index sequences : {1, 2, 350}) {
    const Matrix<double> p = test::random_matrix(700, 3, 5).cwiseAbs();
    Indices choices(700);
    for (Index t = 0; t < 700; ++t) choices[detail::to_size(t)] = t * t % 3;
    double expected = 0;
    for (Index s = 0; s < sequences; ++s) {
      for (Index e = 0; e < 3; ++e) {
        double count = 0;
        double sum = 0;
        for (Index t = s; t < 700; t += sequences) {
          count += choices[detail::to_size(t)] == e ? 1 : 0;
          sum += p(t, e);
        }
        const auto length = static_cast<double>(700 / sequences);
        expected += 3 * (count / length) * (sum / length) / static_cast<double>(sequences);
      }
    }
    detail::SwitchLoss<double> loss;
    CHECK_THAT(measure(loss, p, choices, SwitchCount::per_slot, sequences),
               Catch::Matchers::WithinRel(expected, 1e-12));
  }
}

TEMPLATE_TEST_CASE("switch loss: rows have a scale", "[routing]", float, double) {
  using S = TestType;
  const Matrix<S> score{{1, 3}, {10, 10}};
  Vector<S> scale(2);
  scale << S(0.25), S(0.05);
  const Indices choices = {1, 0};
  detail::SwitchLoss<S> loss;
  measure(loss, score, scale, choices, SwitchCount::per_slot);
  CHECK_THAT(static_cast<double>(loss.probability()(0, 0)),
             Catch::Matchers::WithinAbs(0.375, 1e-6));
  CHECK_THAT(static_cast<double>(loss.probability()(0, 1)),
             Catch::Matchers::WithinAbs(0.625, 1e-6));
}

TEST_CASE("switch loss: 1 in perfect balance, E when collapsed, 0 without tokens", "[routing]") {
  detail::SwitchLoss<double> loss;
  const Indices spread = {0, 1, 2, 3, 4, 5, 6, 7};
  CHECK(measure(loss, Matrix<double>(Matrix<double>::Constant(8, 8, 0.125)), spread,
                SwitchCount::per_slot) == 1);
  Matrix<double> collapsed = Matrix<double>::Zero(8, 8);
  collapsed.col(5).setOnes();
  CHECK(measure(loss, collapsed, Indices(8, 5), SwitchCount::per_slot) == 8);
  CHECK(measure(loss, Matrix<double>(0, 8), {}, SwitchCount::per_slot) == 0);
}

TEST_CASE("switch loss: its gradient is the derivative, over more experts than a block of columns",
          "[routing]") {
  Matrix<double> p = test::random_matrix(4, 1100, 1);
  const Indices choices = {7, 600, 1099, 7};
  detail::SwitchLoss<double> loss;
  const auto value = [&] { return measure(loss, p, choices, SwitchCount::per_slot, 2); };
  const double base = value();
  Matrix<double> d = Matrix<double>::Zero(4, 1100);
  for (Index t = 0; t < 4; ++t) loss.add_gradient(1, t, d.row(t).data());
  for (const Index i : {7, 600, 1098, 1099}) {
    for (Index t = 0; t < 4; ++t) {
      p(t, i) += 1;  // the loss is linear
      CHECK_THAT(value() - base, Catch::Matchers::WithinAbs(d(t, i), 1e-9));
      p(t, i) -= 1;
    }
  }
}

TEST_CASE("switch loss: sequences of unequal length, worked by hand", "[routing]") {
  // Rows 0 to 5 are two sequences of three, time after time; row 3 (of sequence 1) and row 5 (of
  // sequence 1) are padding, so sequence 0 is rows 0, 2, 4 and sequence 1 row 1 alone.
  const std::vector<std::uint8_t> valid = {1, 1, 1, 0, 1, 0};
  const Matrix<double> p = Matrix<double>{{1, 3}, {2, 2}, {4, 0}, {3, 1}} / 4.0;  // rows 0 1 2 4
  const Indices choices = {1, 0, 0, 0};
  detail::SwitchLoss<double> loss;
  // Sequence 0: f = (2, 1)/3, P = (8, 4)/12. Sequence 1: f = (1, 0), P = (1, 1)/2.
  const double expected = (2 * (2.0 / 3 * 8 / 12 + 1.0 / 3 * 4 / 12) + 2 * (1 * 0.5)) / 2;
  CHECK_THAT(measure(loss, p, choices, SwitchCount::per_slot, 2, RowOrder::time_major, valid),
             Catch::Matchers::WithinRel(expected, 1e-14));
  // ∂/∂P of token 3 (row 4, of sequence 0): E·f/T_0/2 = 2·(2, 1)/3/3/2.
  std::vector<double> dp = {0, 0};
  loss.add_gradient(1, 3, dp.data());
  CHECK_THAT(dp[0], Catch::Matchers::WithinRel(2.0 / 9, 1e-14));
  CHECK_THAT(dp[1], Catch::Matchers::WithinRel(1.0 / 9, 1e-14));

  // A sequence without tokens has no part in the mean.
  const std::vector<std::uint8_t> one = {1, 0, 1, 0, 1, 0};
  const Matrix<double> q = Matrix<double>{{1, 3}, {4, 0}, {3, 1}} / 4.0;
  CHECK_THAT(measure(loss, q, Indices{1, 0, 0}, SwitchCount::per_slot, 2, RowOrder::time_major,
                     std::span<const std::uint8_t>(one)),
             Catch::Matchers::WithinRel(2 * (2.0 / 3 * 8 / 12 + 1.0 / 3 * 4 / 12), 1e-14));
}
