#pragma once

#include <string>

#include "moe/mpi/error.hpp"

namespace moe::test {

/// The text of the Error that f() throws, or "none".
template <class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const mpi::Error& error) {
    return error.what();
  }
  return "none";
}

}  // namespace moe::test
