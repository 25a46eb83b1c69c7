#pragma once

#include <cstdint>

#include "moe/matrix.hpp"
#include "moe/random.hpp"
#include "moe/routing/choices.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// The random dispatch of [G21, sec. 2.2, "Random routing"]; [G21] is cited in capacity.hpp.

namespace moe::detail {

/// Drops the second of a token's two choices unless a random number in [0, 1) is below 2·w, w being its
/// weight: a choice of small weight would take a place from others. If noise is given, the last number
/// of a row is used instead of a draw.
template <class Scalar>
void drop_second_choices(std::uint64_t seed, const NoiseSource& noise, const ValidTokens& tokens,
                         Choices<Scalar>& choices) {
  for (Index t = 0; t < tokens.count; ++t) {
    const Index row = tokens.row_of(t);
    const Index second = 2 * t + 1;
    const auto draw = static_cast<Scalar>(
        noise.given != nullptr
            ? noise.given[(row + 1) * noise.stride - 1]
            : static_cast<double>(uniform(noise_words(seed, noise.key, row, 0)[0])));
    if (!(draw < Scalar{2} * choices.weight[second])) choices.keeps[second] = 0;
  }
}

}  // namespace moe::detail
