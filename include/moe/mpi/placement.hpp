#pragma once

#include "moe/matrix.hpp"

/// \file
/// Which rank holds which experts.

namespace moe::mpi {

/// E experts over R ranks, each of which holds neighbours: rank r those from first(r) up to
/// first(r + 1). Experts stay together in units, the groups of a hierarchical gate, and the ranks'
/// numbers of units differ by at most one. Where there are more ranks than units some hold none.
/// `shared` experts in front of the units, which every token uses, are on rank 0.
class Placement {
 public:
  /// Throws std::invalid_argument unless `unit`, at least 1, divides the experts that are not
  /// shared.
  Placement(Index experts, int ranks, Index unit = 1, Index shared = 0)
      : experts_(experts), ranks_(ranks), unit_(unit), shared_(shared) {
    detail::require(ranks >= 1, "Placement: ", ranks, " ranks, must be at least 1");
    detail::require(shared >= 0 && shared <= experts, "Placement: ", shared, " shared of ", experts,
                    " experts");
    detail::require(unit >= 1 && (experts - shared) % unit == 0, "Placement: units of ", unit,
                    " experts do not divide ", experts - shared);
  }

  Index experts() const { return experts_; }
  int ranks() const { return ranks_; }

  Index first(int rank) const {
    return rank == 0 ? 0 : shared_ + (experts_ - shared_) / unit_ * rank / ranks_ * unit_;
  }
  Index count(int rank) const { return first(rank + 1) - first(rank); }

 private:
  Index experts_;
  int ranks_;
  Index unit_;
  Index shared_;
};

}  // namespace moe::mpi
