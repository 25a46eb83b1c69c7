#pragma once

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "moe/io/pretrained/checkpoint.hpp"
#include "moe/io/pretrained/places.hpp"
#include "moe/io/pretrained/slice.hpp"
#include "moe/io/pretrained/stored_tensor.hpp"
#include "moe/io/safetensors/writer.hpp"
#include "moe/parameter.hpp"

/// \file
/// Reads a layer from the tensors of its mixture, and writes it to them.

namespace moe::detail {

/// The places of a mixture, by the names of the layer's parameters.
class PlacesByParameter {
 public:
  explicit PlacesByParameter(std::vector<Place> places) : places_(std::move(places)) {
    for (const Place& place : places_) by_name_[place.parameter] = &place;
  }
  PlacesByParameter(const PlacesByParameter&) = delete;
  PlacesByParameter& operator=(const PlacesByParameter&) = delete;

  const std::vector<Place>& all() const { return places_; }

  /// Calls f(place, parameter) for each parameter of a layer, or of a part of one, whose names begin with
  /// `prefix`. Throws std::invalid_argument if one has no place or another shape.
  template <class Module, class F>
  void for_each(Module& module, const std::string& prefix, F&& f) const {
    walk_parameters(module, [&](const ParameterName& named, auto& parameter) {
      const std::string name = prefix + named.string();
      const auto found = by_name_.find(name);
      require(found != by_name_.end(), "parameter ", name,
              " of the layer is not one of the mixture's");
      const Place& place = *found->second;
      require(parameter.value.rows() == place.rows && parameter.value.cols() == place.columns,
              "parameter ", name, " of the layer is ", parameter.value.rows(), " x ",
              parameter.value.cols(), ", in the mixture it is ", place.rows, " x ", place.columns);
      f(place, parameter);
    });
  }

 private:
  std::vector<Place> places_;
  std::map<std::string, const Place*> by_name_;
};

/// A mixture in a checkpoint.
class MixtureSource {
 public:
  /// Throws std::runtime_error, which names the file and the tensor, unless the checkpoint has exactly the
  /// tensors of the mixture, in one of its layouts.
  MixtureSource(const io::Checkpoint& checkpoint, const io::Mixture& mixture, bool shared_gate)
      : places_(checked_places(checkpoint, mixture, shared_gate)) {
    const auto stored = [&](const Place& place) {
      return StoredTensor(checkpoint, place.tensor, place.shape, mixture.scale_rows,
                          mixture.scale_columns);
    };
    std::set<std::string> used;
    for (const Place& place : places_.all()) {
      if (tensors_.contains(place.tensor)) continue;
      const StoredTensor& tensor = tensors_.emplace(place.tensor, stored(place)).first->second;
      used.insert(tensor.tensors().begin(), tensor.tensors().end());
    }
    const std::string prefix = MixturePlaces(mixture, layout(checkpoint, mixture), false).prefix();
    for (const std::string& name : checkpoint.names(prefix)) {
      if (used.contains(name)) continue;
      fail_file(checkpoint.file_of(name).path(), tensor_named(name),
                " does not belong to the mixture that config.json describes");
    }
  }

  /// Overwrites the parameters of a layer, or of the part of one whose names begin with `prefix`. Throws
  /// std::invalid_argument, with nothing changed, if a shape differs.
  template <class Module>
  void read(Module& module, const std::string& prefix = {}) const {
    places_.for_each(module, prefix, [](const Place&, const auto&) {});
    places_.for_each(module, prefix, [&](const Place& place, auto& parameter) {
      const StoredTensor& tensor = tensors_.at(place.tensor);
      const auto read_rows = [&](Index first, Index count, auto* to) {
        tensor.read_rows(first, count, to);
      };
      read_slice(place.slice, tensor.columns(), read_rows, parameter.value);
    });
  }

 private:
  /// The first layout whose router and experts the checkpoint has. If there is none, the first: reading it
  /// throws with the name of the missing tensor.
  static const io::MixtureTensors& layout(const io::Checkpoint& checkpoint,
                                          const io::Mixture& mixture) {
    const auto is_there = [&](const io::MixtureTensors& tensors) {
      const std::string prefix = numbered(tensors.prefix, mixture.layer);
      return checkpoint.has(prefix + tensors.router) &&
             checkpoint.has(prefix + numbered(tensors.experts.up, 0));
    };
    const auto found = std::find_if(mixture.layouts.begin(), mixture.layouts.end(), is_there);
    return found == mixture.layouts.end() ? mixture.layouts.front() : *found;
  }

  /// The places of all parameters. The shape of the router is checked first, since the number of
  /// experts in config.json may be far too large to list them.
  static std::vector<Place> checked_places(const io::Checkpoint& checkpoint,
                                           const io::Mixture& mixture, bool shared_gate) {
    const MixturePlaces places(mixture, layout(checkpoint, mixture), shared_gate);
    const Place router = places.router();
    const StoredTensor checked(checkpoint, router.tensor, router.shape, mixture.scale_rows,
                               mixture.scale_columns);
    return places.all();
  }

  PlacesByParameter places_;
  std::map<std::string, StoredTensor> tensors_;
};

/// Adds the tensors of a layer to a file, with the names of its mixture; each tensor is made when
/// it is written.
template <class Layer>
void add_mixture(SafetensorsWriter& writer, const io::Mixture& mixture, const Layer& layer,
                 bool shared_gate) {
  using Values = Matrix<typename Layer::Scalar>;
  struct Tensor {
    std::vector<std::uint64_t> shape;
    std::vector<std::pair<Slice, const Values*>> parts;
  };
  require(!mixture.layouts.empty(), "add_layer: Mixture.layouts is empty");
  const PlacesByParameter places(
      MixturePlaces(mixture, mixture.layouts.front(), shared_gate).all());
  std::map<std::string, Tensor> tensors;
  std::size_t parameters = 0;
  places.for_each(layer, {}, [&](const Place& place, const auto& parameter) {
    ++parameters;
    Tensor& tensor = tensors[place.tensor];
    tensor.shape = place.shape;
    tensor.parts.emplace_back(place.slice, &parameter.value);
  });
  require(parameters == places.all().size(), "the layer has ", parameters,
          " parameters, the mixture ", places.all().size());
  for (auto& [name, tensor] : tensors) {
    const std::pair<Index, Index> size = as_matrix(tensor.shape);
    writer.add_made<typename Layer::Scalar>(name, tensor.shape,
                                            [size, parts = std::move(tensor.parts)] {
                                              Values values(size.first, size.second);
                                              for (const auto& [slice, parameter] : parts)
                                                write_slice(slice, *parameter, values);
                                              return values;
                                            });
  }
}

}  // namespace moe::detail
