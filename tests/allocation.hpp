#pragma once

#include <cstddef>
#include <new>

/// \file
/// How often this program took memory from the heap.

namespace moe::test {

/// Calls of malloc and its relatives by any thread so far, those inside operator new and inside
/// Eigen included; without glibc and without AddressSanitizer, calls of operator new only. With clang
/// and OpenMP always 0: what its OpenMP library takes cannot be told from the rest.
/// Defined in layer/allocation_test.cpp, where the functions are replaced.
std::size_t allocation_count();

/// Lets `count` allocations by operator new or Eigen succeed and makes the one after them fail.
/// Needs can_fail_allocations().
void fail_allocation_after(std::size_t count);
void fail_no_allocation();
bool can_fail_allocations();

/// Makes the allocations of f() fail, first the first one, then the second one, and so on until
/// none fails. Calls check() after each. Returns how many failed.
template <class F, class Check>
std::size_t for_each_failure(F&& f, Check&& check) {
  for (std::size_t failing = 0;; ++failing) {
    test::fail_allocation_after(failing);
    bool failed = false;
    try {
      f();
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    test::fail_no_allocation();
    check();
    if (!failed) return failing;
  }
}

/// How many allocations f() makes.
template <class F>
std::size_t allocations_in(F&& f) {
  const std::size_t before = allocation_count();
  f();
  return allocation_count() - before;
}

}  // namespace moe::test
