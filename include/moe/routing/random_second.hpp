#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "moe/matrix.hpp"
#include "moe/random.hpp"
#include "moe/routing/choices.hpp"
#include "moe/routing/pass.hpp"

/// \file
/// Two ways in which chance has a part in a token's second choice: it is dropped, the random dispatch of
/// [G21, sec. 2.2, "Random routing"], or it is drawn, as in NLLB-MoE (NLLB Team, "No Language Left Behind",
/// 2022, arXiv 2207.04672) and its code. [G21] is cited in capacity.hpp.

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

/// Draws the second of a token's two choices, `chosen`, from the softmax of its logits over the experts other
/// than the first: the largest logit plus a Gumbel deviate. Experts whose score is -infinity are in no
/// chosen group and are not drawn. The deviates are keyed by (seed, step, first_token + row,
/// expert), or given, from column `first_column` of the row on. Without a finite logit the choice
/// stays.
template <class Scalar>
void draw_second_choice(std::uint64_t seed, const NoiseSource& noise, Index row, Index first_column,
                        Index experts, const Scalar* logits, const Scalar* scores, Index* chosen) {
  constexpr Scalar lowest = -std::numeric_limits<Scalar>::infinity();
  Scalar largest = lowest;
  for (Index first = 0; first < experts; first += 4) {
    const auto words = noise_words(seed, noise.key, row, first / 4);
    for (Index i = first; i < std::min(first + 4, experts); ++i) {
      if (i == chosen[0] || scores[i] == lowest) continue;
      const double deviate = noise.given != nullptr
                                 ? noise.given[row * noise.stride + first_column + i]
                                 : static_cast<double>(standard_gumbel(words[to_size(i - first)]));
      const Scalar noisy = logits[i] + static_cast<Scalar>(deviate);
      if (noisy > largest) {
        largest = noisy;
        chosen[1] = i;
      }
    }
  }
}

}  // namespace moe::detail
