#pragma once

#include <cstddef>

/// \file
/// How often this program took memory from the heap.

namespace moe::test {

/// Calls of malloc and its relatives by any thread so far, those inside operator new and inside
/// Eigen included; without glibc and without AddressSanitizer, calls of operator new only.
/// Defined in layer/allocation_test.cpp, where the functions are replaced.
std::size_t allocation_count();

/// Lets `count` allocations by operator new or Eigen succeed and makes the one after them fail.
/// Needs can_fail_allocations().
void fail_allocation_after(std::size_t count);
void fail_no_allocation();
bool can_fail_allocations();

/// How many allocations f() makes.
template <class F>
std::size_t allocations_in(F&& f) {
  const std::size_t before = allocation_count();
  f();
  return allocation_count() - before;
}

}  // namespace moe::test
