#pragma once

#include <concepts>
#include <cstddef>
#include <vector>

/// \file
/// A std::vector that takes an Index.

namespace moe {

/// A std::vector whose elements are reached by numbers of any integer type: lists of tokens, slots
/// and experts are full of Index, which is signed, and a conversion at every place would hide what
/// the place says. Everything else is std::vector's.
template <class Value>
class IndexedVector : public std::vector<Value> {
 public:
  using std::vector<Value>::vector;
  IndexedVector(const std::vector<Value>& values)  // NOLINT(google-explicit-constructor)
      : std::vector<Value>(values) {}

  template <std::integral Integer>
  decltype(auto) operator[](Integer i) {
    return std::vector<Value>::operator[](static_cast<std::size_t>(i));
  }
  template <std::integral Integer>
  decltype(auto) operator[](Integer i) const {
    return std::vector<Value>::operator[](static_cast<std::size_t>(i));
  }
};

}  // namespace moe
