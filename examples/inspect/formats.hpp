#pragma once

#include <algorithm>
#include <moe/moe.hpp>
#include <moe/weights/serving_layer.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/terminal.hpp"

/// \file
/// How fast a layer serves a batch in each format of its weights, and what rounding them changes.

namespace inspect {

using moe::Index;

/// A batch served in one format.
struct Served {
  std::string format;
  Index bytes = 0;        ///< of the experts' weights
  double seconds = 0;     ///< of a pass, the shortest of several
  double difference = 0;  ///< ‖y − y of floats‖ / ‖y of floats‖
  std::string refusal{};  ///< why the weights cannot be rounded to this format; empty if they can
};

/// The formats by name, in the order of the table.
inline std::vector<std::string> all_formats() {
  return {"float", "bfloat16", "float16", "int8", "int8+int8", "int4", "int4+int8"};
}

/// The shortest of some passes over x, in seconds. The first is not counted, since it takes memory.
template <class Layer>
double seconds_of_pass(const Layer& layer, const moe::Matrix<float>& x,
                       typename Layer::Tape& tape) {
  layer.evaluate(x, tape);
  double best = 1e30;
  for (int round = 0; round < 3; ++round) {
    const double start = examples::seconds_now();
    layer.evaluate(x, tape);
    best = std::min(best, examples::seconds_now() - start);
  }
  return best;
}

template <class Format, class Layer>
Served serve_narrow(std::string name, const Layer& layer, const moe::Matrix<float>& x,
                    const moe::Matrix<float>& y, moe::Activations activations) {
  using Narrow = moe::ServingLayer<Layer, Format>;
  Served served{.format = std::move(name)};
  try {
    const Narrow narrow(layer, {.activations = activations});
    typename Narrow::Tape tape;
    served.bytes = narrow.weight_bytes();
    served.seconds = seconds_of_pass(narrow, x, tape);
    served.difference = static_cast<double>((tape.y - y).norm() / y.norm());
  } catch (const std::invalid_argument& error) {
    served.refusal = error.what();
  }
  return served;
}

/// x (T x D) served by a layer in one of all_formats(). "+int8" rounds the rows of x and the hidden rows to 8
/// bits too. `y` is that of the layer.
template <class Layer>
Served serve(const std::string& format, const Layer& layer, const moe::Matrix<float>& x,
             const moe::Matrix<float>& y) {
  const auto activations =
      format.ends_with("+int8") ? moe::Activations::int8 : moe::Activations::float32;
  if (format == "bfloat16") return serve_narrow<moe::BFloat16>(format, layer, x, y, activations);
  if (format == "float16") return serve_narrow<moe::Float16>(format, layer, x, y, activations);
  if (format.starts_with("int8")) return serve_narrow<moe::Int8>(format, layer, x, y, activations);
  if (format.starts_with("int4")) return serve_narrow<moe::Int4>(format, layer, x, y, activations);
  Served served{.format = format};
  for (const auto& expert : layer.experts()) {
    moe::for_each_parameter(expert.network(), [&](const std::string& name, const auto& parameter) {
      if (name.ends_with("weight")) served.bytes += 4 * parameter.size();
    });
  }
  typename Layer::Tape tape;
  served.seconds = seconds_of_pass(layer, x, tape);
  return served;
}

}  // namespace inspect
