// A program whose rank 1 goes wrong in the way that the first argument says, while the others want to
// train, to gather a checkpoint, to exchange rows, or to end. The second is the timeout in seconds.

#include <mpi.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string_view>

#include "moe/moe.hpp"
#include "moe/mpi/checkpoint.hpp"
#include "moe/mpi/environment.hpp"
#include "moe/mpi/expert_parallel.hpp"

namespace {

/// What becomes of this rank's messages of rows.
enum class Sending { works, loses, stops_after_them };
Sending sending = Sending::works;
bool has_sent = false;

}  // namespace

// The library calls these, and they call MPI.
extern "C" {
int MPI_Isend(const void* data, int count, MPI_Datatype type, int to, int tag,
              MPI_Comm communicator, MPI_Request* request) {
  *request = MPI_REQUEST_NULL;
  if (sending == Sending::loses) return MPI_SUCCESS;
  has_sent = true;
  return PMPI_Isend(data, count, type, to, tag, communicator, request);
}
int MPI_Iallreduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op op,
                   MPI_Comm communicator, MPI_Request* request) {
  if (sending == Sending::stops_after_them && has_sent) std::raise(SIGSTOP);
  return PMPI_Iallreduce(from, to, count, type, op, communicator, request);
}
}

namespace {

using Whole = moe::MoELayer<moe::Expert<moe::FeedForward>>;
using Layer = moe::mpi::ExpertParallel<Whole>;

double timeout = 1;

int train(std::string_view failure) {
  const moe::mpi::Communicator communicator(MPI_COMM_WORLD, failure == "stops" ? timeout : 600);
  const bool fails = communicator.rank() == 1;
  Layer layer({.width = 4, .expert = {.hidden = 8}, .gate = {.experts = 4, .top_k = 2}, .seed = 0},
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
    // The second call does not wait again, and says so.
    try {
      layer.backward(x, tape);
    } catch (const std::runtime_error& again) {
      std::printf("%s, and then: %s\n", error.what(), again.what());
      std::fflush(stdout);
    }
    throw;
  }
  std::puts("went on");
  return 0;
}

/// The others have patience, so that rank 0 is the first to say what it waits for.
moe::mpi::Communicator impatient_root() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return moe::mpi::Communicator(MPI_COMM_WORLD, rank == 0 ? timeout : 5 * timeout);
}

int gather_a_checkpoint(Sending of_rank_1) {
  const auto communicator = impatient_root();
  const Layer::Config config{
      .width = 4, .expert = {.hidden = 8}, .gate = {.experts = 4, .top_k = 2}, .seed = 0};
  Layer layer(config, communicator);
  Whole whole(config);
  if (communicator.rank() == 1) sending = of_rank_1;
  moe::mpi::gather_parameters(layer, communicator.rank() == 0 ? &whole : nullptr, communicator);
  std::puts("went on");
  return 0;
}

/// What MPI may still write to is not the matrix's any more.
int exchange_rows() {
  const auto communicator = impatient_root();
  if (communicator.rank() == 1) sending = Sending::loses;
  moe::Matrix<float> own = moe::Matrix<float>::Ones(3, 4);
  moe::Matrix<float> got = moe::Matrix<float>::Zero(3, 4);
  const int ranks = communicator.size();
  try {
    moe::mpi::RowExchange exchange(communicator);
    exchange.receive(got, 0, 3, (communicator.rank() + 1) % ranks);
    exchange.send(own, 0, 3, (communicator.rank() + ranks - 1) % ranks);
    exchange.wait();
    if (communicator.rank() == 0) std::puts("went on");
  } catch (const std::runtime_error&) {
    std::printf("rank %d has %d and %d rows left\n", communicator.rank(),
                static_cast<int>(own.rows()), static_cast<int>(got.rows()));
    std::fflush(stdout);
    throw;
  }
  communicator.agree("nothing more");
  return 0;
}

int act(std::string_view failure) {
  if (failure == "loses_its_part_of_a_checkpoint") return gather_a_checkpoint(Sending::loses);
  if (failure == "stops_after_its_part_of_a_checkpoint") {
    return gather_a_checkpoint(Sending::stops_after_them);
  }
  if (failure == "loses_rows") return exchange_rows();
  if (failure == "stops_before_the_end") {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    if (rank == 1) std::raise(SIGSTOP);
    return 0;
  }
  return train(failure);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view failure = argc > 1 ? argv[1] : "";
  if (argc > 2) timeout = std::atof(argv[2]);
  if (failure != "throws_in_a_scope") {
    return moe::mpi::run(
        &argc, &argv, [&] { return act(failure); }, 3 * timeout);
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
