#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "moe/experts/feed_forward.hpp"
#include "moe/weights/narrow_gemm.hpp"
#include "moe/weights/narrow_weight.hpp"

namespace moe {

/// A FeedForward with narrow weights and biases of floats. Its results are those of a FeedForward with
/// the decoded weights, as NarrowMatrix says, unless activations are rounded. Its weights are not trained,
/// but it has the gradients with respect to x and to the slots' weights.
template <detail::NarrowFormat Format>
class NarrowFeedForward : public detail::FeedForwardPasses<float, detail::NarrowWeight<Format>> {
  using Base = detail::FeedForwardPasses<float, detail::NarrowWeight<Format>>;

 public:
  using typename Base::Config;
  using typename Base::Scalar;
  static constexpr bool has_narrow_weights = true;  ///< which are no parameters

  /// Rounds the weights of a network. Throws std::invalid_argument, with `prefix` and the name of the
  /// weight, if one cannot be narrowed, or if the format does not support options.activations.
  explicit NarrowFeedForward(const FeedForward<float>& network, const NarrowOptions& options = {},
                             const std::string& prefix = {})
      : Base(network.config()) {
    FeedForward<float>::visit_parameters(
        network, [&](std::string_view name, const Parameter<float>& from) {
          visit_weights(*this, [&](std::string_view weight, auto& to) {
            if (weight == name) to = {from.value, prefix + std::string(name), options};
          });
          visit_parameters(*this, [&](std::string_view bias, Parameter<float>& to) {
            if (bias == name) to.value = from.value;
          });
        });
    freeze();
  }

  /// A network of given weights: weight(name, rows, columns) returns a NarrowMatrix and bias(name, size) a
  /// Matrix of one row, of these sizes. Throws std::invalid_argument for a configuration out of
  /// range, or if the format does not support options.activations.
  template <class WeightOf, class BiasOf>
  NarrowFeedForward(const Config& config, const NarrowOptions& options, WeightOf&& weight,
                    BiasOf&& bias)
      : Base(config) {
    visit_weights(*this, [&](std::string_view name, auto& to) {
      const bool is_down = name == "down.weight";
      to = {weight(name, is_down ? config.hidden : config.width,
                   is_down ? config.width : config.hidden),
            options};
    });
    visit_parameters(*this, [&](std::string_view name, Parameter<float>& to) {
      to.value = bias(name, to.size());
    });
    freeze();
  }

  /// Multiply-adds of a row.
  Index row_work() const {
    Index work = 0;
    visit_weights(*this, [&](std::string_view, const auto& weight) {
      work += weight.matrix.rows() * weight.matrix.cols();
    });
    return work;
  }

  /// Copies the weights into memory of their own, for example out of a mapped file.
  void own_weights() {
    visit_weights(*this, [](std::string_view, auto& weight) { weight.matrix.own(); });
  }

  /// The biases.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Base::visit_parts(self, [&](std::string_view name, auto& part) {
      if constexpr (detail::is_parameter<std::remove_cvref_t<decltype(part)>>) visit(name, part);
    });
  }
  /// Calls visit(name, weight) for each weight, whose `matrix` is a NarrowMatrix.
  template <class Self, class Visitor>
  static void visit_weights(Self& self, Visitor visit) {
    Base::visit_parts(self, [&](std::string_view name, auto& part) {
      if constexpr (!detail::is_parameter<std::remove_cvref_t<decltype(part)>>) visit(name, part);
    });
  }

 private:
  void freeze() {
    visit_parameters(*this, [](std::string_view, Parameter<float>& bias) { bias.trained = false; });
  }
};

}  // namespace moe
