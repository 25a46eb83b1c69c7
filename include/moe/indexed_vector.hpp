#pragma once

#include <concepts>
#include <cstddef>
#include <vector>

/// \file
/// A std::vector that is indexed by any integer type.

namespace moe {

/// A std::vector whose operator[] takes any integer type. Index is signed, and lists of tokens, slots
/// and experts are indexed by it everywhere; a cast at each place would hide what is computed there.
/// Everything else is std::vector's.
template <class Value>
class IndexedVector : public std::vector<Value> {
 public:
  using std::vector<Value>::vector;
  /// A copy of a vector.
  IndexedVector(const std::vector<Value>& values)  // NOLINT(google-explicit-constructor)
      : std::vector<Value>(values) {}

  /// Element i, which is not checked.
  template <std::integral Integer>
  decltype(auto) operator[](Integer i) {
    return std::vector<Value>::operator[](static_cast<std::size_t>(i));
  }
  /// Element i, which is not checked.
  template <std::integral Integer>
  decltype(auto) operator[](Integer i) const {
    return std::vector<Value>::operator[](static_cast<std::size_t>(i));
  }
};

}  // namespace moe
