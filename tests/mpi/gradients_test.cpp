#include "moe/mpi/gradients.hpp"

#include <stdexcept>

#include "whole.hpp"

using namespace moe;
using mpi::Communicator;
using test::random_matrix;
using test::same_bits;

namespace {

using Layer = MoELayer<Expert<FeedForward, double>, NoisyTopKGate<double>>;
const Layer::Config config{
    .width = 5, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 2}, .seed = 3};

/// A layer whose parameters have the names that the layer gives them, without one of its own.
template <class L>
struct Unnamed {
  L layer;

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    L::visit_parameters(self.layer, visit);
  }
};

/// A model with parts of all kinds, around either layer.
template <class Middle>
struct Model {
  Linear<double> first{{.inputs = 3, .outputs = 5}, 1};
  Middle middle;
  std::vector<Linear<double>> last{Linear<double>({.inputs = 5, .outputs = 2}, 2)};

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("first", self.first);
    visit("middle", self.middle);
    visit("last", self.last);
  }
};
using Whole = Model<Unnamed<Layer>>;
using Parallel = Model<Unnamed<mpi::ExpertParallel<Layer>>>;

/// Puts into every gradient what does not depend on the rank, 1/ranks of it where it is to be summed.
template <class M>
void fill_gradients(M& model, int ranks) {
  for_each_parameter(model, [&](const std::string& name, auto& p) {
    fill_normal(p.gradient(), 1.0, std::hash<std::string>{}(name));
    if (!name.starts_with("middle")) p.gradient() /= ranks;
  });
}

}  // namespace

TEST_CASE("gradients: only those of copies are summed", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Whole whole{.middle = {Layer(config)}};
  Parallel model{.middle = {mpi::ExpertParallel<Layer>(config, communicator)}};
  fill_gradients(whole, 1);
  fill_gradients(model, communicator.size());
  mpi::sum_gradients(model, communicator);
  std::map<std::string, Matrix<double>> expected;
  for_each_parameter(whole,
                     [&](const std::string& name, auto& p) { expected[name] = p.gradient(); });
  for_each_parameter(model, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(test::relative_error(p.gradient(), expected.at(name)) < 1e-15);
  });
}

TEST_CASE("gradients: the norm counts every parameter once, and is cut as in one process",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Whole whole{.middle = {Layer(config)}};
  Parallel model{.middle = {mpi::ExpertParallel<Layer>(config, communicator)}};
  fill_gradients(whole, 1);
  fill_gradients(model, 1);
  const double norm = gradient_norm(whole);
  CHECK(std::abs(mpi::gradient_norm(model, communicator) - norm) < 1e-14 * norm);

  // Not cut below the limit, nor where it is not finite.
  for (const double limit : {2 * norm, norm / 3}) {
    CHECK(std::abs(mpi::clip_gradients(model, limit, communicator) - norm) < 1e-14 * norm);
    clip_gradients(whole, limit);
    std::map<std::string, Matrix<double>> expected;
    for_each_parameter(whole,
                       [&](const std::string& name, auto& p) { expected[name] = p.gradient(); });
    for_each_parameter(model, [&](const std::string& name, auto& p) {
      INFO(name);
      CHECK(test::relative_error(p.gradient(), expected.at(name)) < 1e-14);
    });
  }
  if (communicator.rank() == communicator.size() - 1) {
    for_each_parameter(model.middle.layer, [](const std::string& name, auto& p) {
      if (name.starts_with("experts.") && p.size() > 0)
        p.gradient()(0, 0) = std::numeric_limits<double>::infinity();
    });
  }
  CHECK(std::isinf(mpi::clip_gradients(model, 1, communicator)));
  CHECK(model.first.weight.gradient().allFinite());
}

TEST_CASE("gradients: a limit that makes no sense is refused by all", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Parallel model{.middle = {mpi::ExpertParallel<Layer>(config, communicator)}};
  CHECK_THROWS_AS(mpi::clip_gradients(model, communicator.rank() == 0 ? 0.0 : 1.0, communicator),
                  mpi::Error);
}

TEST_CASE("gradients: what is set aside comes back", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Linear<float> module({.inputs = 3, .outputs = 2}, 1);
  for_each_parameter(module, [](const std::string&, auto& p) { p.gradient().setConstant(5); });
  mpi::GradientSum sum;
  sum.set_aside(module);
  for_each_parameter(module, [&](const std::string&, auto& p) {
    CHECK(p.gradient().isZero(0));
    p.gradient().setConstant(static_cast<float>(communicator.rank() + 1));
  });
  sum.sum(module, communicator);
  sum.add_back(module);
  const auto expected = static_cast<float>(5 + communicator.size() * (communicator.size() + 1) / 2);
  for_each_parameter(module, [&](const std::string&, auto& p) {
    CHECK((p.gradient().array() == expected).all());
  });
}

TEST_CASE("gradients: what was added before they were set aside counts again when it is back",
          "[mpi]") {
  Layer layer(config);
  Layer::Tape tape;
  layer.forward(random_matrix(20, 5, 1), tape, {.step = 0});
  layer.backward(random_matrix(20, 5, 2), tape);
  // A lazy norm leaves out the experts to which nothing was added.
  const double norm = gradient_norm(layer, Updates::lazy);
  mpi::GradientSum sum;
  sum.set_aside(layer);
  CHECK(gradient_norm(layer, Updates::lazy) == 0);
  sum.add_back(layer);
  CHECK(gradient_norm(layer, Updates::lazy) == norm);
  CHECK(gradient_norm(layer) == norm);
}

TEST_CASE("gradients: clipping leaves them alone where the norm is not finite", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  mpi::ExpertParallel<Layer> layer(config, communicator);
  for_each_parameter(layer, [](const std::string&, auto& p) { p.gradient().setConstant(3); });
  for_each_parameter(layer, [](const std::string& name, auto& p) {
    if (name.starts_with("experts.")) p.gradient()(0, 0) = std::numeric_limits<double>::infinity();
  });
  mpi::clip_gradients(layer, 1, communicator);
  for_each_parameter(layer.gate(),
                     [](const std::string&, auto& p) { CHECK((p.gradient().array() == 3).all()); });
}

TEST_CASE("gradients: what lazy zeroing left is not summed", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Layer copy(config);  // a copy on every rank
  Layer::Tape tape;
  copy.forward(random_matrix(20, 5, 1), tape, {.step = 0});
  copy.backward(random_matrix(20, 5, 2), tape);
  zero_gradients(copy, Updates::lazy);
  const int last = communicator.size() - 1;
  Layer alone(config);
  for (Layer* layer : {&alone, &copy}) {
    if (layer == &copy && communicator.rank() != last) continue;
    layer->forward(random_matrix(20, 5, 3), tape, {.step = 0});
    layer->backward(random_matrix(20, 5, 4), tape);
  }
  mpi::sum_gradients(copy, communicator);
  std::map<std::string, Matrix<double>> expected;
  for_each_parameter(alone,
                     [&](const std::string& name, auto& p) { expected[name] = p.gradient(); });
  for_each_parameter(copy, [&](const std::string& name, auto& p) {
    if (name.starts_with("experts"))
      CHECK(test::relative_error(p.gradient(), expected[name]) < 1e-14);
  });
}

namespace {

/// State that is no weight, in front of a weight.
struct Untrained {
  Parameter<double> state{2, 3};
  Parameter<double> weight{2, 3};

  Untrained() { state.trained = false; }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("state", self.state);
    visit("weight", self.weight);
  }
};

}  // namespace

TEST_CASE("gradients: what is not trained is not summed", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Untrained module;
  module.state.gradient().setConstant(7);
  module.weight.gradient().setConstant(communicator.rank() + 1);
  mpi::sum_gradients(module, communicator);
  CHECK((module.state.gradient().array() == 7).all());
  const int ranks = communicator.size();
  CHECK((module.weight.gradient().array() == ranks * (ranks + 1) / 2).all());
}

TEST_CASE("gradients: ranks that train different parameters hear of it", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int last = communicator.size() - 1;
  if (last == 0) return;
  const bool odd = communicator.rank() == last;
  Untrained module;
  module.weight.trained = !odd;
  CHECK_THROWS_WITH(mpi::sum_gradients(module, communicator),
                    Catch::Matchers::Contains("gradients of double is 7 on rank 0 and 0 on rank " +
                                              std::to_string(last)));
  mpi::ExpertParallel<Layer> layer(config, communicator);
  mpi::ExpertParallel<Layer>::Tape tape;
  const auto set_trained = [&](bool trained) {
    for_each_parameter(layer, [&](const std::string& name, auto& p) {
      if (name.starts_with("gate.")) p.trained = trained;
    });
  };
  const auto x = random_matrix(20, 5, 1);
  set_trained(!odd);
  layer.forward(x, tape, {.step = 0});
  CHECK_THROWS_WITH(layer.backward(x, tape), Catch::Matchers::Contains("gradients of double"));
  set_trained(false);
  layer.forward(x, tape, {.step = 0});
  layer.backward(x, tape);
  set_trained(true);
  layer.forward(x, tape, {.step = 0});
  layer.backward(x, tape);
}
