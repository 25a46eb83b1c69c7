#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <moe/moe.hpp>
#include <numeric>
#include <string>
#include <vector>

/// \file
/// Who went where, in words.

namespace inspect {

using moe::Index;

/// What an expert got of a batch.
struct Share {
  Index expert = 0;
  Index tokens = 0;
  double weight = 0;  ///< the sum of its slots' weights
};

/// Of every expert, the one with most tokens first.
inline std::vector<Share> shares(const moe::Routing<float>& routing) {
  std::vector<Share> shares(static_cast<std::size_t>(routing.experts));
  for (std::size_t e = 0; e < shares.size(); ++e) shares[e].expert = static_cast<Index>(e);
  for (Index s = 0; s < routing.slots(); ++s) {
    Share& share = shares[static_cast<std::size_t>(routing.expert[s])];
    ++share.tokens;
    share.weight += static_cast<double>(routing.weight[s]);
  }
  std::stable_sort(shares.begin(), shares.end(),
                   [](const Share& a, const Share& b) { return a.tokens > b.tokens; });
  return shares;
}

/// How an expert is named: "s1" for the second of `shared` shared ones, else its number among the others,
/// as in the model's files.
inline std::string expert_name(Index expert, Index shared) {
  return expert < shared ? "s" + std::to_string(expert) : std::to_string(expert - shared);
}

/// "12 (0.61)  3 (0.39)": a token's experts, the one with the largest weight first.
inline std::string route_of(const moe::Routing<float>& routing, Index token, Index shared) {
  const moe::Range slots = routing.slots_of_token(token);
  std::vector<Index> order(static_cast<std::size_t>(slots.count));
  std::iota(order.begin(), order.end(), slots.first);
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return routing.weight[a] > routing.weight[b]; });
  std::string text;
  for (const Index slot : order) {
    char weight[32];
    std::snprintf(weight, sizeof weight, " (%.3f)", static_cast<double>(routing.weight[slot]));
    text += (text.empty() ? "" : "  ") + expert_name(routing.expert[slot], shared) + weight;
  }
  return text;
}

}  // namespace inspect
