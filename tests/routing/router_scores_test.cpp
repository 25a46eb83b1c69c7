#include "moe/routing/router_scores.hpp"

#include "../support.hpp"

using namespace moe;

TEMPLATE_TEST_CASE("router scores: roots and their slopes from one end to the other", "[routing]",
                   float, double) {
  using S = TestType;
  detail::RouterScores<S> router;
  router.logits = Matrix<S>{{-1000, -80, -20, -1, 0, 1, 20, 1000}};
  detail::score_logits(Score::sqrt_softplus, false, router);
  Matrix<S> gradient = Matrix<S>::Ones(1, 8);
  detail::score_logits_backward(Score::sqrt_softplus, router, gradient);
  const double tolerance = sizeof(S) == 4 ? 2e-6 : 1e-14;
  for (Index i = 1; i < 8; ++i) {
    const auto c = static_cast<double>(router.logits(0, i));
    const double softplus = c > 30 ? c : std::log1p(std::exp(c));
    const double s = std::sqrt(softplus);
    INFO("logit " << c);
    CHECK_THAT(static_cast<double>(router.scores(0, i)), Catch::Matchers::WithinRel(s, tolerance));
    CHECK_THAT(static_cast<double>(gradient(0, i)),
               Catch::Matchers::WithinRel(1 / (1 + std::exp(-c)) / (2 * s), tolerance));
  }
  CHECK(std::abs(router.scores(0, 0)) < S(1e-18));
  CHECK(std::abs(gradient(0, 0)) < S(1e-18));
}
