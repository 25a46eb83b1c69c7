// Report: with very many tokens load sticks at 16,777,216 and importance is wrong by half a per
// cent, since one float adds them up.

#include <string>

#include "../support.hpp"
#include "moe/kernels/column_sums.hpp"
#include "moe/moe.hpp"
#include "moe/routing/switch_loss.hpp"

using namespace moe;

namespace {

constexpr Index many = (Index{1} << 24) + 2;  // float has no room for the one above 2^24

}  // namespace

TEST_CASE("report: counts of 2^24 + 2 tokens are exact in float", "[reports]") {
  const std::vector<Index> expert(detail::to_size(many), 0);
  IndexedVector<Index> counts;
  Vector<float> load;
  detail::count_choices(expert, 1, counts);
  detail::copy_numbers(counts, load);
  CHECK(counts == std::vector<Index>{many});
  CHECK(load[0] == 16777218.0f);
}

TEST_CASE("report: the importance of 2^24 + 2 equal weights is right to float", "[reports]") {
  Routing<float> routing;
  routing.experts = 1;
  routing.expert.assign(detail::to_size(many), 0);
  routing.weight.assign(detail::to_size(many), 1.0f);
  Balance<float> balance;
  detail::BatchSum sum(nullptr);
  detail::measure_importance(routing, sum, balance);
  CHECK(balance.importance[0] == 16777218.0f);
  CHECK(balance.tokens_per_expert == std::vector<Index>{many});
  routing.weight.assign(detail::to_size(many), 0.1f);
  detail::measure_importance(routing, sum, balance);
  CHECK(std::abs(balance.importance[0] / 1677721.8f - 1) < 1e-6);
}

TEST_CASE("report: column sums of 2^24 + 2 rows are right to float", "[reports]") {
  for (const float value : {1.0f, 0.1f}) {
    const std::vector<float> row(3, value);  // all rows in one place
    Matrix<float> sums = Matrix<float>::Zero(1, 3);
    detail::add_column_sums(GatheredRows<float>(row.data(), 0, many, 3), sums);
    const double expected = static_cast<double>(value) * static_cast<double>(many);
    for (Index i = 0; i < 3; ++i) {
      CHECK(std::abs(static_cast<double>(sums(0, i)) / expected - 1) < 5e-6);
    }
  }
}

TEST_CASE("report: shares and probabilities of 2^24 + 2 tokens are right to float", "[reports]") {
  const Matrix<float> score = Matrix<float>::Ones(many, 1);
  const Vector<float> scale = Vector<float>::Ones(many);
  const std::vector<Index> choices(detail::to_size(many), 0);
  detail::SwitchLoss<float> loss;
  ValidTokens tokens;
  find_valid_tokens(many, {}, nullptr, tokens);
  detail::BatchSum sum(nullptr);
  loss.accumulate(score, scale, choices, 1, SwitchCount::per_slot, 1, RowOrder::time_major, tokens,
                  sum);
  const float value = loss.finish();
  CHECK(std::abs(loss.share()(0, 0) - 1) < 1e-6f);
  CHECK(std::abs(loss.probability()(0, 0) - 1) < 1e-5f);
  CHECK(std::abs(value - 1) < 1e-5f);
}

TEST_CASE("report: a bias's gradient of many equal tokens is right to float", "[reports]") {
  const Index tokens = Index{1} << 20;
  MoELayer<Expert<FeedForward>> layer(
      {.width = 1, .expert = {.hidden = 1}, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  MoELayer<Expert<FeedForward>>::Tape tape;
  layer.forward(Matrix<float>::Ones(tokens, 1), tape, {.step = 1});
  layer.backward(Matrix<float>::Constant(tokens, 1, 0.1f), tape);
  for_each_parameter(layer, [&](const std::string& name, Parameter<float>& p) {
    if (name != "experts.0.down.bias") return;
    const double expected = 0.1 * static_cast<double>(tokens);
    CHECK(std::abs(static_cast<double>(p.gradient()(0, 0)) / expected - 1) <
          1e-4);  // one float would be off by 5e-3
  });
}

TEST_CASE("report: the row and column means of a long matrix are right to float", "[reports]") {
  constexpr Index rows = Index{1} << 21;
  Embedding<float> embedding({.vocabulary = rows, .width = 2}, 1);
  embedding.weight.gradient().setConstant(0.1f);
  FactoredAdam<float> adam({.beta2 = 0.5});
  adam.update(embedding, 1e-3);
  // Both are (1 - β₂)·0.1².
  adam.for_each_state(embedding, [](const std::string& name, const auto& state) {
    if (name.find("means") == std::string::npos) return;
    if constexpr (requires { state.rows(); }) {
      const double mean = state.template cast<double>().mean();
      INFO(name);
      CHECK(std::abs(mean / (0.5 * 0.01) - 1) < 1e-6);
    }
  });
}
