#include "moe/adapt/lora.hpp"
#include "whole.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// Adapted experts behind a gate over the ranks, on several shares of 12 rows, with padding and without.
template <class Gate>
void check(const typename Gate::Config& gate) {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<MoELayer<Lora<FeedForward, double>, Gate>> beside(
      {.width = 6,
       .expert = {.network = {.hidden = 10, .activation = Activation::silu},
                  .lora = {.rank = 2, .alpha = 3}},
       .gate = gate,
       .seed = 4},
      communicator);
  for (const auto& share : test::ways_to_share(12, communicator.size())) {
    beside.check(share, 1e-12);
    for (const auto& valid : test::ways_to_pad(share)) {
      beside.check(share, 1e-12, {.step = 3, .valid = valid});
    }
  }
}

}  // namespace

TEST_CASE("expert parallel: adapted experts equal those of one process", "[mpi]") {
  check<NoisyTopKGate<double>>({.experts = 5, .top_k = 2});
  check<TopKGate<double>>({.experts = 5, .top_k = 2, .renormalise = true});
}

TEST_CASE("expert parallel: an adapted gate equals that of one process", "[mpi]") {
  check<LoraGate<NoisyTopKGate<double>>>(
      {.gate = {.experts = 5, .top_k = 2, .load_weight = 0.5}, .lora = {.rank = 2}});
  check<LoraGate<TopKGate<double>>>(
      {.gate = {.experts = 5, .top_k = 2, .switch_loss_weight = 0.4}, .lora = {.rank = 2}});
  check<LoraGate<HierarchicalGate<double>>>(
      {.gate = {.groups = 3, .group_experts = 4, .top_k_groups = 2, .top_k = 2, .load_weight = 0.5},
       .lora = {.rank = 2}});
}

TEST_CASE("expert parallel: adapters are put on a layer over ranks, and merged", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const Layer::Config config{.width = 6,
                             .expert = {.hidden = 10, .activation = Activation::silu},
                             .gate = {.experts = 5, .top_k = 2},
                             .seed = 4};
  Layer whole(config);
  mpi::ExpertParallel<Layer> parallel(config, communicator);
  randomize_by_name(whole, 0.5);
  randomize_by_name(parallel, 0.5);
  const LoraConfig lora{.rank = 2};
  auto adapted = adapt(parallel, lora, Seed{7}, mpi::RankDispatch(communicator));
  const auto alone = adapt(whole, lora, Seed{7});
  // Each expert draws the same numbers wherever it is.
  for_each_parameter(adapted, [&](const std::string& name, const auto& p) {
    for_each_parameter(alone, [&](const std::string& of, const auto& q) {
      if (of == name) CHECK(same_bits(p.value, q.value));
    });
  });
  const auto x = random_matrix(8, 6, 1);
  decltype(adapted)::Tape tape;
  CHECK(relative_error(adapted.evaluate(x, tape), alone.evaluate(x)) < 1e-12);
  for_each_parameter(adapted, [&](const std::string& name, auto& p) {
    if (p.trained) fill_normal(p.value, 0.3, std::hash<std::string>{}(name));
  });
  const auto plain = merged(adapted, mpi::RankDispatch(communicator));
  typename decltype(merged(adapted, mpi::RankDispatch(communicator)))::Tape plain_tape;
  CHECK(relative_error(plain.evaluate(x, plain_tape), adapted.evaluate(x, tape)) < 1e-12);
}
