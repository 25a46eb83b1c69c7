/// What does it cost that tokens meet on the machines where their experts are?
///
/// Run by mpirun, a core a rank; a row uses the first of these ranks. Every rank has as many tokens and
/// experts as one alone would have, so without any cost its time would stay the same. In turns:
/// `alone`, a MoELayer on rank 0, the others asleep; `apart`, one on every rank at once, which shows what
/// ranks on one machine take from each other's memory; and the row itself, an ExpertParallel over all ranks, of which each slot
/// leaves its rank with probability (R - 1)/R. `weak_scaling` is alone over the row's time, `of_apart`
/// apart over it, `percent_exchange` the share of it in which a rank waits for others or moves rows.
/// `wire_bytes` is what a slot that leaves takes each way, `wire_over_rows` the same over D numbers.

#include <unistd.h>

#include <algorithm>
#include <memory>
#include <moe/mpi/environment.hpp>
#include <moe/mpi/expert_parallel.hpp>

#include "measure.hpp"
#include "progress.hpp"

namespace {

using bench::Index;
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
using Parallel = moe::mpi::ExpertParallel<Layer>;
using moe::mpi::Communicator;

constexpr Index experts_a_rank = 8;
constexpr Index top_k = 2;
constexpr int rounds = 7;

struct Row {
  bool backward;
  Index tokens;  ///< of a rank
  Index width;
  Index hidden;
  int ranks;
};

/// A pass over the same tokens again and again, of either layer.
template <class L>
class Pass {
 public:
  Pass(L layer, const Row& row)
      : layer_(std::move(layer)),
        backward_(row.backward),
        x_(bench::random_matrix<float>(row.tokens, row.width, 1)),
        dy_(bench::random_matrix<float>(row.tokens, row.width, 2)) {}

  void operator()() {
    if (backward_) moe::zero_gradients(layer_, moe::Updates::lazy);
    layer_.forward(x_, tape_, {.step = 1});
    if (backward_) layer_.backward(dy_, tape_);
  }

  const typename L::Tape& tape() const { return tape_; }

 private:
  L layer_;
  bool backward_;
  moe::Matrix<float> x_;
  moe::Matrix<float> dy_;
  typename L::Tape tape_;
};

Layer::Config config_of(const Row& row, int ranks) {
  return {.width = row.width,
          .expert = {.hidden = row.hidden},
          .gate = {.experts = experts_a_rank * ranks, .top_k = top_k},
          .seed = 1};
}

template <class F>
double seconds_of(F&& f) {
  const double start = bench::seconds_now();
  f();
  return bench::seconds_now() - start;
}

/// The time of the slowest rank.
double slowest(const Communicator& communicator, double seconds) {
  const auto all = communicator.gather(static_cast<Index>(seconds * 1e9));
  return static_cast<double>(*std::max_element(all.begin(), all.end())) * 1e-9;
}

/// Waits for all ranks without taking a core from them.
void wait_asleep(const Communicator& communicator) {
  MPI_Request request;
  MPI_Ibarrier(communicator.handle(), &request);
  for (int done = 0;;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done != 0) return;
    usleep(200);
  }
}

/// The first `ranks` of the program's, to themselves; nothing on the others.
std::unique_ptr<Communicator> first_ranks(const Communicator& world, int ranks) {
  MPI_Comm some = MPI_COMM_NULL;
  MPI_Comm_split(world.handle(), world.rank() < ranks ? 0 : MPI_UNDEFINED, 0, &some);
  if (some == MPI_COMM_NULL) return nullptr;
  auto communicator = std::make_unique<Communicator>(some);
  MPI_Comm_free(&some);
  return communicator;
}

void exchange(benchmark::State& state, const Row& row) {
  const Communicator world;
  const auto group = first_ranks(world, row.ranks);
  bench::use_threads(1);
  Pass<Layer> one(Layer(config_of(row, 1)), row);
  std::unique_ptr<Pass<Parallel>> all;
  if (group) {
    all = std::make_unique<Pass<Parallel>>(Parallel(config_of(row, row.ranks), *group), row);
    (*all)();
  }
  one();

  double alone = 1e9;
  double apart = 1e9;
  double together = 1e9;
  moe::mpi::Traffic traffic;
  for (int round = 0; round < rounds; ++round) {
    const auto turn = [&](double& best, bool takes_part, auto& pass) {
      wait_asleep(world);
      const double seconds = takes_part ? seconds_of(pass) : 0;
      wait_asleep(world);
      const double slowest_rank = slowest(world, seconds);
      const bool better = slowest_rank < best;
      if (better) best = slowest_rank;
      return better;
    };
    turn(alone, world.rank() == 0, one);
    turn(apart, world.rank() < row.ranks, one);
    if (group) group->traffic() = {};
    const auto pass = [&] { (*all)(); };
    if (turn(together, group != nullptr, pass) && group) traffic = group->traffic();
  }

  const bench::Shape shape{.tokens = row.tokens,
                           .width = row.width,
                           .hidden = row.hidden,
                           .experts = experts_a_rank,
                           .top_k = top_k};
  bench::report<float>(state, together,
                       row.backward ? bench::step_work<float>(shape, experts_a_rank)
                                    : bench::forward_work<float>(shape, experts_a_rank),
                       1);
  state.counters["ms_alone"] = alone * 1e3;
  state.counters["ms_apart"] = apart * 1e3;
  state.counters["weak_scaling"] = alone / together;
  state.counters["of_apart"] = apart / together;
  state.counters["percent_exchange"] = 100 * traffic.seconds / together;
  if (!group || row.ranks == 1) return;
  // What left comes back, and what came goes back, so a rank sends both.
  const auto ways = static_cast<double>(
      (all->tape().exchange.sent.back() + all->tape().exchange.received.back()) *
      (row.backward ? 2 : 1));
  const double bytes = static_cast<double>(traffic.row_bytes + traffic.other_bytes) / ways;
  state.counters["wire_bytes"] = bytes;
  state.counters["wire_over_rows"] = bytes / static_cast<double>(row.width * Index{sizeof(float)});
}

void add_rows(int ranks) {
  for (const bool backward : {false, true}) {
    for (const auto& [width, hidden] :
         {std::pair<Index, Index>{512, 2048}, {256, 512}, {512, 128}}) {
      for (int r = 1; r <= ranks; r *= 2) {
        const Row row{backward, 2048, width, hidden, r};
        const std::string name = std::string(backward ? "step" : "forward") +
                                 "/T:" + std::to_string(row.tokens) +
                                 "/D:" + std::to_string(width) + "/H:" + std::to_string(hidden) +
                                 "/ranks:" + std::to_string(r);
        bench::row(benchmark::RegisterBenchmark(
            name.c_str(), [row](benchmark::State& state) { exchange(state, row); }));
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return moe::mpi::run(&argc, &argv, [&] {
    int rank = 0;
    int ranks = 1;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &ranks);
    add_rows(ranks);
    // All ranks take part in a row, so all of them read which rows the arguments choose.
    return bench::run(argc, argv, rank != 0);
  });
}
