#pragma once

#include "moe/matrix.hpp"

/// \file
/// Which rank has which experts.

namespace moe::mpi {

/// E experts over R ranks: rank r has the experts first(r), ..., first(r + 1) − 1. The experts of a unit,
/// which is a group of a hierarchical gate, are on one rank, and the ranks' numbers of units differ by at
/// most one. If there are more ranks than units, some ranks have none. The first `shared` experts, which
/// get every token and are in no unit, are on rank 0.
class Placement {
 public:
  /// Throws std::invalid_argument unless ranks >= 1, 0 <= shared <= experts, and `unit`, at least 1,
  /// divides experts - shared.
  Placement(Index experts, int ranks, Index unit = 1, Index shared = 0)
      : experts_(experts), ranks_(ranks), unit_(unit), shared_(shared) {
    detail::require(ranks >= 1, "Placement: ", ranks, " ranks, must be at least 1");
    detail::require(shared >= 0 && shared <= experts, "Placement: ", shared,
                    " shared experts, must be from 0 to ", experts, " experts");
    detail::require(unit >= 1 && (experts - shared) % unit == 0, "Placement: units of ", unit,
                    " experts, must be at least 1 and divide ", experts - shared);
  }

  Index experts() const { return experts_; }  ///< E
  int ranks() const { return ranks_; }        ///< R

  /// The first expert of a rank, for `rank` = R the number of experts.
  Index first(int rank) const {
    return rank == 0 ? 0 : shared_ + (experts_ - shared_) / unit_ * rank / ranks_ * unit_;
  }
  /// The number of experts of a rank.
  Index count(int rank) const { return first(rank + 1) - first(rank); }

 private:
  Index experts_;
  int ranks_;
  Index unit_;
  Index shared_;
};

}  // namespace moe::mpi
