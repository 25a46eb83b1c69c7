#pragma once

#include <stdexcept>

namespace moe::mpi {

/// Thrown by all ranks of a Communicator alike, with one text: when they disagree on what they do,
/// and when one of them failed, whose message it then has.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace moe::mpi
