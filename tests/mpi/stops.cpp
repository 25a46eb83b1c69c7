// A program that trains until one of its ranks stops or is killed; stops.sh watches how it ends.
//
//     stops FOLDER SEED TIMEOUT
//
// The seed chooses the rank, the signal and the moment: before, in or after one of the calls that the
// ranks wait for each other in, or at any time between. It also chooses whether the others handle the
// time-out and return as if nothing had been. Each rank leaves its process number in FOLDER/RANK, and
// the one that stops the time in FOLDER/stopped, in seconds as /proc/uptime has it.

#include <mpi.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "moe/moe.hpp"
#include "moe/mpi/checkpoint.hpp"
#include "moe/mpi/environment.hpp"
#include "moe/mpi/expert_parallel.hpp"

namespace {

enum class When { before_a_call, after_a_call, at_a_time };

/// What the seed chooses.
struct Stop {
  std::string folder;
  int victim = 0;
  int signal = SIGSTOP;
  When when = When::at_a_time;
  int calls = 0;              ///< of those that start what is waited for
  int polls = 0;              ///< and then of MPI_Testall
  int microseconds = 0;       ///< at_a_time
  bool is_handled = false;    ///< by the other ranks
  bool is_this_rank = false;  ///< the one that stops
  int calls_made = 0;
  int polls_made = 0;

  Stop() = default;
  Stop(const char* to, std::uint64_t seed) : folder(to) {
    std::mt19937_64 random(seed);
    const auto below = [&](std::uint64_t n) { return static_cast<int>(random() % n); };
    int ranks = 1;
    int rank = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    victim = below(static_cast<std::uint64_t>(ranks));
    signal = below(4) == 0 ? SIGKILL : SIGSTOP;
    when = static_cast<When>(below(3));
    calls = 1 + below(400);  // an update is of about 100
    polls = below(4);
    microseconds = below(100'000);
    is_handled = below(2) == 0;
    is_this_rank = rank == victim;
    if (rank == 0) {
      std::printf("seed %llu: rank %d, %s, %s %d, %s\n", static_cast<unsigned long long>(seed),
                  victim, signal == SIGKILL ? "killed" : "stopped",
                  when == When::at_a_time ? "microsecond" : "call",
                  when == When::at_a_time ? microseconds : calls,
                  is_handled ? "handled" : "not handled");
      std::fflush(stdout);
    }
  }

  void act() const {
    std::string uptime;  // a number would lose its hundredths after a day
    std::ifstream("/proc/uptime") >> uptime;
    // Under another name first: who finds the file finds the number in it.
    std::ofstream(folder + "/stopping") << uptime << '\n';
    std::rename((folder + "/stopping").c_str(), (folder + "/stopped").c_str());
    std::raise(signal);
  }
  void count_call(When now) {
    if (!is_this_rank) return;
    if (now == When::before_a_call) ++calls_made;
    if (now != when || calls_made != calls) return;
    if (when == When::before_a_call || polls == 0) act();
  }
  void count_poll() {
    if (!is_this_rank || when != When::after_a_call || calls_made < calls) return;
    if (++polls_made == polls) act();
  }
};

Stop stop;

template <class Call>
int around(Call&& call) {
  stop.count_call(When::before_a_call);
  const int result = call();
  stop.count_call(When::after_a_call);
  return result;
}

}  // namespace

// The library calls these, and they call MPI.
extern "C" {
int MPI_Isend(const void* data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm,
              MPI_Request* request) {
  return around([&] { return PMPI_Isend(data, count, type, to, tag, comm, request); });
}
int MPI_Irecv(void* data, int count, MPI_Datatype type, int from, int tag, MPI_Comm comm,
              MPI_Request* request) {
  return around([&] { return PMPI_Irecv(data, count, type, from, tag, comm, request); });
}
int MPI_Iallreduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op op,
                   MPI_Comm comm, MPI_Request* request) {
  return around([&] { return PMPI_Iallreduce(from, to, count, type, op, comm, request); });
}
int MPI_Ireduce(const void* from, void* to, int count, MPI_Datatype type, MPI_Op op, int root,
                MPI_Comm comm, MPI_Request* request) {
  return around([&] { return PMPI_Ireduce(from, to, count, type, op, root, comm, request); });
}
int MPI_Ibcast(void* data, int count, MPI_Datatype type, int root, MPI_Comm comm,
               MPI_Request* request) {
  return around([&] { return PMPI_Ibcast(data, count, type, root, comm, request); });
}
int MPI_Iallgather(const void* from, int count, MPI_Datatype from_type, void* to, int to_count,
                   MPI_Datatype to_type, MPI_Comm comm, MPI_Request* request) {
  return around([&] {
    return PMPI_Iallgather(from, count, from_type, to, to_count, to_type, comm, request);
  });
}
int MPI_Iallgatherv(const void* from, int count, MPI_Datatype from_type, void* to,
                    const int* counts, const int* offsets, MPI_Datatype to_type, MPI_Comm comm,
                    MPI_Request* request) {
  return around([&] {
    return PMPI_Iallgatherv(from, count, from_type, to, counts, offsets, to_type, comm, request);
  });
}
int MPI_Ialltoallv(const void* from, const int* from_counts, const int* from_offsets,
                   MPI_Datatype from_type, void* to, const int* to_counts, const int* to_offsets,
                   MPI_Datatype to_type, MPI_Comm comm, MPI_Request* request) {
  return around([&] {
    return PMPI_Ialltoallv(from, from_counts, from_offsets, from_type, to, to_counts, to_offsets,
                           to_type, comm, request);
  });
}
int MPI_Comm_idup(MPI_Comm comm, MPI_Comm* duplicate, MPI_Request* request) {
  return around([&] { return PMPI_Comm_idup(comm, duplicate, request); });
}
int MPI_Testall(int count, MPI_Request* requests, int* done, MPI_Status* statuses) {
  stop.count_poll();
  return PMPI_Testall(count, requests, done, statuses);
}
}

namespace {

using Whole = moe::MoELayer<moe::Expert<moe::FeedForward>>;
using Layer = moe::mpi::ExpertParallel<Whole>;

void train(double timeout) {
  const moe::mpi::Communicator communicator(MPI_COMM_WORLD, timeout);
  const Layer::Config config{
      .width = 64, .expert = {.hidden = 32}, .gate = {.experts = 4, .top_k = 2}, .seed = 0};
  Layer layer(config, communicator);
  Whole whole(config);
  moe::Linear<float> head({.inputs = 64, .outputs = 64}, 1);
  moe::Adam<float> adam;
  moe::Matrix<float> x(512, 64);
  moe::fill_normal(x, 1.0f, 1);
  Layer::Tape tape;
  const auto start = std::chrono::steady_clock::now();
  for (std::uint64_t step = 1;; ++step) {
    moe::zero_gradients(layer);
    layer.forward(x, tape, {.step = step});
    layer.backward(x, tape);
    moe::mpi::sum_gradients(head, communicator);
    moe::mpi::clip_gradients(layer, 1.0, communicator);
    adam.update(layer, 0.001);
    // An error on all ranks is reported in calls of its own.
    try {
      communicator.attempt("a failure", [&] {
        if (communicator.rank() == 0) throw std::runtime_error("no luck");
      });
    } catch (const moe::mpi::Error&) {
    }
    moe::mpi::gather_parameters(layer, communicator.rank() == 0 ? &whole : nullptr, communicator);
    moe::mpi::scatter_parameters(communicator.rank() == 0 ? &whole : nullptr, layer, communicator);
    if (std::chrono::steady_clock::now() - start > std::chrono::seconds(30)) {
      throw std::runtime_error("nobody stopped");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const double timeout = std::stod(argv[3]);
  return moe::mpi::run(&argc, &argv, [&] {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    std::ofstream(std::string(argv[1]) + '/' + std::to_string(rank)) << getpid() << '\n';
    MPI_Barrier(MPI_COMM_WORLD);
    stop = Stop(argv[1], std::stoull(argv[2]));
    if (stop.is_this_rank && stop.when == When::at_a_time) {
      std::thread([] {
        std::this_thread::sleep_for(std::chrono::microseconds(stop.microseconds));
        stop.act();
      }).detach();
    }
    try {
      train(timeout);
    } catch (const std::runtime_error& error) {
      if (!stop.is_handled) throw;
      std::fprintf(stderr, "%s\n", error.what());
    }
    return 0;
  });
}
