#include "moe/mpi/expert_parallel.hpp"

#include <stdexcept>

#include "errors.hpp"
#include "whole.hpp"

using namespace moe;
using mpi::Communicator;
using namespace moe::test;

namespace {

template <class Gate, class Scalar = double>
using Layer = MoELayer<Expert<FeedForward, Scalar>, Gate>;

/// A layer with this gate, on several shares of 12 rows among the ranks, with padding and without, and
/// on none.
template <class Gate>
void check_gate(const typename Gate::Config& gate, double scale = 0.5, Index sequences = 0) {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<Gate>> beside({.width = 6,
                              .expert = {.hidden = 10, .activation = Activation::silu},
                              .gate = gate,
                              .seed = 4},
                             communicator, scale);
  for (const auto& share : test::ways_to_share(12, communicator.size())) {
    beside.check(share, 1e-12, {.step = 3, .sequences = sequences});
    for (const auto& valid : test::ways_to_pad(share)) {
      beside.check(share, 1e-12, {.step = 3, .valid = valid, .sequences = sequences});
    }
  }
  beside.check(std::vector<Index>(static_cast<std::size_t>(communicator.size()), 0), 1e-12,
               {.step = 3, .sequences = sequences});
}

}  // namespace

TEST_CASE("expert parallel: equals the layer of one process behind a noisy gate", "[mpi]") {
  for (const Index experts : {1, 2, 5, 8}) {
    for (const Index top_k : {Index{1}, Index{2}, experts}) {
      if (top_k > experts) continue;
      INFO(experts << " experts, " << top_k << " active");
      check_gate<NoisyTopKGate<double>>({.experts = experts, .top_k = top_k});
    }
  }
  check_gate<NoisyTopKGate<double>>(
      {.experts = 6, .top_k = 2, .noise = false, .importance_weight = 0.7, .load_weight = 0.3});
}

TEST_CASE("expert parallel: equals the layer of one process behind a hierarchical gate", "[mpi]") {
  check_gate<HierarchicalGate<double>>(
      {.groups = 3, .group_experts = 4, .top_k_groups = 2, .top_k = 2, .load_weight = 0.5});
  check_gate<HierarchicalGate<double>>(
      {.groups = 5, .group_experts = 2, .top_k_groups = 1, .top_k = 1});
  check_gate<HierarchicalGate<double>>(
      {.groups = 2, .group_experts = 3, .top_k_groups = 2, .top_k = 2, .noise = false});
}

TEST_CASE("expert parallel: equals the layer of one process behind product keys", "[mpi]") {
  check_gate<ProductKeyGate<double>>(
      {.row_keys = 3, .column_keys = 4, .top_k = 2, .load_weight = 0.5});
  check_gate<ProductKeyGate<double>>({.row_keys = 2, .column_keys = 3, .top_k = 4, .noise = false});
}

TEST_CASE("expert parallel: equals the layer of one process behind a balanced gate", "[mpi]") {
  check_gate<BalancedGate<double>>({.experts = 4, .top_k = 2, .threshold_weight = 0.3});
  check_gate<BalancedGate<double>>({.experts = 5, .top_k = 1});
}

TEST_CASE("expert parallel: equals the layer of one process behind a softmax gate", "[mpi]") {
  using Gate = TopKGate<double>;
  check_gate<Gate>({.experts = 5, .top_k = 2, .renormalise = true, .switch_loss_weight = 0.4});
  check_gate<Gate>(
      {.experts = 5, .top_k = 2, .score = Score::softmax_of_chosen, .z_loss_weight = 0.2});
  check_gate<Gate>({.experts = 6,
                    .top_k = 2,
                    .score = Score::sigmoid,
                    .groups = 3,
                    .top_k_groups = 2,
                    .selection_bias = true,
                    .switch_loss_weight = 0.3,
                    .switch_count = SwitchCount::per_token});
  check_gate<Gate>({.experts = 4,
                    .top_k = 1,
                    .jitter = 0.1,
                    .switch_loss_weight = 0.3,
                    .switch_count = SwitchCount::first_choice});
  for (const PlaceOrder order :
       {PlaceOrder::rows, PlaceOrder::first_choices, PlaceOrder::largest_weight}) {
    check_gate<Gate>({.experts = 4,
                      .top_k = 2,
                      .bias = true,
                      .random_second = true,
                      .capacity_factor = 0.75,
                      .evaluation_capacity_factor = 1,
                      .place_order = order,
                      .switch_loss_weight = 0.3},
                     2.0);
    check_gate<Gate>(
        {.experts = 4,
         .top_k = 2,
         .drawn_second = true,
         .capacity = 2,
         .evaluation_capacity = 1,
         .place_order = order,
         .sequences = 3,
         .row_order = order == PlaceOrder::rows ? RowOrder::time_major : RowOrder::sequence_major},
        2.0);
  }
  for (const RowOrder order : {RowOrder::time_major, RowOrder::sequence_major}) {
    check_gate<Gate>({.experts = 4,
                      .top_k = 2,
                      .sequence_loss_weight = 0.5,
                      .sequences = 3,
                      .row_order = order});
  }
}

TEST_CASE("expert parallel: the pass says how many sequences the ranks' batch has", "[mpi]") {
  using Gate = TopKGate<double>;
  for (const RowOrder order : {RowOrder::time_major, RowOrder::sequence_major}) {
    const Gate::Config config{.experts = 4,
                              .top_k = 2,
                              .capacity = 2,
                              .evaluation_capacity = 1,
                              .sequence_loss_weight = 0.5,
                              .sequences = 2,
                              .row_order = order};
    check_gate<Gate>(config, 2.0, 3);
    check_gate<SharedExpertGate<Gate>>({.shared = 1, .routed = config}, 2.0, 4);
  }
}

TEST_CASE("expert parallel: equals the layer of one process behind expert choice", "[mpi]") {
  check_gate<ExpertChoiceGate<double>>({.experts = 4, .capacity_factor = 1.5});
}

TEST_CASE("expert parallel: equals the layer of one process with shared experts", "[mpi]") {
  check_gate<SharedExpertGate<NoisyTopKGate<double>>>(
      {.shared = 2, .gated = true, .routed = {.experts = 4, .top_k = 2}});
  check_gate<SharedExpertGate<NoisyTopKGate<double>>>({.shared = 2,
                                                       .gated = true,
                                                       .tied = true,
                                                       .scale = 0.5,
                                                       .routed = {.experts = 4, .top_k = 2}});
  check_gate<SharedExpertGate<HierarchicalGate<double>>>(
      {.shared = 1, .routed = {.groups = 3, .group_experts = 2, .top_k_groups = 2, .top_k = 1}});
  check_gate<SharedExpertGate<BalancedGate<double>>>(
      {.shared = 1, .routed = {.experts = 3, .top_k = 1}});
}

TEST_CASE("expert parallel: selection biases move alike on all ranks", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<TopKGate<double>>> beside(
      {.width = 6,
       .expert = {.hidden = 4},
       .gate = {.experts = 5, .top_k = 2, .selection_bias = true, .bias_rate = 0.1},
       .seed = 4},
      communicator);
  const auto x = random_matrix(4 * communicator.size(), 6, 5);
  Layer<TopKGate<double>>::Tape expected;
  decltype(beside.parallel)::Tape tape;
  beside.whole.forward(x, expected, {.step = 0});
  beside.parallel.forward(x.middleRows(4 * communicator.rank(), 4), tape, {.step = 0});
  beside.whole.update_selection_bias(expected);
  beside.parallel.update_selection_bias(tape);
  Matrix<double> biases[2];
  const auto take = [](Matrix<double>& to) {
    return [&](const std::string& name, auto& p) {
      if (name == "gate.selection_bias") to = p.value;
    };
  };
  for_each_parameter(beside.whole, take(biases[0]));
  for_each_parameter(beside.parallel, take(biases[1]));
  CHECK(biases[0].cwiseAbs().maxCoeff() > 0);
  CHECK(same_bits(biases[0], biases[1]));
}

TEST_CASE("expert parallel: one expert can get every token of every rank", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  for (const Index favourite : {0, 3}) {
    Beside<Layer<NoisyTopKGate<double>>> beside(
        {.width = 6, .expert = {.hidden = 10}, .gate = {.experts = 4, .top_k = 1}, .seed = 4},
        communicator);
    // Scores are x·W_g, so a column of large ones needs an x of one sign: instead, the bias of the
    // choice is given by an x whose first number is large.
    const auto prefer = [&](const std::string& name, auto& p) {
      if (!name.starts_with("gate.")) return;
      p.value.setZero();
      if (name == "gate.weight") p.value(0, favourite) = 1e3;
    };
    for_each_parameter(beside.whole, prefer);
    for_each_parameter(beside.parallel, prefer);
    auto x = random_matrix(12, 6, 5);
    x.col(0).setConstant(1);
    decltype(beside.parallel)::Tape tape;
    Layer<NoisyTopKGate<double>>::Tape expected;
    const Index first = 12 * communicator.rank() / communicator.size();
    const Index count = 12 * (communicator.rank() + 1) / communicator.size() - first;
    beside.whole.forward(x, expected, {.step = 0});
    beside.parallel.forward(x.middleRows(first, count), tape, {.step = 0});
    CHECK(tape.balance().tokens_per_expert[static_cast<std::size_t>(favourite)] == 12);
    CHECK(test::relative_error(tape.y, expected.y.middleRows(first, count)) < 1e-12);
    beside.whole.backward(x, expected);
    beside.parallel.backward(x.middleRows(first, count), tape);
    CHECK(test::relative_error(tape.dx, expected.dx.middleRows(first, count)) < 1e-12);
  }
}

TEST_CASE("expert parallel: experts that are the identity stay where their tokens are", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  for (const Activation output : {Activation::identity, Activation::sigmoid}) {
    Beside<Layer<NoisyTopKGate<double>>> beside({.width = 6,
                                                 .expert = {.hidden = 10},
                                                 .gate = {.experts = 6, .top_k = 3},
                                                 .identity_experts = 3,
                                                 .output = output,
                                                 .seed = 4},
                                                communicator);
    for (const auto& share : test::ways_to_share(20, communicator.size())) {
      beside.check(share, 1e-12, {.step = 9});
      for (const auto& valid : test::ways_to_pad(share)) {
        beside.check(share, 1e-12, {.step = 3, .valid = valid});
      }
    }
  }
}

TEST_CASE("expert parallel: every kind of expert and output", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  for (const bool gated : {false, true}) {
    for (const bool recompute : {false, true}) {
      for (const bool weighted_input : {false, true}) {
        Beside<Layer<NoisyTopKGate<double>>> beside({.width = 6,
                                                     .expert = {.hidden = 10,
                                                                .gated = gated,
                                                                .bias = !gated || weighted_input,
                                                                .weighted_input = weighted_input,
                                                                .recompute = recompute},
                                                     .gate = {.experts = 5, .top_k = 2},
                                                     .output = Activation::sigmoid,
                                                     .seed = 4},
                                                    communicator);
        for (const auto& share : test::ways_to_share(20, communicator.size())) {
          beside.check(share, 1e-12, {.step = 9, .first_token = 7});
        }
      }
    }
  }
}

TEST_CASE("expert parallel: float", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<NoisyTopKGate<float>, float>> beside(
      {.width = 33, .expert = {.hidden = 50}, .gate = {.experts = 7, .top_k = 3}, .seed = 4},
      communicator);
  for (const auto& share : test::ways_to_share(70, communicator.size())) beside.check(share, 1e-5);
}

TEST_CASE("expert parallel: a pass has the same bits again, whatever arrives first", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using Parallel = mpi::ExpertParallel<Layer<NoisyTopKGate<float>, float>>;
  Parallel layer(
      {.width = 64, .expert = {.hidden = 32}, .gate = {.experts = 8, .top_k = 3}, .seed = 4},
      communicator);
  test::randomize_by_name(layer, 0.3);
  const auto x = random_matrix<float>(50 + 10 * communicator.rank(), 64, 5);
  Parallel::Tape tape;
  Matrix<float> y;
  Matrix<float> dx;
  std::map<std::string, Matrix<float>> gradients;
  for (int pass = 0; pass < 8; ++pass) {
    // Another rank is late each time.
    if (pass % communicator.size() == communicator.rank()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    zero_gradients(layer);
    layer.forward(x, tape, {.step = 2});
    layer.backward(x, tape);
    if (pass == 0) {
      y = tape.y;
      dx = tape.dx;
    }
    CHECK(same_bits(y, tape.y));
    CHECK(same_bits(dx, tape.dx));
    for_each_parameter(layer, [&](const std::string& name, auto& p) {
      if (pass == 0) gradients[name] = p.gradient();
      CHECK(same_bits(gradients[name], p.gradient()));
    });
  }
}

TEST_CASE("expert parallel: lazy updates know of the tokens of other ranks", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using Gate = HierarchicalGate<double>;
  Beside<Layer<Gate>> beside(
      {.width = 6,
       .expert = {.hidden = 10},
       .gate = {.groups = 6, .group_experts = 2, .top_k_groups = 1, .top_k = 1},
       .seed = 4},
      communicator);
  Layer<Gate>::Tape expected;
  decltype(beside.parallel)::Tape tape;
  Adam<double> adam_whole({.updates = Updates::lazy});
  Adam<double> adam({.updates = Updates::lazy});
  for (std::uint64_t step = 1; step <= 3; ++step) {
    // Three tokens, all on rank 0, reach few groups and experts.
    const auto x = random_matrix(3, 6, step);
    const Matrix<double> own = x.topRows(communicator.rank() == 0 ? 3 : 0);
    zero_gradients(beside.whole, Updates::lazy);
    zero_gradients(beside.parallel, Updates::lazy);
    beside.whole.forward(x, expected, {.step = step});
    beside.parallel.forward(own, tape, {.step = step});
    beside.whole.backward(x, expected);
    beside.parallel.backward(own, tape);
    adam_whole.update(beside.whole, 0.01);
    adam.update(beside.parallel, 0.01);
  }
  std::map<std::string, Matrix<double>> values;
  for_each_parameter(beside.whole,
                     [&](const std::string& name, auto& p) { values[name] = p.value; });
  for_each_parameter(beside.parallel, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(test::relative_error(p.value, values[name]) < 1e-9);
  });
}

TEST_CASE("expert parallel: slots cost what is promised on the wire", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using Parallel = mpi::ExpertParallel<Layer<NoisyTopKGate<float>, float>>;
  Parallel layer(
      {.width = 64, .expert = {.hidden = 32}, .gate = {.experts = 8, .top_k = 2}, .seed = 4},
      communicator);
  test::randomize_by_name(layer, 0.3);
  const auto x = random_matrix<float>(256, 64, static_cast<std::uint64_t>(communicator.rank()));
  Parallel::Tape tape;
  mpi::Traffic& traffic = communicator.traffic();
  traffic = {};
  layer.forward(x, tape, {.step = 0});
  const Index leave = tape.exchange.sent.back();
  const Index come = tape.exchange.received.back();
  CHECK(traffic.row_bytes == (leave + come) * 64 * 4);
  CHECK(20 * traffic.other_bytes <= traffic.row_bytes);
  CHECK((communicator.size() == 1 || leave > 0));
  traffic = {};
  layer.backward(x, tape);
  CHECK(traffic.row_bytes == (leave + come) * 64 * 4);
  CHECK(20 * traffic.other_bytes <= traffic.row_bytes);
}

TEST_CASE("expert parallel: a wrapped gate knows the batch in backward too", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Beside<Layer<SharedExpertGate<TopKGate<double>>>> beside(
      {.width = 6,
       .expert = {.hidden = 10},
       .gate = {.shared = 1,
                .gated = true,
                .routed = {.experts = 5, .top_k = 2, .z_loss_weight = 0.2}},
       .seed = 4},
      communicator);
  for (const auto& s : test::ways_to_share(12, communicator.size())) beside.check(s, 1e-12);
}

TEST_CASE("expert parallel: the groups of a hierarchical gate are placed together", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const mpi::ExpertParallel<Layer<HierarchicalGate<double>>> layer(
      {.width = 6,
       .expert = {.hidden = 4},
       .gate = {.groups = 3, .group_experts = 4, .top_k_groups = 2, .top_k = 2},
       .seed = 0},
      communicator);
  for (int r = 0; r <= communicator.size(); ++r)
    CHECK(layer.dispatch_policy().placement().first(r) % 4 == 0);
}

namespace {

using Small = mpi::ExpertParallel<Layer<NoisyTopKGate<double>>>;
const Small::Config small{
    .width = 6, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 1};

}  // namespace

TEST_CASE("expert parallel: x and dy may be columns of wider matrices", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  test::randomize_by_name(layer, 0.5);
  const auto wide = random_matrix(9, 11, static_cast<std::uint64_t>(communicator.rank()));
  const Matrix<double> x = wide.middleCols(3, 6);
  Small::Tape a;
  Small::Tape b;
  CHECK(same_bits(layer.evaluate(x, a), layer.evaluate(wide.middleCols(3, 6), b)));
  layer.forward(x, a, {.step = 0});
  layer.forward(wide.middleCols(3, 6), b, {.step = 0});
  CHECK(same_bits(layer.backward(x, a), layer.backward(wide.middleCols(3, 6), b)));
}

TEST_CASE("expert parallel: bytes beside the rows", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  const auto x = random_matrix(50, 6, 1);
  Small::Tape tape;
  communicator.traffic() = {};
  layer.forward(x, tape, {.step = 0});
  CHECK(communicator.traffic().other_bytes ==
        8 * tape.exchange.sent.back() + 8 * (4 - static_cast<Index>(layer.experts().size())) +
            2 * 8 * (communicator.size() - 1));  // weights, counts, and flags of failure
}
