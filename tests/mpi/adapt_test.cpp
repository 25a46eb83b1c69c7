#include "moe/adapt/lora.hpp"
#include "small_layer.hpp"

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
  auto alone = adapt(whole, lora, Seed{7});
  // Each expert draws the same numbers wherever it is.
  for_each_parameter(adapted, [&](const std::string& name, const auto& p) {
    for_each_parameter(alone, [&](const std::string& of, const auto& q) {
      if (of == name) CHECK(same_bits(p.value, q.value));
    });
  });
  const auto x = random_matrix(8, 6, 1);
  decltype(adapted)::Tape tape;
  CHECK(relative_error(adapted.evaluate(x, tape), alone.evaluate(x)) < 1e-12);
  const auto train = [](const std::string& name, auto& p) {
    if (p.trained) fill_normal(p.value, 0.3, std::hash<std::string>{}(name));
  };
  for_each_parameter(adapted, train);
  for_each_parameter(alone, train);
  const auto plain = merged(adapted, mpi::RankDispatch(communicator));
  typename decltype(merged(adapted, mpi::RankDispatch(communicator)))::Tape plain_tape;
  CHECK(relative_error(plain.evaluate(x, plain_tape), adapted.evaluate(x, tape)) < 1e-12);
  CHECK(relative_error(plain.evaluate(x, plain_tape), merged(alone).evaluate(x)) < 1e-12);
}

TEST_CASE("expert parallel: a rank that cannot adapt or merge does not leave the others waiting",
          "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using Layer = MoELayer<Expert<FeedForward, double>, TopKGate<double>>;
  const mpi::ExpertParallel<Layer> parallel(
      {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 5, .top_k = 2}, .seed = 4},
      communicator);
  const int last = communicator.size() - 1;
  const std::string rank = "rank " + std::to_string(last) + ": moe: ";
  const auto adapt_with = [&](Index of_gate) {
    return adapt(parallel, LoraConfig{.rank = 2}, LoraGateConfig{.rank = of_gate}, Seed{7},
                 mpi::RankDispatch(communicator));
  };
  check_error(
      communicator, [&] { adapt_with(communicator.rank() == last ? -1 : 2); },
      rank + "LoraGateConfig.rank = -1");
  const auto check_merged = [&](const std::string& spoiled, const std::string& text) {
    auto adapted = adapt_with(2);
    for_each_parameter(adapted, [&](const std::string& name, auto& p) {
      if (communicator.rank() == last && name.ends_with(spoiled)) p.value.resize(1, 1);
    });
    check_error(
        communicator, [&] { merged(adapted, mpi::RankDispatch(communicator)); }, rank + text);
  };
  check_merged("gate.lora_A.weight", "LoraGate: lora_A.weight is 1 x 1");
  check_merged("up.lora_B.weight", "LoraFeedForward: up.lora_B.weight is 1 x 1");
}
