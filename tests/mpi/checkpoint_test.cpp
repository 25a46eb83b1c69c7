#include "moe/mpi/checkpoint.hpp"

#include <memory>

#include "errors.hpp"
#include "moe/io/safetensors.hpp"
#include "temporary_folder.hpp"
#include "whole.hpp"

using namespace moe;
using mpi::Communicator;
using namespace moe::test;

namespace {

using Gate = TopKGate<double>;
using Layer = MoELayer<Expert<FeedForward, double>, Gate>;
using Parallel = mpi::ExpertParallel<Layer>;
const Layer::Config config{.width = 5,
                           .expert = {.hidden = 4},
                           .gate = {.experts = 7, .top_k = 2, .selection_bias = true},
                           .seed = 3};

template <class Module>
void train(Module& module, typename Module::Tape& tape, Adam<double>& adam, const Matrix<double>& x,
           std::uint64_t step) {
  zero_gradients(module);
  module.forward(x, tape, {.step = step});
  module.backward(x, tape);
  adam.update(module, 0.01);
}

/// The first `size` ranks by themselves; nothing on the others.
std::unique_ptr<Communicator> first_ranks(int size) {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm some = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank < size ? 0 : MPI_UNDEFINED, rank, &some);
  if (some == MPI_COMM_NULL) return nullptr;
  auto communicator = std::make_unique<Communicator>(some, 30);
  MPI_Comm_free(&some);
  return communicator;
}

}  // namespace

TEST_CASE("checkpoint: training goes on, on another number of ranks, as if nothing had happened",
          "[mpi]") {
  const Communicator world(MPI_COMM_WORLD, 30);
  const auto x = random_matrix(12, 5, 1);
  const auto own = [&](const Communicator& c) {
    const Index first = 12 * c.rank() / c.size();
    return Matrix<double>(x.middleRows(first, 12 * (c.rank() + 1) / c.size() - first));
  };
  // What one process would do.
  Layer expected(config);
  Layer::Tape expected_tape;
  Adam<double> expected_adam;
  for (std::uint64_t step = 1; step <= 6; ++step) {
    train(expected, expected_tape, expected_adam, x, step);
  }

  const int root = world.size() - 1;
  Layer whole(config);
  Adam<double> whole_adam;
  whole_adam.for_each_state(whole, [](const std::string&, auto&&) {});  // makes it
  {
    Parallel layer(config, world);
    Parallel::Tape tape;
    Adam<double> adam;
    for (std::uint64_t step = 1; step <= 3; ++step) train(layer, tape, adam, own(world), step);
    const bool is_root = world.rank() == root;
    Layer* to = is_root ? &whole : nullptr;
    mpi::gather_parameters(layer, to, world, root);
    mpi::gather_state(adam, layer, is_root ? &whole_adam : nullptr, to, world, root);
  }
  // By a file, to a number of ranks that is one less.
  const test::TemporaryFolder folder;
  const std::string path = folder.file("whole.safetensors");
  if (world.rank() == root) {
    SafetensorsWriter writer;
    writer.add_parameters(whole);
    whole_adam.for_each_state(
        whole, [&](const std::string& name, auto&& state) { writer.add("adam." + name, state); });
    writer.write(path);
    const SafetensorsFile file(path);
    Layer loaded(config);
    file.read_parameters(loaded);
    for_each_parameter(whole, [&](const std::string& name, auto& p) {
      for_each_parameter(loaded, [&](const std::string& other, auto& q) {
        if (name == other) CHECK(same_bits(p.value, q.value));
      });
    });
  }
  // The root of the smaller group is another one, so the whole model goes there first.
  for_each_parameter(whole, [&](const std::string&, auto& p) {
    world.broadcast(std::span<double>(p.value.data(), static_cast<std::size_t>(p.size())), root);
  });
  whole_adam.for_each_state(whole, [&](const std::string&, auto&& state) {
    if constexpr (requires { state.rows(); }) {
      world.broadcast(std::span<double>(state.data(), static_cast<std::size_t>(state.size())),
                      root);
    } else {
      world.broadcast(std::span<Index>(state), root);
    }
  });

  if (const auto fewer = first_ranks(std::max(1, world.size() - 1))) {
    Parallel layer(config, *fewer);
    Parallel::Tape tape;
    Adam<double> adam;
    adam.for_each_state(layer, [](const std::string&, auto&&) {});
    const bool is_root = fewer->rank() == 0;
    mpi::scatter_parameters(is_root ? &whole : nullptr, layer, *fewer);
    mpi::scatter_state(is_root ? &whole_adam : nullptr, is_root ? &whole : nullptr, adam, layer,
                       *fewer);
    for (std::uint64_t step = 4; step <= 6; ++step) train(layer, tape, adam, own(*fewer), step);
    std::map<std::string, Matrix<double>> values;
    for_each_parameter(expected, [&](const std::string& name, auto& p) { values[name] = p.value; });
    for_each_parameter(layer, [&](const std::string& name, auto& p) {
      INFO(name);
      CHECK(test::relative_error(p.value, values.at(name)) < 1e-9);
    });
  }
}

TEST_CASE("checkpoint: what an optimizer does not remember is not remembered on the other side",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const bool is_root = communicator.rank() == 0;
  const auto set_trained = [](auto& module, const std::string& start, bool trained) {
    for_each_parameter(module, [&](const std::string& name, auto& p) {
      if (name.starts_with(start)) p.trained = trained;
    });
  };
  const auto matrices_of = [](auto& optimizer, auto& module) {
    std::map<std::string, Matrix<double>> matrices;
    optimizer.for_each_state(module, [&](const std::string& name, auto&& state) {
      if constexpr (requires { state.rows(); }) matrices[name] = state;
    });
    return matrices;
  };
  // Of experts 1 and 5 and the gate's weight nothing is known, expert 2 was frozen later.
  const auto x = random_matrix(12, 5, 1);
  const auto train_some = [&](auto& layer, FactoredAdam<double>& adam) {
    typename std::remove_cvref_t<decltype(layer)>::Tape tape;
    for (const char* start : {"experts.1.", "experts.5.", "gate.weight"}) {
      set_trained(layer, start, false);
    }
    for (std::uint64_t step = 1; step <= 4; ++step) {
      if (step == 3) set_trained(layer, "experts.2.", false);
      zero_gradients(layer);
      for_each_parameter(layer, [&](const std::string& name, auto& p) {
        p.gradient() = random_matrix(p.value.rows(), p.value.cols(), step + name.size() * 10);
      });
      adam.update(layer, 0.01);
    }
  };
  Layer expected(config);
  FactoredAdam<double> expected_adam;
  train_some(expected, expected_adam);
  const auto expected_matrices = matrices_of(expected_adam, expected);

  Parallel layer(config, communicator);
  FactoredAdam<double> adam;
  train_some(layer, adam);
  // Whether the whole model is frozen as the parts are or not, and whatever was remembered of it.
  for (const bool frozen : {true, false}) {
    Layer whole(config);
    FactoredAdam<double> whole_adam;
    if (!frozen) {
      for_each_parameter(whole, [](const std::string&, auto& p) { p.gradient().setOnes(); });
      whole_adam.update(whole, 0.01);
    }
    set_trained(whole, "", !frozen);
    mpi::gather_state(adam, layer, is_root ? &whole_adam : nullptr, is_root ? &whole : nullptr,
                      communicator);
    if (is_root) {
      for (const auto& [name, matrix] : matrices_of(whole_adam, whole)) {
        INFO(name);
        const Matrix<double>& there = expected_matrices.at(name);
        if (frozen || there.size() > 0) {
          CHECK(same_bits(matrix, there));
        } else {
          CHECK(matrix.isZero(0));
        }
      }
    }
    // And back, into a layer that is frozen but for expert 1, or has another past.
    Parallel back(config, communicator);
    FactoredAdam<double> back_adam;
    if (!frozen) {
      for_each_parameter(back, [](const std::string&, auto& p) { p.gradient().setOnes(); });
      back_adam.update(back, 0.01);
    }
    set_trained(back, "", false);
    set_trained(back, "experts.1.", true);
    set_trained(whole, "", false);
    mpi::scatter_state(is_root ? &whole_adam : nullptr, is_root ? &whole : nullptr, back_adam, back,
                       communicator);
    for (const auto& [name, matrix] : matrices_of(back_adam, back)) {
      INFO(name);
      const Matrix<double>& there = expected_matrices.at(name);
      if (there.size() > 0) {
        CHECK(same_bits(matrix, there));
      } else {
        CHECK(matrix.isZero(0));
        CHECK((matrix.size() > 0) == (!frozen || name.find("experts.1.") != name.npos));
      }
    }
  }
}

TEST_CASE("checkpoint: what does not fit is refused by all, and nothing is changed", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const bool is_root = communicator.rank() == 0;
  Parallel layer(config, communicator);
  test::randomize_by_name(layer, 1);
  Layer::Config other = config;
  other.expert.hidden = 6;
  Layer wide(other);
  const auto message =
      error_of([&] { mpi::gather_parameters(layer, is_root ? &wide : nullptr, communicator); });
  CHECK(message.find("in the whole model") != std::string::npos);
  other = config;
  other.gate.experts = 8;
  Layer more(other);
  CHECK(error_of([&] {
          mpi::scatter_parameters(is_root ? &more : nullptr, layer, communicator);
        }).find("gate.") != std::string::npos);
  CHECK(error_of([&] {
          mpi::gather_parameters(layer, static_cast<Layer*>(nullptr), communicator);
        }) == "rank 0: moe: checkpoint: the root has no whole model");
  CHECK(error_of([&] {
          mpi::gather_parameters(layer, static_cast<Layer*>(nullptr), communicator, 9);
        }).find("root = 9") != std::string::npos);
  Parallel same(config, communicator);
  test::randomize_by_name(same, 1);
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    for_each_parameter(same, [&](const std::string& that, auto& q) {
      if (name == that) CHECK(same_bits(p.value, q.value));
    });
  });
}

namespace {

/// A whole model with a parameter that no rank has.
struct More {
  Layer layer{config};
  Parameter<double> extra{1, 1};

  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Layer::visit_parameters(self.layer, visit);
    visit("extra", self.extra);
  }
};

}  // namespace

TEST_CASE("checkpoint: a whole model that has more than the ranks is refused", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Parallel layer(config, communicator);
  More whole;
  CHECK(error_of([&] {
          mpi::gather_parameters(layer, communicator.rank() == 0 ? &whole : nullptr, communicator);
        }) == "rank 0: moe: no rank has the whole model's extra");
}

TEST_CASE("checkpoint: of what several ranks have, the whole model gets the lowest one's",
          "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  Parallel layer(config, communicator);
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    if (name.starts_with("gate.")) p.value.setConstant(communicator.rank() + 5);
  });
  for (int root = 0; root < communicator.size(); ++root) {
    Layer whole(config);
    const bool is_root = communicator.rank() == root;
    mpi::gather_parameters(layer, is_root ? &whole : nullptr, communicator, root);
    if (!is_root) continue;
    for_each_parameter(whole.gate(),
                       [](const std::string&, auto& p) { CHECK((p.value.array() == 5).all()); });
  }
}

TEST_CASE("checkpoint: numbers that go in pieces all arrive, both ways", "[mpi]") {
  const Communicator communicator(MPI_COMM_WORLD, 30);
  const int rank = communicator.rank();
  for (int root = 0; root < communicator.size(); ++root) {
    for (const Index most : {1, 3, 5, 100}) {
      // Of each rank a row of 7 numbers, 10·rank + 0, 1, ...; and one that all have.
      Matrix<double> own(1, 7);
      for (Index i = 0; i < 7; ++i) own(0, i) = static_cast<double>(10 * rank + i);
      Matrix<double> all = Matrix<double>::Constant(2, 2, 5 + rank);
      Matrix<double> whole_all(2, 2);
      whole_all.setConstant(-1);
      std::vector<Matrix<double>> parts(static_cast<std::size_t>(communicator.size()), own);
      mpi::NamedNumbers<double> part;
      mpi::NamedNumbers<double> whole;
      part.add("all", all);
      part.add("of." + std::to_string(rank), own);
      if (rank == root) {
        whole.add("all", whole_all);
        for (std::size_t r = 0; r < parts.size(); ++r) {
          parts[r].setConstant(-1);
          whole.add("of." + std::to_string(r), parts[r]);
        }
      }
      const mpi::checkpoint::Copy<double> copy(part, whole, root, communicator);
      copy.run(true, most);
      if (rank == root) {
        CHECK((whole_all.array() == 5).all());
        for (std::size_t r = 0; r < parts.size(); ++r) {
          for (Index i = 0; i < 7; ++i) {
            CHECK(parts[r](0, i) == static_cast<double>(10 * static_cast<Index>(r) + i));
          }
        }
      }
      own.setConstant(-2);
      all.setConstant(-2);
      copy.run(false, most);
      CHECK((all.array() == 5).all());
      for (Index i = 0; i < 7; ++i) CHECK(own(0, i) == static_cast<double>(10 * rank + i));
    }
  }
}
