#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "moe/experts/expert_change.hpp"
#include "moe/parameter.hpp"

/// \file
/// Keeps the state of an optimizer in step with a layer to which experts were added, copied or removed.

namespace moe::detail {

/// The sources of a model's parameters after a change of the experts of a layer in it. The object
/// refers to the change.
class ModelChange {
 public:
  struct Source {
    Index parameter;                 ///< of the model before, or fresh_source
    std::span<const Index> columns;  ///< see ParameterSource
  };

  /// Throws std::invalid_argument unless the layer is a part of the model and was not changed again after
  /// this change.
  template <class Module, class Layer>
  ModelChange(std::string_view optimizer, const Module& model, const Layer& layer,
              const ExpertChange& change)
      : change_(change) {
    std::vector<const void*> parts;
    walk_parameters(layer, [&](const ParameterName& name, const auto& p) {
      if (p.structure != change.structure) {
        require(false, optimizer, "::follow: ", name.string(),
                " of the layer was not made by this change: call follow() after every change");
      }
      parts.push_back(&p);
    });
    require(parts.size() == change.parameters.size(), optimizer, "::follow: the layer has ",
            parts.size(), " parameters, after this change it had ", change.parameters.size());
    Index found = 0;
    walk_parameters(model, [&](const ParameterName& name, const auto& p) {
      if (found < layer_parameters() && parts[to_size(found)] == &p) {
        if (found++ == 0) first_ = parameters_;
      } else if (found > 0 && found < layer_parameters()) {
        require(false, optimizer, "::follow: ", name.string(),
                " of the model is between the layer's parameters");
      }
      ++parameters_;
    });
    require(found > 0 && found == layer_parameters(), optimizer,
            "::follow: the layer is not part of the model, which has ", found, " of its ",
            parts.size(), " parameters");
  }

  Index parameters() const { return parameters_; }  ///< of the model, now
  Index parameters_before() const {
    return parameters_ - layer_parameters() + change_.parameters_before;
  }
  Source operator[](Index i) const {
    if (i < first_) return {i, {}};
    const Index in_layer = i - first_;
    if (in_layer >= layer_parameters()) return {i - parameters_ + parameters_before(), {}};
    const ParameterSource& source = change_.parameters[to_size(in_layer)];
    if (source.parameter == fresh_source) return {fresh_source, {}};
    return {first_ + source.parameter, source.columns};
  }
  Index first() const { return first_; }  ///< the layer's first parameter

 private:
  Index layer_parameters() const { return static_cast<Index>(change_.parameters.size()); }

  const ExpertChange& change_;
  Index first_ = 0;
  Index parameters_ = 0;
};

/// Calls f(rank, state, parameter) for every move and each of the states of its parameter; `first` is the
/// layer's first parameter.
template <class F, class... States>
void for_each_moved_state(std::span<const ExpertChange::Move> moves, Index first, F&& f,
                          States&... states) {
  for (const ExpertChange::Move& move : moves) {
    (f(to_size(Index{move.rank}), states, first + move.parameter), ...);
  }
}

/// Changes all states of an optimizer, or none if it throws. `known` is what the optimizer knows of
/// the parameters; `states` have after(), remembers(), set_remembered() and bytes_of(). The states
/// of experts that moved to another rank are sent there too: first a flag for each, whether there
/// is a state, so that the receiver knows how much follows.
template <class Module, class Layer, class Known, class... States>
void follow_change(const char* optimizer, const Module& model, const Layer& layer,
                   const ExpertChange& change, const Known& known, States&... states) {
  const auto& policy = layer.dispatch_policy();
  using Bytes = std::vector<std::vector<char>>;  // by rank
  std::tuple<States...> next;
  Bytes sent_flags, received_flags, sent, received;
  Index first = 0;
  const auto for_each_sent = [&](auto&& f) {
    for_each_moved_state(change.sent, first, f, states...);
  };
  const auto for_each_received = [&](auto&& f) {
    std::apply([&](auto&... to) { for_each_moved_state(change.received, first, f, to...); }, next);
  };
  const bool remembers = policy.together(optimizer, [&] {
    const ModelChange model_change(optimizer, model, layer, change);
    first = model_change.first();
    if (known.empty()) return false;
    const auto known_parameters = static_cast<Index>(known.size());
    for (Index i = first; i < std::min(first + change.parameters_before, known_parameters); ++i) {
      require(known[to_size(i)].structure == change.structure_before, optimizer,
              "::follow: follow() was not called for a change before this one");
    }
    require(known_parameters == model_change.parameters_before(), optimizer,
            "::follow: the model had ", model_change.parameters_before(),
            " parameters before the change, ", known_parameters, " at the last update");
    next = std::tuple<States...>(states.after(model, model_change)...);
    for (Bytes* bytes : {&sent_flags, &received_flags, &sent, &received}) {
      bytes->resize(to_size(policy.ranks()));
    }
    for_each_sent([&](std::size_t rank, const auto& state, Index parameter) {
      sent_flags[rank].push_back(state.remembers(parameter) ? 1 : 0);
    });
    for_each_received(
        [&](std::size_t rank, const auto&, Index) { received_flags[rank].push_back(0); });
    return true;
  });
  policy.exchange(optimizer, remembers, sent_flags, received_flags);
  if (!remembers) return;
  policy.together(optimizer, [&] {
    for_each_sent([&](std::size_t rank, auto& state, Index parameter) {
      const std::span<const char> bytes = state.bytes_of(parameter);
      sent[rank].insert(sent[rank].end(), bytes.begin(), bytes.end());
    });
    std::vector<std::size_t> read(received.size(), 0);
    for_each_received([&](std::size_t rank, auto& state, Index parameter) {
      state.set_remembered(parameter, received_flags[rank][read[rank]++] != 0);
      received[rank].resize(received[rank].size() + state.bytes_of(parameter).size());
    });
  });
  policy.exchange(optimizer, true, sent, received);
  std::vector<std::size_t> read(received.size(), 0);
  for_each_received([&](std::size_t rank, auto& state, Index parameter) {
    const std::span<char> bytes = state.bytes_of(parameter);
    if (bytes.empty()) return;
    std::memcpy(bytes.data(), received[rank].data() + read[rank], bytes.size());
    read[rank] += bytes.size();
  });
  std::tie(states...) = std::move(next);
}

}  // namespace moe::detail
