// MPI around the tests, of which every rank runs all, in step. The main program is Catch2's own, compiled already.

#define CATCH_CONFIG_EXTERNAL_INTERFACES
#include "moe/mpi/environment.hpp"

#include <optional>

#include "catch.hpp"
#include "moe/mpi/ending.hpp"

namespace {

#if __has_include(<catch2/catch_all.hpp>)
using Listener = Catch::EventListenerBase;
#else
using Listener = Catch::TestEventListenerBase;
#endif

/// Ends with the program, when what failed has been printed.
class Ranks {
 public:
  Ranks() = default;
  ~Ranks() {
    // A rank that failed may have left the others in a call.
    if (failed_) moe::mpi::end_all_ranks();
  }
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  void start() { environment_.emplace(); }
  void fail() { failed_ = true; }

 private:
  std::optional<moe::mpi::Environment> environment_;
  bool failed_ = false;
};

class StartsRanks : public Listener {
 public:
  using Listener::Listener;

  void testRunStarting(const Catch::TestRunInfo&) override { ranks().start(); }
  void testRunEnded(const Catch::TestRunStats& run) override {
    if (run.totals.assertions.failed > 0) ranks().fail();
  }

 private:
  static Ranks& ranks() {
    static Ranks ranks;
    return ranks;
  }
};

}  // namespace

CATCH_REGISTER_LISTENER(StartsRanks)
