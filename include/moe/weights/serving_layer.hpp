#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/layer/moe_layer.hpp"
#include "moe/weights/bfloat16.hpp"
#include "moe/weights/float16.hpp"
#include "moe/weights/int4.hpp"
#include "moe/weights/int8.hpp"
#include "moe/weights/narrow_feed_forward.hpp"

namespace moe {

namespace detail {

/// Whether a ServingLayer can be made of it.
template <class Layer>
inline constexpr bool is_servable = false;
template <class Gate>
inline constexpr bool is_servable<MoELayer<moe::Expert<FeedForward>, Gate>> = true;

}  // namespace detail

/// A trained layer for inference, with its experts' weights rounded to a narrow format (BFloat16, Float16,
/// Int8, Int4), so that fewer bytes are read. Gate and biases are floats.
///
///     const moe::ServingLayer<decltype(layer), moe::Int8> served(layer);
///     const auto& y = served.evaluate(x, tape);
///
/// With float activations, the default, y is that of a MoELayer with the decoded() weights: to the same bits
/// for BFloat16 and Float16, up to rounding in float for Int8 and Int4. With NarrowOptions.activations = int8
/// products also round the rows of x and the hidden rows, which is faster. In both cases a token's y does not
/// depend on the other tokens of the batch, unless the gate's choice does, nor on the number of threads. A
/// const ServingLayer may be used from several threads at once, each with its own tape.
///
/// `Layer` is a MoELayer of Expert<FeedForward> in float, with LocalDispatch and any gate.
template <class Layer_, detail::NarrowFormat Format_>
class ServingLayer {
  // First, so that a compiler's first error is this one.
  static_assert(detail::is_servable<Layer_>,
                "a ServingLayer is made of a MoELayer of Expert<FeedForward> in float, with "
                "LocalDispatch; of a module around one, such as Residual, take the layer itself");

 public:
  using Layer = Layer_;                                        ///< the trained layer's type
  using Format = Format_;                                      ///< of the weights
  using Gate = typename Layer::Gate;                           ///< that of the layer
  using Scalar = float;                                        ///< the type of x and y
  using Expert = detail::ExpertOf<NarrowFeedForward<Format>>;  ///< an expert with narrow weights

 private:
  using Narrow = MoELayer<Expert, Gate>;

 public:
  using Config = typename Narrow::Config;  ///< as MoELayer's
  using Tape = typename Narrow::Tape;      ///< as MoELayer's

  /// Rounds the weights of a layer, which it does not refer to afterwards. Throws std::invalid_argument,
  /// which names the expert, the weight and the value, if a weight cannot be narrowed, or if the format does
  /// not support options.activations.
  explicit ServingLayer(const Layer& layer, const NarrowOptions& options = {})
      : ServingLayer(
            detail::config_with<Narrow>(layer.config(), layer.config().expert, layer.config().gate),
            layer.gate(), narrowed(layer, options), options) {}

  /// A layer of given narrow experts. `check` is called before each pass: if the experts' memory is that of
  /// a mapped file, it can throw if the file has changed. Throws std::invalid_argument if the experts do
  /// not fit the configuration or the gate.
  ServingLayer(const Config& config, Gate gate, std::vector<Expert> experts,
               const NarrowOptions& options = {}, std::function<void()> check = {})
      : options_(options),
        layer_(config, std::move(gate), std::move(experts)),
        check_(std::move(check)) {}

  /// The configuration of the layer.
  const Config& config() const { return layer_.config(); }
  /// How narrow weights are used.
  const NarrowOptions& options() const { return options_; }
  /// Whether the experts' memory is that of a mapped file, which can change.
  bool is_mapped() const { return check_ != nullptr; }
  /// Throws std::runtime_error if that file has changed. Every pass calls this first.
  void check_weights() const {
    if (check_) check_();
  }
  /// The gate.
  const Gate& gate() const { return layer_.gate(); }
  /// The experts, with narrow weights.
  std::span<const Expert> experts() const { return layer_.experts(); }

  /// As MoELayer::evaluate(): returns y (T x D).
  const Matrix<float>& evaluate(const MatrixRef<float>& x, Tape& tape,
                                const EvaluationPass& pass = {}) const {
    check_weights();
    return layer_.evaluate(x, tape, pass);
  }
  /// The same with a tape of its own, which allocates.
  Matrix<float> evaluate(const MatrixRef<float>& x) const {
    Tape tape;
    return evaluate(x, tape);
  }

  // For training the modules in front of the layer, and its gate if the gate's parameters are
  // `trained`; the experts are frozen. The gradient ignores the rounding of activations.

  /// As MoELayer::forward().
  const Matrix<float>& forward(const MatrixRef<float>& x, Tape& tape, const Pass& pass) const {
    check_weights();
    return layer_.forward(x, tape, pass);
  }
  /// As MoELayer::backward(): returns the gradient with respect to x (T x D) and adds to those of the gate.
  const Matrix<float>& backward(const MatrixRef<float>& dy, Tape& tape) {
    check_weights();
    return layer_.backward(dy, tape);
  }

  /// Bytes of the experts' weights.
  Index weight_bytes() const {
    Index bytes = 0;
    for (const Expert& expert : experts()) {
      NarrowFeedForward<Format>::visit_weights(
          expert.network(),
          [&](std::string_view, const auto& weight) { bytes += weight.matrix.bytes(); });
    }
    return bytes;
  }

  /// The gate's parameters and the experts' biases, with the names that they have in the layer.
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    Narrow::visit_parameters(self.layer_, visit);
  }

 private:
  static std::vector<Expert> narrowed(const Layer& layer, const NarrowOptions& options) {
    std::vector<Expert> experts;
    experts.reserve(layer.experts().size());
    for (const auto& expert : layer.experts()) {
      detail::check_shapes(expert, "ServingLayer: an expert");
      const std::string prefix = "experts." + std::to_string(experts.size()) + ".";
      experts.emplace_back(NarrowFeedForward<Format>(expert.network(), options, prefix),
                           layer.config().width);
    }
    return experts;
  }

  NarrowOptions options_;
  Narrow layer_;
  std::function<void()> check_;
};

namespace detail {

/// Whether it is a ServingLayer.
template <class Layer>
inline constexpr bool is_serving = false;
template <class Layer, NarrowFormat Format>
inline constexpr bool is_serving<ServingLayer<Layer, Format>> = true;

}  // namespace detail

}  // namespace moe
