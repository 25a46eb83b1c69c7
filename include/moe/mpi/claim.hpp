#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <string_view>

#include "moe/matrix.hpp"

/// \file
/// The message in which a rank tells the others which call it makes, and the comparison of these
/// messages.

namespace moe::mpi {

/// A number that must be the same on all ranks, for Communicator::agree().
struct Fact {
  const char* name;    ///< for messages; text that is never freed
  std::int64_t value;  ///< this rank's
};

/// The message of a rank in Communicator::agree().
struct Claim {
  /// The places in `numbers`.
  enum Number : std::size_t { failed, name, count, first_fact };
  static constexpr std::size_t most_facts = 7;  ///< the largest number of facts

  Claim() = default;
  /// `said` is the call; `has_failed` whether this rank failed.
  Claim(const char* said, std::initializer_list<Fact> facts, bool has_failed) {
    MOE_ASSERT(facts.size() <= most_facts);
    numbers[failed] = has_failed ? 1 : 0;
    // A hash of the call's name [FNV-1a], so that two calls differ in a number.
    std::uint64_t hash = 14695981039346656037u;
    for (const char c : std::string_view(said)) {
      hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
    }
    numbers[name] = static_cast<std::int64_t>(hash >> 1);
    numbers[count] = static_cast<std::int64_t>(facts.size());
    std::size_t place = first_fact;
    for (const Fact& fact : facts) numbers[place++] = fact.value;
    const std::string_view text(said);
    text.substr(0, call.size() - 1).copy(call.data(), call.size() - 1);
  }

  std::array<std::int64_t, first_fact + most_facts> numbers{};  ///< by Number
  std::array<char, 40> call{};  ///< the name of the call, cut off if too long, and a 0
};

/// An error message: a rank that disagrees with rank 0, and on what. The names are those of `facts`.
inline std::string disagreement(std::span<const Claim> claims, std::initializer_list<Fact> facts) {
  const auto difference = [&](std::size_t number) -> int {
    for (std::size_t r = 1; r < claims.size(); ++r) {
      if (claims[r].numbers[number] != claims[0].numbers[number]) return static_cast<int>(r);
    }
    return 0;
  };
  const auto call = [&](std::size_t r) { return '"' + std::string(claims[r].call.data()) + '"'; };
  if (const int r = difference(Claim::name); r > 0) {
    return "moe: ranks disagree: rank 0 is in " + call(0) + ", rank " + std::to_string(r) + " in " +
           call(detail::to_size(r));
  }
  std::size_t number = Claim::first_fact;
  for (const Fact& fact : facts) {
    if (const int r = difference(number); r > 0) {
      return "moe: ranks disagree in " + call(0) + ": " + fact.name + " is " +
             std::to_string(claims[0].numbers[number]) + " on rank 0 and " +
             std::to_string(claims[detail::to_size(r)].numbers[number]) + " on rank " +
             std::to_string(r);
    }
    ++number;
  }
  return "moe: ranks disagree in " + call(0);
}

}  // namespace moe::mpi
