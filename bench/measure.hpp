#pragma once

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "machine.hpp"
#include "roofline.hpp"

/// \file
/// How times are taken. Clouds are noisy, and what is compared must have been measured in the same
/// weather, so the parties of a comparison take turns, and the best time of each counts: other
/// programs only ever make one slower. The machine's limits are the best of several tries too.

namespace bench {

/// The shape of a row whose first arguments are T, D, H, E and K.
inline Shape shape_of(const benchmark::State& state) {
  return {.tokens = state.range(0),
          .width = state.range(1),
          .hidden = state.range(2),
          .experts = state.range(3),
          .top_k = state.range(4)};
}

using Party = std::function<void()>;

/// Best seconds of one call of each party. They take turns until each has had `budget` seconds, and
/// three turns at least. A turn is short, so that some of them fall between other programs' turns:
/// one call, or as many as fill a millisecond after one that warms the caches again.
inline std::vector<double> best_seconds(const std::vector<Party>& parties, double budget = 0.5) {
  constexpr double turn = 0.001;
  struct Record {
    int calls;
    double best;
  };
  std::vector<Record> records;
  for (const Party& party : parties) {
    party();  // takes memory
    const double start = seconds_now();
    party();
    const double seconds = seconds_now() - start;
    records.push_back({static_cast<int>(std::clamp(turn / seconds, 1.0, 100000.0)), seconds});
  }
  const double end = seconds_now() + budget * static_cast<double>(parties.size());
  for (int round = 0; round < 2 || seconds_now() < end; ++round) {
    for (std::size_t i = 0; i < parties.size(); ++i) {
      if (records[i].best < 0.02) parties[i]();
      const double start = seconds_now();
      for (int call = 0; call < records[i].calls; ++call) parties[i]();
      records[i].best = std::min(records[i].best, (seconds_now() - start) / records[i].calls);
    }
  }
  std::vector<double> best;
  for (const Record& record : records) best.push_back(record.best);
  return best;
}

inline double best_seconds(const Party& party) { return best_seconds(std::vector{party})[0]; }

/// Makes `seconds` the time of the row, and adds what every row says: GFLOP/s, and the share of the
/// roofline.
template <class Scalar>
void report(benchmark::State& state, double seconds, const Work& work, Index threads) {
  for ([[maybe_unused]] auto _ : state) state.SetIterationTime(seconds);
  state.counters["GFLOPs"] = work.operations / seconds * 1e-9;
  state.counters["roofline_fraction"] = roofline_seconds<Scalar>(work, threads) / seconds;
}

/// Whether less memory is free than the `needed` bytes, if the system says; then the row is skipped.
inline bool lacks_memory(benchmark::State& state, double needed) {
  const double free = free_memory();
  if (free <= 0 || free >= needed) return false;
  const std::string error =
      "needs " + std::to_string(std::llround(needed / 1e9)) + " GB of free memory";
  state.SkipWithError(error.c_str());
  return true;
}

/// The settings of every row. The measuring is done by best_seconds(), once.
inline benchmark::internal::Benchmark* row(benchmark::internal::Benchmark* b) {
  return b->Iterations(1)->UseManualTime()->Unit(benchmark::kMillisecond);
}

}  // namespace bench
