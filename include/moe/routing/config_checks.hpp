#pragma once

#include <cmath>
#include <limits>
#include <string_view>

#include "moe/matrix.hpp"

/// \file
/// Checks of the configurations of gates and layers. All throw std::invalid_argument; `gate` is the class in
/// the message.

namespace moe::detail {

inline void check_at_least_one(const char* gate, const char* field, Index value) {
  require(value >= 1, gate, "::Config.", field, " = ", value, ", must be at least 1");
}

/// Checks that 1 <= value <= limit; `limit_name` names the field that is the limit.
inline void check_choice(const char* gate, const char* field, Index value, const char* limit_name,
                         Index limit) {
  require(value >= 1 && value <= limit, gate, "::Config.", field, " = ", value,
          ", must be from 1 to ", limit_name, " = ", limit);
}

/// Checks that the product of two numbers, both at least 1, is a possible number of experts. An
/// Index must hold a few times that number, since a pass sums three numbers of each expert over
/// processes.
inline void check_product(const char* gate, const char* first_name, Index first,
                          const char* second_name, Index second) {
  require(first <= std::numeric_limits<Index>::max() / 8 / second, gate, "::Config.", first_name,
          " = ", first, " times ", second_name, " = ", second, " are too many experts");
}

/// Checks that a value is finite and at least 0; `field` includes its struct, as in
/// "Config.z_loss_weight".
inline void check_at_least_zero(const char* gate, const char* field, double value) {
  require(std::isfinite(value) && value >= 0, gate, "::", field, " = ", value,
          ", must be finite and at least 0");
}

/// Gives a part of a configuration the width `width` if its own is 0. Throws std::invalid_argument,
/// which names the part after `config`, if its own is neither 0 nor `width`.
template <class Width>
void complete_width(std::string_view config, std::string_view part, Index width, Width& of_part) {
  if (of_part == 0) of_part = width;
  require(of_part == width, config, "::Config.", part, ".width = ", of_part,
          ", must be 0 or Config.width = ", width);
}

}  // namespace moe::detail
