#pragma once

#include <array>
#include <cstdio>
#include <moe/mpi/communicator.hpp>
#include <moe/mpi/placement.hpp>
#include <span>
#include <string>
#include <vector>

#include "../common/terminal.hpp"
#include "ranks.hpp"

/// \file
/// What the ranks' talk costs.

namespace expert_parallel {

/// The time of this rank's updates, and its traffic in them; evaluations are left out.
class Meter {
 public:
  explicit Meter(const Ranks& ranks) : traffic_(ranks.communicator().traffic()) {}

  template <class F>
  void measure(F&& update) {
    const moe::mpi::Traffic before = traffic_;
    const double start = examples::seconds_now();
    update();
    seconds_ += examples::seconds_now() - start;
    communication_ += traffic_.seconds - before.seconds;
    row_bytes_ += static_cast<double>(traffic_.row_bytes - before.row_bytes);
  }

  double seconds() const { return seconds_; }
  double communication() const { return communication_; }  ///< seconds
  double row_bytes() const { return row_bytes_; }

 private:
  const moe::mpi::Traffic& traffic_;
  double seconds_ = 0;
  double communication_ = 0;
  double row_bytes_ = 0;
};

/// A table with a line for each rank. `slots`: those of a rank's tokens in all updates. Collective.
inline void print_communication(const Ranks& ranks, const Meter& meter,
                                const moe::mpi::Placement& placement, double slots) {
  const auto count = static_cast<std::size_t>(placement.ranks());
  using Figures = std::array<double, 3>;
  const Figures own{meter.seconds(), meter.communication(), meter.row_bytes()};
  std::vector<double> all(count * own.size());
  const std::vector<Index> counts(count, static_cast<Index>(own.size()));
  ranks.communicator().gather(std::span<const double>(own), std::span<const Index>(counts),
                              std::span<double>(all));
  if (!ranks.is_root()) return;
  std::puts(
      "\n| rank |   experts | seconds of updates | of them communication | bytes sent a slot |\n"
      "| ---: | --------: | -----------------: | --------------------: | ----------------: |");
  for (int rank = 0; rank < placement.ranks(); ++rank) {
    const double* figures = all.data() + static_cast<std::size_t>(rank) * own.size();
    const Index first = placement.first(rank);
    const Index experts = placement.count(rank);
    const std::string range =
        experts == 0 ? "none"
                     : std::to_string(first) + " to " + std::to_string(first + experts - 1);
    std::printf("| %4d | %9s | %18.1f | %19.1f %% | %17.0f |\n", rank, range.c_str(), figures[0],
                figures[0] > 0 ? 100 * figures[1] / figures[0] : 0.0,
                slots > 0 ? figures[2] / slots : 0.0);
  }
}

}  // namespace expert_parallel
