// A program whose rank 1 goes wrong in the way that the argument says, while the others want to train.

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string_view>

#include "moe/moe.hpp"
#include "moe/mpi/environment.hpp"
#include "moe/mpi/expert_parallel.hpp"

namespace {

using Layer = moe::mpi::ExpertParallel<moe::MoELayer<moe::Expert<moe::FeedForward>>>;

void train(std::string_view failure) {
  const moe::mpi::Communicator communicator(MPI_COMM_WORLD, failure == "stops" ? 2 : 600);
  Layer layer({.width = 4, .expert = {.hidden = 8}, .gate = {.experts = 4, .active = 2}},
              communicator);
  moe::Matrix<float> x(8, 4);
  moe::fill_normal(x, 1.0f, 1);
  Layer::Tape tape;
  layer.forward(x, tape, {.step = 1});
  if (communicator.rank() == 1) {
    if (failure == "stops") return;
    throw std::runtime_error("rank 1 has had enough");
  }
  layer.backward(x, tape);
  std::puts("went on");
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view failure = argc > 1 ? argv[1] : "";
  try {
    moe::mpi::Environment environment(&argc, &argv);
    if (failure == "throws_in_main") {
      train(failure);
      return 0;
    }
    try {
      train(failure);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      std::fflush(stdout);
      throw;  // it is the Environment that ends the others
    }
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
