#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "moe/io/pretrained/mixture.hpp"
#include "moe/io/pretrained/slice.hpp"

/// \file
/// Where the parameters of a layer are in the tensors of its mixture: one table, for reading and for writing.

namespace moe::detail {

/// A parameter and the part of a tensor that has its values.
struct Place {
  std::string parameter;
  Index rows = 0;  ///< of the parameter
  Index columns = 0;
  std::string tensor{};
  std::vector<std::uint64_t> shape{};  ///< of the tensor
  Slice slice{};
};

/// A dimension of a tensor, and the part of it that a parameter takes.
struct Axis {
  Index size = 0;
  Index first = 0;
  Index count = 0;
  Index step = 1;
};
inline Axis whole_axis(Index size) { return {size, 0, size, 1}; }

/// The place of a linear map, in x out. `experts` is 0 for a tensor of one network, otherwise the number of
/// matrices of the tensor, of which this is number `expert`.
inline Place place_of_map(std::string parameter, std::string tensor, Index experts, Index expert,
                          const Axis& in, const Axis& out, bool in_out) {
  const Axis& row = in_out ? in : out;
  const Axis& column = in_out ? out : in;
  Place place{.parameter = std::move(parameter),
              .rows = in.count,
              .columns = out.count,
              .tensor = std::move(tensor),
              .slice = {.first_row = expert * row.size + row.first,
                        .row_step = row.step,
                        .first_column = column.first,
                        .column_step = column.step,
                        .transposed = !in_out}};
  if (experts > 0) place.shape.push_back(static_cast<std::uint64_t>(experts));
  place.shape.push_back(static_cast<std::uint64_t>(row.size));
  place.shape.push_back(static_cast<std::uint64_t>(column.size));
  return place;
}

/// The place of the bias of a linear map, likewise.
inline Place place_of_bias(std::string parameter, std::string tensor, Index experts, Index expert,
                           const Axis& out) {
  Place place{.parameter = std::move(parameter),
              .rows = 1,
              .columns = out.count,
              .tensor = std::move(tensor),
              .slice = {.first_row = expert, .first_column = out.first, .column_step = out.step}};
  if (experts > 0) place.shape.push_back(static_cast<std::uint64_t>(experts));
  place.shape.push_back(static_cast<std::uint64_t>(out.size));
  return place;
}

/// The places of one mixture in one of its layouts.
class MixturePlaces {
 public:
  /// `shared_gate` is whether the layer has a SharedExpertGate.
  MixturePlaces(const io::Mixture& mixture, const io::MixtureTensors& tensors, bool shared_gate)
      : mixture_(mixture),
        tensors_(tensors),
        prefix_(numbered(tensors.prefix, mixture.layer)),
        gate_(shared_gate ? "gate.routed." : "gate.") {}

  const std::string& prefix() const { return prefix_; }

  Place router() const {
    return place_of_map(gate_ + "weight", prefix_ + tensors_.router, 0, 0,
                        whole_axis(mixture_.width), whole_axis(mixture_.gate.experts), false);
  }

  /// The places of all parameters, the router's first.
  std::vector<Place> all() const {
    std::vector<Place> places{router()};
    const Index experts = mixture_.gate.experts;
    const auto add_bias = [&](const char* name, const std::string& tensor) {
      places.push_back(place_of_bias(gate_ + name, prefix_ + tensor, 0, 0, whole_axis(experts)));
    };
    if (mixture_.gate.bias) add_bias("bias", tensors_.router_bias);
    if (mixture_.gate.selection_bias) add_bias("selection_bias", tensors_.selection_bias);
    if (mixture_.shared_gated) {
      places.push_back(place_of_map("gate.shared_weight", prefix_ + tensors_.shared_gate, 0, 0,
                                    whole_axis(mixture_.width), whole_axis(1), false));
    }
    for (Index s = 0; s < mixture_.shared; ++s) {
      add_expert(tensors_.shared, s, 0, 0, {mixture_.shared * mixture_.hidden, s * mixture_.hidden},
                 places);
    }
    for (Index e = 0; e < experts; ++e) {
      add_expert(tensors_.experts, mixture_.shared + e, e, experts, {mixture_.hidden, 0}, places);
    }
    return places;
  }

 private:
  /// The hidden units of an expert in a network that may also have those of other experts.
  struct Hidden {
    Index size = 0;
    Index first = 0;
  };

  /// Adds the places of expert `number` of the layer, which is expert `expert` of `experts` in the tensors.
  void add_expert(const io::ExpertTensors& names, Index number, Index expert, Index experts,
                  const Hidden& hidden, std::vector<Place>& places) const {
    const std::string parameter = "experts." + std::to_string(number) + '.';
    const auto add = [&](const std::string& map, const std::string& name, const std::string& bias,
                         const Axis& in, const Axis& out) {
      const auto matrices = [&](const std::string& tensor) {
        return tensor.find("{}") == std::string::npos ? experts : 0;
      };
      const auto matrix = [&](const std::string& tensor) {
        return matrices(tensor) > 0 ? expert : 0;
      };
      places.push_back(place_of_map(parameter + map + ".weight", prefix_ + numbered(name, expert),
                                    matrices(name), matrix(name), in, out, names.in_out));
      if (mixture_.bias) {
        places.push_back(place_of_bias(parameter + map + ".bias", prefix_ + numbered(bias, expert),
                                       matrices(bias), matrix(bias), out));
      }
    };
    const Axis width = whole_axis(mixture_.width);
    const Axis units{hidden.size, hidden.first, mixture_.hidden, 1};
    Axis gate = units;
    Axis up = units;
    if (names.gate == names.up) {
      const Index step = names.interleaved ? 2 : 1;
      gate = {2 * hidden.size, step * hidden.first, mixture_.hidden, step};
      up = gate;
      up.first += names.interleaved ? 1 : hidden.size;
    }
    if (mixture_.gated) add("gate", names.gate, names.gate_bias, width, gate);
    add("up", names.up, names.up_bias, width, up);
    add("down", names.down, names.down_bias, units, width);
  }

  const io::Mixture& mixture_;
  const io::MixtureTensors& tensors_;
  std::string prefix_;
  std::string gate_;
};

}  // namespace moe::detail
