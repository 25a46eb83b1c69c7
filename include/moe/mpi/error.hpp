#pragma once

#include <stdexcept>
#include <string>

namespace moe::mpi {

/// Thrown by all ranks of a Communicator alike, with one text: when they disagree on what they do,
/// and when one of them failed, whose message it then has.
class Error : public std::runtime_error {
 public:
  Error(const std::string& text, int rank, int size)
      : std::runtime_error(text), rank_(rank), size_(size) {}

  int rank() const { return rank_; }  ///< this one's, of those that throw it
  int size() const { return size_; }  ///< how many do

 private:
  int rank_;
  int size_;
};

}  // namespace moe::mpi
