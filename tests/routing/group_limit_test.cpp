#include "moe/routing/group_limit.hpp"

#include "../support.hpp"

using namespace moe;

namespace {

/// Which of the scores are left.
template <class Scalar>
std::vector<int> left(GroupScore how, Index groups, Index top_k, std::vector<Scalar> scores) {
  std::vector<Scalar> group(detail::to_size(groups));
  std::vector<Index> best(detail::to_size(top_k));
  const std::vector<Scalar> before = scores;
  detail::limit_to_groups(how, static_cast<Index>(scores.size()), groups, top_k, scores.data(),
                          group.data(), best.data());
  std::vector<int> kept;
  for (std::size_t i = 0; i < scores.size(); ++i) {
    const bool hidden = scores[i] == -std::numeric_limits<Scalar>::infinity();
    CHECK((hidden || scores[i] == before[i] || std::isnan(before[i])));
    if (!hidden) kept.push_back(static_cast<int>(i));
  }
  return kept;
}

}  // namespace

TEMPLATE_TEST_CASE("group limit: by the best expert and by the two best", "[routing]", float,
                   double) {
  using S = TestType;
  // Bests 9, 6, 7; two bests 10, 11, 9.
  const std::vector<S> scores = {9, 1, -8, 5, 6, 0, 2, 1, 7};
  CHECK(left(GroupScore::best, 3, 1, scores) == std::vector<int>{0, 1, 2});
  CHECK(left(GroupScore::two_best, 3, 1, scores) == std::vector<int>{3, 4, 5});
  CHECK(left(GroupScore::best, 3, 2, scores) == std::vector<int>{0, 1, 2, 6, 7, 8});
  CHECK(left(GroupScore::two_best, 3, 2, scores) == std::vector<int>{0, 1, 2, 3, 4, 5});
  CHECK(left(GroupScore::two_best, 3, 3, scores).size() == 9);
  CHECK(left(GroupScore::two_best, 1, 1, scores).size() == 9);
}

TEMPLATE_TEST_CASE("group limit: negative scores are as good as others", "[routing]", float,
                   double) {
  using S = TestType;
  CHECK(left<S>(GroupScore::best, 2, 1, {-5, -4, -3, -9}) == std::vector<int>{2, 3});
  CHECK(left<S>(GroupScore::two_best, 2, 1, {-5, -4, -3, -9}) == std::vector<int>{0, 1});
}

TEMPLATE_TEST_CASE("group limit: groups of one, and ties", "[routing]", float, double) {
  using S = TestType;
  CHECK(left<S>(GroupScore::two_best, 4, 2, {1, 4, 2, 3}) == std::vector<int>{1, 3});
  CHECK(left<S>(GroupScore::best, 4, 2, {1, 1, 1, 1}) == std::vector<int>{0, 1});
  CHECK(left<S>(GroupScore::two_best, 2, 1, {1, 3, 2, 2}) == std::vector<int>{0, 1});
}

TEMPLATE_TEST_CASE("group limit: NaN counts as the least", "[routing]", float, double) {
  using S = TestType;
  const S nan = std::numeric_limits<S>::quiet_NaN();
  CHECK(left<S>(GroupScore::best, 2, 1, {nan, 1, 2, nan}) == std::vector<int>{2, 3});
  CHECK(left<S>(GroupScore::two_best, 2, 1, {nan, 9, -2, -3}) == std::vector<int>{2, 3});
  CHECK(left<S>(GroupScore::best, 2, 1, {nan, nan, nan, nan}) == std::vector<int>{0, 1});
}
