#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "errors.hpp"
#include "moe/mpi/expert_parallel.hpp"
#include "whole.hpp"

using namespace moe;
using namespace moe::test;

namespace {

template <class Gate>
using Layer = MoELayer<Expert<FeedForward, double>, Gate>;
using Noisy = NoisyTopKGate<double>;

/// Whether a rank's matrices are those of the whole with the same names, to the last bit; how many of
/// them it has.
template <class Named>
std::size_t check_part(const Named& part, const Named& whole) {
  for (const auto& [name, matrix] : part) {
    INFO(name);
    REQUIRE(whole.contains(name));
    CHECK(same_bits(matrix, whole.at(name)));
  }
  return part.size();
}

template <class Module>
std::map<std::string, Matrix<double>> values_of(Module& module) {
  std::map<std::string, Matrix<double>> values;
  for_each_parameter(module, [&](const std::string& name, auto& p) { values[name] = p.value; });
  return values;
}
template <class Module>
std::map<std::string, bool> frozen_of(Module& module) {
  std::map<std::string, bool> frozen;
  for_each_parameter(module, [&](const std::string& name, auto& p) { frozen[name] = !p.trained; });
  return frozen;
}

template <class Optimizer, class Module>
std::map<std::string, Matrix<double>> state_of(Optimizer& optimizer, Module& module) {
  std::map<std::string, Matrix<double>> all;
  std::vector<std::string> names;
  for_each_parameter(module, [&](const std::string& name, auto&) { names.push_back(name); });
  optimizer.for_each_state(module, [&](const std::string& what, auto&& state) {
    if constexpr (requires { state.rows(); }) {
      all[what] = state;
    } else if (what == "updates") {
      for (std::size_t i = 0; i < names.size(); ++i) {
        all[what + '.' + names[i]] = Matrix<double>::Constant(1, 1, static_cast<double>(state[i]));
      }
    }
  });
  return all;
}

/// Gradients by name, of some parameters none.
template <class Module>
void set_gradients(Module& module, std::uint64_t step, Updates updates) {
  zero_gradients(module, updates);
  for_each_parameter(module, [&](const std::string& name, auto& p) {
    const auto seed = std::hash<std::string>{}(name);
    if (!p.trained || (name.starts_with("experts") && (seed + step) % 3 == 0)) return;
    auto [memory, holds] = p.accumulate();
    memory = random_matrix(p.value.rows(), p.value.cols(), derive_seed(seed, step));
  });
}

/// A layer on all ranks beside that of one process, each with its optimizer, through all changes of
/// units of experts behind `shared`.
template <class Gate, class Optimizer>
void check(const typename Gate::Config& gate, Index unit, Index shared,
           const typename Optimizer::Config& config) {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<Gate>> beside({.width = 6, .expert = {.hidden = 10}, .gate = gate, .seed = 4},
                             communicator);
  Optimizer optimizer(config);
  Optimizer whole_optimizer(config);
  for (Optimizer* each : {&optimizer, &whole_optimizer}) {
    each->set_groups([](std::string_view name) -> ParameterGroup {
      return {.rate_factor = name.starts_with("experts.3.") ? 0.25 : 1.0};
    });
  }
  std::uint64_t step = 0;
  const auto train = [&] {
    for (int i = 0; i < 2; ++i, ++step) {
      set_gradients(beside.parallel, step, config.updates);
      set_gradients(beside.whole, step, config.updates);
      optimizer.update(beside.parallel, 0.01);
      whole_optimizer.update(beside.whole, 0.01);
    }
  };
  const auto compare = [&] {
    check_part(values_of(beside.parallel), values_of(beside.whole));
    check_part(state_of(optimizer, beside.parallel), state_of(whole_optimizer, beside.whole));
    const auto frozen = frozen_of(beside.whole);
    for (const auto& [name, is] : frozen_of(beside.parallel)) CHECK(is == frozen.at(name));
    const auto here = beside.parallel.dispatch_policy().placement().count(communicator.rank());
    CHECK(static_cast<Index>(beside.parallel.experts().size()) == here);
    std::vector<Index> sum{here};
    communicator.sum(std::span<Index>(sum));
    CHECK(sum[0] == beside.whole.gate().experts());
    for (const auto& share : test::ways_to_share(12, communicator.size())) {
      beside.check(share, 1e-12);
    }
  };
  const auto change = [&](auto&& f) {
    INFO("before the change of step " << step);
    train();
    const ExpertChange whole = f(beside.whole);
    const ExpertChange parallel = f(beside.parallel);
    CHECK(parallel.sources == whole.sources);
    whole_optimizer.follow(beside.whole, beside.whole, whole);
    optimizer.follow(beside.parallel, beside.parallel, parallel);
    compare();
    train();
    compare();
  };
  const auto units = [&](std::initializer_list<Index> list) {
    std::vector<Index> experts;
    for (const Index u : list) {
      for (Index i = 0; i < unit; ++i) experts.push_back(shared + u * unit + i);
    }
    return experts;
  };
  const auto set_trained = [&](const std::string& start, bool trained) {
    const auto set = [&](const std::string& name, auto& p) {
      if (name.starts_with(start)) p.trained = trained;
    };
    for_each_parameter(beside.whole, set);
    for_each_parameter(beside.parallel, set);
  };
  set_trained("experts.2.", false);
  set_trained("experts.5.down", false);
  change([&](auto& layer) { return layer.add_experts(3 * unit, 5); });
  // Of the one nothing is remembered until it is thawed, of the other what was when it was frozen.
  set_trained("experts.2.", true);
  set_trained("experts.3.", false);
  change([&](auto& layer) { return layer.remove_experts(units({0, 1, 4})); });
  set_trained("experts.", false);
  change([&](auto& layer) {
    return layer.copy_experts(units({3, 0, 2, 0}), {.noise_stddev = 0.1, .seed = 6});
  });
  change([&](auto& layer) { return layer.remove_experts(units({7, 6, 2, 5, 3})); });
}

}  // namespace

TEST_CASE("expert parallel: experts come and go as in the layer of one process", "[mpi][change]") {
  check<Noisy, Adam<double>>({.experts = 4, .top_k = 2}, 1, 0, {.updates = Updates::lazy});
  check<Noisy, FactoredAdam<double>>({.experts = 4, .top_k = 2}, 1, 0, {});
  check<Noisy, SGD<double>>({.experts = 4, .top_k = 2}, 1, 0, {.momentum = 0.9});
  check<Noisy, SGD<double>>({.experts = 4, .top_k = 2}, 1, 0, {});
  check<TopKGate<double>, Adam<double>>({.experts = 4, .top_k = 2, .selection_bias = true}, 1, 0,
                                        {});
  check<HierarchicalGate<double>, Adam<double>>(
      {.groups = 4, .group_experts = 2, .top_k_groups = 2, .top_k = 1}, 2, 0, {});
  // The load keeps the gradient of column keys from 0, which it is where all experts of each token have
  // one column.
  check<ProductKeyGate<double>, Adam<double>>({.row_keys = 4, .column_keys = 3, .top_k = 2}, 3, 0,
                                              {});
  check<SharedExpertGate<Noisy>, Adam<double>>(
      {.shared = 2, .gated = true, .routed = {.experts = 4, .top_k = 2}}, 1, 2, {});
}

TEST_CASE("expert parallel: a change that cannot be, or that ranks disagree on, changes nothing",
          "[mpi][change]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<Noisy>> beside(
      {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 4, .top_k = 2}, .seed = 4},
      communicator);
  auto& layer = beside.parallel;
  const auto contains = [](const char* text) { return Catch::Matchers::Contains(text); };
  CHECK_THAT(error_of([&] { layer.remove_experts({4}); }),
             contains("MoELayer::remove_experts: expert = 4, must be at least 0 and below 4"));
  CHECK_THAT(error_of([&] { layer.remove_experts({0, 1, 2}); }), contains("top_k = 2"));
  if (communicator.size() > 1) {
    const Index rank = communicator.rank();
    CHECK_THAT(error_of([&] { layer.remove_experts({rank == 1 ? 1 : 0}); }),
               contains("the experts"));
    CHECK_THAT(error_of([&] { layer.add_experts(1, static_cast<std::uint64_t>(rank)); }),
               contains("seed is 0 on rank 0 and 1 on rank 1"));
    CHECK_THAT(error_of([&] {
                 layer.copy_experts({0}, {.noise_stddev = rank == 0 ? 0.0 : 0.1, .seed = 1});
               }),
               contains("noise_stddev"));
    CHECK_THAT(
        error_of([&] { layer.remove_experts({rank == 1 ? 9 : 0}); }),
        contains(
            "rank 1: moe: MoELayer::remove_experts: expert = 9, must be at least 0 and below 4"));
  }
  for (const auto& share : test::ways_to_share(8, communicator.size())) beside.check(share, 1e-12);

  Adam<double> adam({});
  set_gradients(layer, 1, Updates::dense);
  adam.update(layer, 0.1);
  const ExpertChange first = layer.add_experts(1, 1);
  CHECK_THROWS_WITH(adam.update(layer, 0.1), contains("gate.weight is of a layer whose experts"));
  const ExpertChange second = layer.remove_experts({0});
  CHECK_THAT(error_of([&] { adam.follow(layer, layer, first); }), contains("Adam::follow"));
  CHECK_THAT(error_of([&] { adam.follow(layer, layer, second); }),
             contains("follow() was not called for a change before this one"));
}

TEST_CASE("expert parallel: a tape of before a change is refused", "[mpi][change]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  mpi::ExpertParallel<Layer<Noisy>> layer(
      {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 4, .top_k = 2}, .seed = 4},
      communicator);
  decltype(layer)::Tape tape;
  const auto x = random_matrix(3, 6, 1);
  layer.forward(x, tape, {.step = 1});
  layer.copy_experts({3}, {.seed = 1});
  layer.remove_experts({0});
  CHECK_THAT(error_of([&] { layer.backward(x, tape); }),
             Catch::Matchers::Contains("the tape is of other experts"));
  layer.forward(x, tape, {.step = 1});
  layer.backward(x, tape);
}
