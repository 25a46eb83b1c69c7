#pragma once

#include <stdexcept>
#include <string>

namespace moe::mpi {

/// Thrown by all ranks of a Communicator with the same text: if they made different calls, or if
/// one of them failed; then with the message of that rank.
class Error : public std::runtime_error {
 public:
  /// An error with this text on rank `rank` of `size`.
  Error(const std::string& text, int rank, int size)
      : std::runtime_error(text), rank_(rank), size_(size) {}

  int rank() const { return rank_; }  ///< this rank
  int size() const { return size_; }  ///< the number of ranks that throw it

 private:
  int rank_;
  int size_;
};

}  // namespace moe::mpi
