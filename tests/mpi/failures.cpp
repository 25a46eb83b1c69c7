// A program whose rank 1 goes wrong in the way that the argument says, while the others want to train.

#include <chrono>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string_view>

#include "moe/moe.hpp"
#include "moe/mpi/environment.hpp"
#include "moe/mpi/expert_parallel.hpp"

namespace {

using Layer = moe::mpi::ExpertParallel<moe::MoELayer<moe::Expert<moe::FeedForward>>>;

int train(std::string_view failure) {
  const moe::mpi::Communicator communicator(MPI_COMM_WORLD, failure == "stops" ? 2 : 600);
  const bool fails = communicator.rank() == 1;
  Layer layer({.width = 4, .expert = {.hidden = 8}, .gate = {.experts = 4, .active = 2}},
              communicator);
  moe::Matrix<float> x(8, failure == "is_given_nonsense" && fails ? 5 : 4);
  moe::fill_normal(x, 1.0f, 1);
  Layer::Tape tape;
  layer.forward(x, tape, {.step = 1});
  if (fails && failure == "stops") return 0;
  if (fails) throw std::runtime_error("has had enough");
  try {
    layer.backward(x, tape);
  } catch (const moe::mpi::Error&) {
    throw;
  } catch (const std::runtime_error& error) {
    // The second call does not wait again.
    const auto start = std::chrono::steady_clock::now();
    try {
      layer.backward(x, tape);
    } catch (const std::runtime_error& again) {
      if (std::chrono::steady_clock::now() - start < std::chrono::seconds(1)) {
        std::printf("%s, and then: %s\n", error.what(), again.what());
        std::fflush(stdout);
      }
    }
    throw;
  }
  std::puts("went on");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view failure = argc > 1 ? argv[1] : "";
  if (failure != "throws_in_a_scope") {
    return moe::mpi::run(&argc, &argv, [&] { return train(failure); });
  }
  try {
    const moe::mpi::Environment environment(&argc, &argv);
    try {
      return train(failure);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      throw;  // out of the environment's scope, which ends the others
    }
  } catch (...) {
    return 1;
  }
}
