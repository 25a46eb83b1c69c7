#pragma once

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <moe/moe.hpp>
#include <moe/mpi/communicator.hpp>
#include <moe/mpi/gradients.hpp>
#include <span>

#include "../common/terminal.hpp"
#include "../language_model/corpus.hpp"

/// \file
/// The processes that train one model together, each with its part of every batch.

namespace expert_parallel {

using moe::Index;

/// Collective, but for the first three.
class Ranks {
 public:
  explicit Ranks(const moe::mpi::Communicator& communicator) : communicator_(communicator) {}

  const moe::mpi::Communicator& communicator() const { return communicator_; }
  bool is_root() const { return communicator_.rank() == 0; }

  // What language_model::Contestant requires of those who train it.

  language_model::BatchPart part() const { return {communicator_.rank(), communicator_.size()}; }

  double mean(double value) const {
    communicator_.sum(std::span<double>(&value, 1));
    return value / communicator_.size();
  }

  /// Of the whole model: what every rank has a copy of counts once.
  template <class Module>
  Index parameter_count(const Module& module) const {
    using enum moe::mpi::Residence;
    Index spread = moe::parameter_count(moe::mpi::PartOf<const Module, sharded>(module));
    communicator_.sum(std::span<Index>(&spread, 1));
    return spread +
           moe::parameter_count(moe::mpi::PartOf<const Module, replicated, reduced>(module));
  }

  template <class Module>
  void finish_gradients(Module& module, double largest_norm, moe::Updates updates) const {
    moe::mpi::sum_gradients(module, communicator_);
    moe::mpi::clip_gradients(module, largest_norm, communicator_, updates);
  }

  /// What decides about the next update has to be the same everywhere.
  struct Agreement {
    double seconds;    ///< on rank 0's clock
    bool interrupted;  ///< any rank
  };
  Agreement agree(double seconds) const {
    std::array<double, 2> sums{is_root() ? seconds : 0.0, examples::interrupted ? 1.0 : 0.0};
    communicator_.sum(std::span<double>(sums));
    return {sums[0], sums[1] > 0};
  }

  /// As many threads for each rank of this machine as leave a core to each thread, and not more than
  /// OpenMP would start, which knows of OMP_NUM_THREADS and of the cores that this rank is bound to.
  int default_threads() const {
    MPI_Comm machine = MPI_COMM_NULL;
    MPI_Comm_split_type(communicator_.handle(), MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine);
    int ranks = 1;
    MPI_Comm_size(machine, &ranks);
    MPI_Comm_free(&machine);
    const auto cores = static_cast<Index>(sysconf(_SC_NPROCESSORS_ONLN));
    return static_cast<int>(std::max<Index>(1, std::min(moe::worker_count(), cores / ranks)));
  }

 private:
  moe::mpi::Communicator communicator_;
};

}  // namespace expert_parallel
