#pragma once

#include <span>

#include "moe/indexed_vector.hpp"
#include "moe/mpi/communicator.hpp"
#include "moe/routing/shared_batch.hpp"

/// \file
/// The batch that the ranks share.

namespace moe::mpi {

/// How many rows every rank has, and how many of them are tokens.
struct RankBatch {
  IndexedVector<Index> rank_rows;    ///< R
  IndexedVector<Index> rank_tokens;  ///< R
  Index rows = 0;                    ///< of all ranks
  Index first_row = 0;               ///< this rank's first one among them
  Index tokens = 0;                  ///< of all ranks: rows that are no padding
  Index first_token = 0;             ///< this rank's first one among them

  void resize(int ranks) {
    detail::resize(rank_rows, ranks);
    detail::resize(rank_tokens, ranks);
  }
  /// `numbers` are the rows and the tokens of each rank, 2·R.
  void set(std::span<const Index> numbers, int rank) {
    rows = first_row = tokens = first_token = 0;
    for (std::size_t r = 0; r < rank_rows.size(); ++r) {
      if (static_cast<int>(r) == rank) {
        first_row = rows;
        first_token = tokens;
      }
      rows += rank_rows[r] = numbers[2 * r];
      tokens += rank_tokens[r] = numbers[2 * r + 1];
    }
  }
};

/// A SharedBatch over the ranks of a communicator; refers to both.
class SharedOverRanks final : public SharedBatch {
 public:
  SharedOverRanks(const Communicator& communicator, const RankBatch& batch)
      : communicator_(communicator), batch_(batch) {}

  Index rows() const override { return batch_.rows; }
  Index first_row() const override { return batch_.first_row; }
  Index tokens() const override { return batch_.tokens; }
  Index first_token() const override { return batch_.first_token; }
  void sum(std::span<float> numbers) const override { communicator_.sum(numbers); }
  void sum(std::span<double> numbers) const override { communicator_.sum(numbers); }
  void sum(std::span<Index> numbers) const override { communicator_.sum(numbers); }
  void prefix(std::span<Index> numbers) const override { communicator_.prefix(numbers); }
  void sum_agreed(std::span<Index> numbers) const override { communicator_.sum_agreed(numbers); }
  void prefix_agreed(std::span<Index> numbers) const override {
    communicator_.prefix_agreed(numbers);
  }

 private:
  const Communicator& communicator_;
  const RankBatch& batch_;
};

}  // namespace moe::mpi
