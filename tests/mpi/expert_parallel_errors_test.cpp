// What goes wrong on one rank, or differs between them, in a layer over ranks.

#include <type_traits>
#include <vector>

#include "small_layer.hpp"

using namespace moe;
using mpi::Communicator;
using namespace moe::test;

TEST_CASE("expert parallel: a tape's own output as input", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  test::randomize_by_name(layer, 0.5);
  const auto x = random_matrix(9, 6, static_cast<std::uint64_t>(communicator.rank()));
  Small::Tape once;
  Small::Tape twice;
  const Matrix<double> y = layer.evaluate(x, once);
  const Matrix<double> expected = layer.evaluate(y, twice);
  // Whole or a part, it works to the bit or throws on all ranks.
  const auto check = [&](auto&& part, auto&& right) {
    Small::Tape tape;
    layer.evaluate(x, tape);
    Matrix<double> result;
    const std::string message = error_of([&] { result = layer.evaluate(part(tape), tape); });
    if (message == "none") {
      CHECK(same_bits(result, right));
    } else {
      CHECK_THAT(message, Catch::Matchers::Contains("MoELayer::evaluate"));
    }
    layer.forward(x, tape, {.step = 0});
    const std::string trained = error_of([&] { layer.forward(part(tape), tape, {.step = 0}); });
    if (trained != "none") {
      CHECK_THAT(trained, Catch::Matchers::Contains("MoELayer::forward"));
    }
    // y is not written in backward, so it may be dy; dx and what else is written may not.
    layer.forward(x, tape, {.step = 0});
    Small::Tape other;
    layer.forward(x, other, {.step = 0});
    const Matrix<double> dy = other.y;
    CHECK(same_bits(layer.backward(tape.y, tape), layer.backward(dy, other)));
    const std::string dx = error_of([&] { layer.backward(tape.dx, tape); });
    CHECK_THAT(dx, Catch::Matchers::Contains("MoELayer::backward"));
  };
  check([](Small::Tape& tape) -> const Matrix<double>& { return tape.y; }, expected);
  const Matrix<double> bottom = y.bottomRows(4);
  const Matrix<double> of_bottom = layer.evaluate(bottom, twice);
  check([](Small::Tape& tape) { return tape.y.bottomRows(4); }, of_bottom);
}

TEST_CASE("expert parallel: a structure that was broken is refused on all ranks", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const bool is_first = communicator.rank() == 0;
  const auto x = random_matrix(9, 6, static_cast<std::uint64_t>(communicator.rank()));
  const auto check = [&](auto&& break_it) {
    Small layer(small, communicator);
    Small::Tape trained;
    layer.forward(x, trained, {.step = 1});
    if (is_first) break_it(layer);
    Small::Tape tape;
    CHECK(error_of([&] { layer.backward(x, trained); }) != "none");
    for_each_parameter(layer,
                       [](const std::string&, const auto& p) { CHECK(p.gradient().isZero(0)); });
    CHECK(error_of([&] { layer.forward(x, tape, {.step = 1}); }) != "none");
    CHECK(error_of([&] { layer.evaluate(x, tape); }) != "none");
  };
  check([](Small& layer) {
    for_each_parameter(layer, [](const std::string& name, auto& p) {
      if (name.ends_with("up.weight")) p.value = Matrix<double>(p.value.transpose());
    });
  });
}

TEST_CASE("expert parallel: ranks that disagree throw the same", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  const bool odd = communicator.rank() == last;

  Small::Config config = small;
  if (odd) config.width = 7;
  check_error(
      communicator, [&] { Small layer(config, communicator); }, "Config.width is 6 on rank 0");
  config = small;
  if (odd) config.gate.top_k = 3;
  check_error(
      communicator, [&] { Small layer(config, communicator); },
      "Config.gate.top_k differs: 3 here, 2 on rank 0");
  config = small;
  if (odd) config.gate.load_weight = 0.2;
  check_error(
      communicator, [&] { Small layer(config, communicator); },
      "Config.gate.load_weight differs: 0.2 here, 0.1 on rank 0");
  config = small;
  if (odd) config.output = Activation::sigmoid;
  check_error(
      communicator, [&] { Small layer(config, communicator); },
      "Config.output differs: sigmoid here, identity on rank 0");
  config = small;
  if (odd) config.gate.top_k = 5;
  check_error(
      communicator, [&] { Small layer(config, communicator); },
      "rank " + std::to_string(last) +
          ": moe: NoisyTopKGate::Config.top_k = 5, must be from 1 to experts = 4");
  config = small;
  if (odd) config.seed = 2;
  check_error(
      communicator, [&] { Small layer(config, communicator); }, "Config.seed is 1 on rank 0 and 2");

  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  check_error(
      communicator, [&] { layer.forward(x, tape, {.step = odd ? 2u : 1u}); },
      "Pass.step is 1 on rank 0 and 2 on rank " + std::to_string(last));
  check_error(
      communicator, [&] { layer.forward(odd ? random_matrix(5, 3, 1) : x, tape, {.step = 0}); },
      "rank " + std::to_string(last) + ": moe: MoELayer: x has 3 columns, Config.width = 6");
  check_error(
      communicator,
      [&] {
        if (odd) {
          layer.evaluate(x, tape);
        } else {
          layer.forward(x, tape, {.step = 0});
        }
      },
      "rank 0 is in \"MoELayer::forward\", rank " + std::to_string(last) +
          " in \"MoELayer::evaluate\"");
  check_error(
      communicator, [&] { layer.backward(x, tape); },
      "MoELayer::backward without a forward pass on this tape");

  // And nothing is lost: the layer goes on.
  layer.forward(x, tape, {.step = 1});
  check_error(
      communicator, [&] { layer.backward(odd ? random_matrix(4, 6, 1) : x, tape); },
      "MoELayer: dy has 4 rows, y has 5");
  for_each_parameter(layer, [](const std::string&, auto& p) { CHECK(p.gradient().isZero(0)); });
  Small::Tape other;
  layer.forward(x, other, {.step = 2});
  check_error(
      communicator, [&] { layer.backward(x, odd ? other : tape); },
      "the step of the tape is 1 on rank 0 and 2 on rank " + std::to_string(last));
  layer.backward(x, tape);
}

TEST_CASE("expert parallel: a pass that the gate refuses on one rank", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  const bool odd = communicator.rank() == last;
  const auto x = random_matrix(5, 6, 1);
  const std::vector<double> wrong(7);
  const auto check = [&]<class Gate>(const typename Gate::Config& gate, std::type_identity<Gate>) {
    mpi::ExpertParallel<Layer<Gate>> layer(
        {.width = 6, .expert = {.hidden = 4}, .gate = gate, .seed = 1}, communicator);
    typename decltype(layer)::Tape tape;
    const Pass pass{.step = 0,
                    .noise = odd ? std::span<const double>(wrong) : std::span<const double>()};
    check_error(
        communicator, [&] { layer.forward(x, tape, pass); },
        "rank " + std::to_string(last) + ": moe: " + Gate::name + ": Pass.noise has 7 numbers");
    layer.forward(x, tape, {.step = 0});
    layer.backward(x, tape);
  };
  check({.experts = 4, .top_k = 2}, std::type_identity<NoisyTopKGate<double>>());
  check({.experts = 4, .top_k = 2}, std::type_identity<BalancedGate<double>>());
  for (const PlaceOrder order : {PlaceOrder::rows, PlaceOrder::largest_weight}) {
    check({.experts = 4, .top_k = 2, .capacity_factor = 1, .place_order = order},
          std::type_identity<TopKGate<double>>());
  }
}

TEST_CASE("expert parallel: a gate that cannot share a batch is refused", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  using Layer = mpi::ExpertParallel<MoELayer<Expert<FeedForward, double>, TopKGate<double>>>;
  for (const bool training : {true, false}) {
    check_error(
        communicator,
        [&] {
          Layer({.width = 6,
                 .expert = {.hidden = 4},
                 .gate = {.experts = 4,
                          .top_k = 2,
                          .capacity_factor = training ? 1.0 : 0.0,
                          .evaluation_capacity_factor = training ? 0.0 : 1.0,
                          .place_order = PlaceOrder::best_tokens},
                 .seed = 1},
                communicator);
        },
        "PlaceOrder::best_tokens: not possible in a batch that several processes share");
  }
}

TEST_CASE("expert parallel: ranks that sum other losses hear of it", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  using Layer = mpi::ExpertParallel<MoELayer<Expert<FeedForward, double>, TopKGate<double>>>;
  Layer layer({.width = 6, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 1},
              communicator);
  if (communicator.rank() == last) layer.set_loss_weights({.switch_loss = 0.1});
  Layer::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  check_error(
      communicator, [&] { layer.forward(x, tape, {.step = 0}); },
      "the count of what the gate sums is 13 on rank 0 and 22 on rank");
}

TEST_CASE("expert parallel: a gate that is trained on some ranks only", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  layer.forward(x, tape, {.step = 0});
  const auto train = [&](bool trained) {
    for_each_parameter(layer, [&](const std::string& name, auto& p) {
      if (name.starts_with("gate.")) p.trained = trained;
    });
  };
  train(communicator.rank() == last);
  if (last > 0) {
    check_error(
        communicator, [&] { layer.backward(x, tape); },
        "the count of numbers in gradients of double is 0 on rank 0 and");
  }
  train(false);
  layer.backward(x, tape);
}

TEST_CASE("expert parallel: tapes and layers that ranks mix up", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 5);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  const bool odd = communicator.rank() == last;
  Small layer(small, communicator);
  Small::Config config = small;
  config.width = 12;
  Small other(config, communicator);
  test::randomize_by_name(layer, 2.0);
  Small::Tape a;
  Small::Tape b;
  layer.forward(random_matrix(9, 6, 1), a, {.step = 0});
  layer.forward(random_matrix(9, 6, 2), b, {.step = 0});
  CHECK(error_of([&] {
          layer.backward(random_matrix(9, 6, 3), odd ? b : a);
        }).find("pass of the tape") != std::string::npos);
  CHECK(error_of([&] {
          (odd ? other : layer).forward(random_matrix(9, odd ? 12 : 6, 1), a, {.step = 0});
        }).find("the layer is") != std::string::npos);
}

TEST_CASE("expert parallel: the first token and the count of facts are compared", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  const bool odd = communicator.rank() == last;
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  CHECK(error_of([&] {
          layer.forward(x, tape, {.step = 0, .first_token = odd ? 2u : 1u});
        }).find("Pass.first_token is 1 on rank 0 and 2") != std::string::npos);
  CHECK(error_of([&] {
          if (odd) {
            communicator.agree("a call");
          } else {
            communicator.agree("a call", {{"nought", 0}});
          }
        }) == "moe: ranks disagree in \"a call\"");
}

TEST_CASE("expert parallel: a pass that one rank refuses leaves the tape as good as before on all",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  layer.forward(x, tape, {.step = 0});
  const Matrix<double> dx = layer.backward(x, tape);
  const Index width = communicator.rank() == communicator.size() - 1 ? 3 : 6;
  CHECK_THROWS_AS(layer.forward(random_matrix(5, width, 1), tape, {.step = 0}), mpi::Error);
  CHECK_THROWS_AS(layer.evaluate(random_matrix(7, width, 1), tape), mpi::Error);
  CHECK(same_bits(layer.backward(x, tape), dx));
}

TEST_CASE("expert parallel: an evaluation cannot be gone back", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  layer.forward(x, tape, {.step = 0});
  layer.evaluate(x, tape);
  CHECK(error_of([&] { layer.backward(x, tape); }).find("without a forward pass") !=
        std::string::npos);
}

TEST_CASE("expert parallel: ranks that scale the gate's losses or its noise differently hear of it",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  Small layer(small, communicator);
  Small::Tape tape;
  const double scale = communicator.rank() == last ? 0.5 : 1;
  const auto error = [&](const Pass& pass) {
    return error_of([&] { layer.forward(random_matrix(5, 6, 1), tape, pass); });
  };
  CHECK(error({.step = 0, .loss_scale = scale}).find("Pass.loss_scale") != std::string::npos);
  CHECK(error({.step = 0, .noise_factor = scale}).find("Pass.noise_factor") != std::string::npos);
}

TEST_CASE("expert parallel: ranks that see other numbers of sequences hear of it", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  const Index sequences = communicator.rank() == last ? 2 : 1;
  const std::string message = "Pass.sequences is 1 on rank 0 and 2";
  CHECK(error_of([&] {
          layer.forward(x, tape, {.step = 0, .sequences = sequences});
        }).find(message) != std::string::npos);
  CHECK(error_of([&] { layer.evaluate(x, tape, {.sequences = sequences}); }).find(message) !=
        std::string::npos);
}

TEST_CASE("expert parallel: the tape or dy of another layer is refused", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Small layer(small, communicator);
  Small::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  layer.forward(x, tape, {.step = 0});
  CHECK(error_of([&] { layer.backward(random_matrix(5, 7, 1), tape); }).find("dy has 7 columns") !=
        std::string::npos);
  Small::Config config = small;
  config.expert.hidden = 9;
  Small wide(config, communicator);
  CHECK(error_of([&] { wide.backward(x, tape); }).find("another layer's") != std::string::npos);
  config = small;
  config.gate.experts = 8;
  Small more(config, communicator);
  CHECK(error_of([&] { more.backward(x, tape); }).find("another layer's") != std::string::npos);
}
