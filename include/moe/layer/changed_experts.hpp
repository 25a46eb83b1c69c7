#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include "moe/experts/expert_change.hpp"
#include "moe/parameter.hpp"
#include "moe/random.hpp"

/// \file
/// The experts of a layer after some were added, copied or removed. They are made before the
/// present ones are changed, so that an exception changes nothing.

namespace moe::detail {

// The sources of a layer's experts after each kind of change. `of` begins the messages of the
// std::invalid_argument they throw.

inline std::vector<Index> same_sources(Index experts) {
  std::vector<Index> sources(to_size(experts));
  for (Index e = 0; e < experts; ++e) sources[to_size(e)] = e;
  return sources;
}
inline std::vector<Index> add_sources(const char* of, Index experts, Index count) {
  require(count >= 1, of, ": count = ", count, ", must be at least 1");
  std::vector<Index> sources = same_sources(experts);
  sources.insert(sources.end(), to_size(count), fresh_source);
  return sources;
}
inline void check_named(const char* of, Index experts, std::span<const Index> named) {
  require(!named.empty(), of, ": must name at least one expert");
  for (const Index e : named) {
    require(e >= 0 && e < experts, of, ": expert = ", e, ", must be at least 0 and below ",
            experts);
  }
}
inline std::vector<Index> copy_sources(const char* of, Index experts,
                                       std::span<const Index> copied) {
  check_named(of, experts, copied);
  std::vector<Index> sources = same_sources(experts);
  sources.insert(sources.end(), copied.begin(), copied.end());
  return sources;
}
inline std::vector<Index> remove_sources(const char* of, Index experts,
                                         std::span<const Index> removed) {
  check_named(of, experts, removed);
  std::vector<Index> sources = same_sources(experts);
  for (const Index e : removed) {
    require(sources[to_size(e)] == e, of, ": expert ", e, " is named twice");
    sources[to_size(e)] = fresh_source;
  }
  std::erase(sources, fresh_source);
  require(!sources.empty(), of, ": no expert would be left of ", experts);
  return sources;
}

/// The random numbers of a change: fresh parameters and the noise of copies.
struct ChangeDraws {
  std::uint64_t seed;
  double noise_stddev = 0;

  void check(const char* of) const {
    require(std::isfinite(noise_stddev) && noise_stddev >= 0, of, ": noise_stddev = ", noise_stddev,
            ", must be finite and at least 0");
  }
};

/// A change of the experts on this rank: makes the new ones, and packs those that move to another rank.
template <class Expert, class Policy>
class ChangedExperts {
 public:
  using Placement = decltype(std::declval<const Policy&>().placement(Index{}));

  /// Packs the experts that leave this rank and makes the new ones. Appends the parameters of the
  /// experts, and their moves, to `change`, which has those of the gate.
  ChangedExperts(const Policy& policy, const Placement& after, const ExpertSources& sources,
                 const typename Expert::Config& config, const ChangeDraws& draws,
                 Index gate_parameters, std::span<const Expert> experts, ExpertChange& change)
      : before_(policy.placement(sources.before())),
        after_(after),
        here_{after.first(policy.rank()), after.count(policy.rank())},
        was_here_{before_.first(policy.rank()), before_.count(policy.rank())},
        sources_(sources),
        draws_(draws),
        sent(to_size(policy.ranks())),
        received(to_size(policy.ranks())) {
    std::vector<Index> first_parameter{gate_parameters};
    for (const Expert& expert : experts) {
      first_parameter.push_back(first_parameter.back() + count_parameters(expert));
    }
    change.parameters_before = first_parameter.back();
    int owner = 0;
    for (Index e = 0; e < sources.experts(); ++e) {
      while (e >= after_.first(owner + 1)) ++owner;
      const Index source = sources[e];
      const bool was_here = is_in(was_here_, source);
      if (is_in(here_, e)) {
        made_.reserve(to_size(here_.count));
        const bool comes = source != fresh_source && !was_here;
        if (source == fresh_source || comes) {
          made_.emplace_back(config, seed_of(e));
        } else if (sources.is_copy(e)) {
          made_.push_back(experts[to_size(source - was_here_.first)]);
        }
        if (sources.is_copy(e) && !comes) add_noise(e, made_.back());
        add_sources_of(was_here ? first_parameter[to_size(source - was_here_.first)] : fresh_source,
                       was_here ? experts[to_size(source - was_here_.first)] : made_.back(),
                       change);
        if (comes) receive(e, change);
      } else if (was_here) {
        send(experts[to_size(source - was_here_.first)], owner,
             first_parameter[to_size(source - was_here_.first)], change);
      }
    }
    result_.reserve(to_size(here_.count));
  }

  /// Reads the parameters that have arrived from other ranks.
  void unpack() {
    std::vector<std::size_t> read(received.size(), 0);
    for (const auto& [e, index, rank] : arriving_) {
      Expert& expert = made_[index];
      auto& at = read[to_size(Index{rank})];
      const char* const bytes = received[to_size(Index{rank})].data();
      walk_parameters(expert, [&](const ParameterName&, auto& p) {
        p.trained = bytes[at++] != 0;
        const std::size_t size = bytes_of(p.value).size();
        if (size > 0) std::memcpy(bytes_of(p.value).data(), bytes + at, size);
        at += size;
      });
      if (sources_.is_copy(e)) add_noise(e, expert);
    }
  }

  /// Replaces `experts` by the experts after the change, moving those that stay. Throws only if moving
  /// an expert does.
  void take(std::vector<Expert>& experts) {
    auto next = made_.begin();
    for (Index e = here_.first; e < here_.first + here_.count; ++e) {
      const Index source = sources_[e];
      if (is_in(was_here_, source) && !sources_.is_copy(e)) {
        result_.push_back(std::move(experts[to_size(source - was_here_.first)]));
      } else {
        result_.push_back(std::move(*next++));
      }
    }
    experts.swap(result_);
  }

 private:
  static bool is_in(Range range, Index e) {
    return e >= range.first && e < range.first + range.count;
  }

  /// The seed of expert e, the same as in the layer's constructor.
  std::uint64_t seed_of(Index e) const {
    return derive_seed(draws_.seed, static_cast<std::uint64_t>(e) + 1);
  }
  void add_noise(Index e, Expert& expert) const {
    add_copy_noise(expert, draws_.noise_stddev, seed_of(e));
  }

  static void add_sources_of(Index first, const Expert& expert, ExpertChange& change) {
    for (Index i = 0; i < count_parameters(expert); ++i) {
      change.parameters.push_back({first == fresh_source ? fresh_source : first + i});
    }
  }
  void send(const Expert& expert, int to, Index first, ExpertChange& change) {
    std::vector<char>& bytes = sent[to_size(Index{to})];
    walk_parameters(expert, [&](const ParameterName&, const auto& p) {
      bytes.push_back(p.trained ? 1 : 0);
      const std::span<const char> value = bytes_of(p.value);
      bytes.insert(bytes.end(), value.begin(), value.end());
      change.sent.push_back({to, first++});
    });
  }
  /// Makes room for the parameters of the expert that was made last.
  void receive(Index e, ExpertChange& change) {
    int from = 0;
    while (sources_[e] >= before_.first(from + 1)) ++from;
    std::vector<char>& bytes = received[to_size(Index{from})];
    auto parameter = static_cast<Index>(change.parameters.size()) - count_parameters(made_.back());
    walk_parameters(made_.back(), [&](const ParameterName&, auto& p) {
      bytes.resize(bytes.size() + 1 + bytes_of(p.value).size());
      change.received.push_back({from, parameter++});
    });
    arriving_.push_back({e, made_.size() - 1, from});
  }

  struct Arriving {
    Index expert;
    std::size_t made;
    int rank;
  };

  Placement before_;
  Placement after_;
  Range here_;
  Range was_here_;
  const ExpertSources& sources_;
  ChangeDraws draws_;
  std::vector<Expert> made_;  ///< this rank's experts that were not here before
  std::vector<Arriving> arriving_;
  std::vector<Expert> result_;

 public:
  std::vector<std::vector<char>> sent;  ///< by rank
  std::vector<std::vector<char>> received;
};

}  // namespace moe::detail
