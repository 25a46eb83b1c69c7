// Parts of a user that throw on one rank, in a layer over ranks.

#include <span>
#include <stdexcept>
#include <string>

#include "small_layer.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// A network that has enough after some calls on one rank.
template <class Scalar_>
class Weary {
 public:
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };
  static inline int calls_left = 1000;

  explicit Weary(const Config& config, std::uint64_t = 0) : weight_(config.width, config.width) {}

  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar>, MatrixView<Scalar> y) const {
    evaluate(x, y);
  }
  void evaluate(ConstMatrixView<Scalar> x, MatrixView<Scalar> y) const {
    tire();
    y = x * weight_.value;
  }
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar>, ConstMatrixView<Scalar> dy,
                MatrixView<Scalar> dx) {
    tire();
    weight_.gradient() += x.transpose() * dy;
    dx = dy * weight_.value.transpose();
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
  }

 private:
  static void tire() {
    if (--calls_left < 0) throw std::runtime_error("the network is weary");
  }
  Parameter<Scalar> weight_;
};

}  // namespace

TEST_CASE("expert parallel: a user's network, which throws on one rank", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  using WearyLayer = MoELayer<Expert<Weary, double>>;
  Weary<double>::calls_left = 1 << 20;
  {
    Beside<WearyLayer> beside({.width = 6, .gate = {.experts = 4, .top_k = 2}, .seed = 4},
                              communicator);
    for (const auto& share : test::ways_to_share(20, communicator.size())) {
      beside.check(share, 1e-12);
    }
  }
  mpi::ExpertParallel<WearyLayer> layer({.width = 6, .gate = {.experts = 8, .top_k = 2}, .seed = 4},
                                        communicator);
  test::randomize_by_name(layer, 0.5);
  decltype(layer)::Tape tape;
  const auto x = random_matrix(30, 6, 1);
  const int last = communicator.size() - 1;
  const std::string text = "rank " + std::to_string(last) + ": the network is weary";
  for (const int calls : {0, 1, 2}) {
    if (communicator.rank() == last) Weary<double>::calls_left = calls;
    check_error(
        communicator, [&] { layer.forward(x, tape, {.step = 0}); }, text);
    // What an earlier pass may have left in the tape is not gone back through.
    check_error(
        communicator, [&] { layer.backward(x, tape); }, "without a forward pass");
    if (communicator.rank() == last) Weary<double>::calls_left = calls;
    check_error(
        communicator, [&] { layer.evaluate(x, tape); }, text);
    Weary<double>::calls_left = 1 << 20;
    layer.forward(x, tape, {.step = 0});
    if (communicator.rank() == last) Weary<double>::calls_left = calls;
    check_error(
        communicator, [&] { layer.backward(x, tape); }, text);
  }
  Weary<double>::calls_left = 1 << 20;
  layer.forward(x, tape, {.step = 0});
  layer.backward(x, tape);
}

namespace {

/// A gate that throws between two of its sums over the batch, on one rank.
class Moody : public NoisyTopKGate<double> {
 public:
  using NoisyTopKGate<double>::NoisyTopKGate;
  static inline bool throws = false;

  const Routing<double>& forward(const MatrixRef<double>& x, Tape& tape, const Pass& pass) const {
    NoisyTopKGate<double>::forward(x, tape, pass);
    if (throws) throw std::logic_error("the gate is moody");
    double one = 1;
    if (pass.batch != nullptr) pass.batch->sum(std::span<double>(&one, 1));
    return tape.routing;
  }
  void backward(const MatrixRef<double>& x, std::span<const double> dweight, Tape& tape,
                Matrix<double>& dx) {
    NoisyTopKGate<double>::backward(x, dweight, tape, dx);
    if (throws) throw std::logic_error("the gate is moody");
  }
};

}  // namespace

TEST_CASE("expert parallel: a gate that throws on one rank amid its sums", "[mpi]") {
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  mpi::ExpertParallel<Layer<Moody>> layer(
      {.width = 6, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 1},
      communicator);
  decltype(layer)::Tape tape;
  const auto x = random_matrix(5, 6, 1);
  const std::string text = "rank " + std::to_string(last) + ": the gate is moody";
  Moody::throws = communicator.rank() == last;
  check_error(
      communicator, [&] { layer.forward(x, tape, {.step = 0}); }, text);
  Moody::throws = false;
  layer.forward(x, tape, {.step = 0});
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    if (name.starts_with("gate.")) p.gradient().setConstant(2);
  });
  Moody::throws = communicator.rank() == last;
  check_error(
      communicator, [&] { layer.backward(x, tape); }, text);
  // What they were, on the ranks that did not fail too.
  for_each_parameter(layer.gate(),
                     [](const std::string&, auto& p) { CHECK((p.gradient().array() == 2).all()); });
  Moody::throws = false;
  layer.forward(x, tape, {.step = 0});
  layer.backward(x, tape);
  // A forward pass that failed half-way cannot be gone back.
  Moody::throws = communicator.rank() == last;
  check_error(
      communicator, [&] { layer.forward(x, tape, {.step = 0}); }, text);
  Moody::throws = false;
  CHECK(error_of([&] { layer.backward(x, tape); }).find("without a forward pass") !=
        std::string::npos);
}
