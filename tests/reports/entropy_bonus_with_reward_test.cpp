// Report: with an entropy bonus the policy gradient may lose a term and no test sees it, since none
// sets the bonus beside a reward.

#include "../reinforce/policies.hpp"
#include "moe/reinforce/reinforce.hpp"

using namespace moe;

TEST_CASE("report: the gradients of a reward and of an entropy bonus add up", "[reports]") {
  using Small = test::SmallPolicy<double>;
  const double temperature = GENERATE(1.0, 0.7);
  const std::vector<Index> inputs{2, 0, 3};
  const auto earned = [](Index, std::span<const Index> sequence, bool done) {
    return 0.7 * static_cast<double>(sequence.back()) + (done ? 1.0 : 0.0);
  };
  const auto nothing = [](Index, std::span<const Index>, bool) { return 0.0; };
  Small policy({.mixture = false});
  const auto gradients = [&](double bonus, auto&& reward) {
    Reinforce<Small> reinforce({.max_length = 5,
                                .temperature = temperature,
                                .baseline = NoBaseline{},
                                .entropy_bonus = bonus,
                                .seed = 11});
    Reinforce<Small>::Tape tape;
    test::update_gradients(reinforce, policy, inputs, {}, reward, {.reinforce = 1}, {.step = 3},
                           tape);
    return tape.dlogits;
  };
  const Matrix<double> of_reward = gradients(0, earned);
  const Matrix<double> of_bonus = gradients(0.3, nothing);
  const Matrix<double> both = gradients(0.3, earned);
  CHECK(of_reward.norm() > 0.1);
  CHECK(of_bonus.norm() > 1e-3);
  CHECK(test::relative_error(both, Matrix<double>(of_reward + of_bonus)) < 1e-13);
}
