#pragma once

#include <moe/adapt/lora.hpp>
#include <moe/moe.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "adaptation.hpp"
#include "options.hpp"

/// \file
/// The ways to adapt the base: what is trained in each.

namespace adapt {

/// The mixture of the base with adapters on its experts, and with some on its gate too.
using LoraExperts = language_model::Mixture<Gate, moe::MoELayer<moe::Lora<moe::FeedForward>, Gate>>;
using LoraBoth =
    language_model::Mixture<Gate, moe::MoELayer<moe::Lora<moe::FeedForward>, moe::LoraGate<Gate>>>;

/// Of the parameters that are trained, freezes those whose names `chosen` is false for.
template <class Module, class Predicate>
void train_only(Module& module, Predicate chosen) {
  moe::for_each_parameter(module, [&](const std::string& name, auto& parameter) {
    parameter.trained = parameter.trained && chosen(std::string_view(name));
  });
}

/// The base with another layer in the middle, of which only the adapters are trained.
template <class Middle, class Layer>
Model<Middle> with_adapters(const Model<Base>& base, Layer layer) {
  Model<Middle> model(base, Middle(base.middle(), std::move(layer)));
  train_only(model, [](std::string_view name) { return name.find(".lora_") < name.size(); });
  return model;
}

/// Calls f(way, model) with the model that the way trains, and what is not trained in it frozen.
template <class F>
void with_way(const std::string& way, const Model<Base>& base, const Options& o, F&& f) {
  const auto& layer = base.middle().layer();
  const moe::Seed seed{moe::derive_seed(o.base.seed, 10)};
  const moe::LoraConfig lora{.rank = o.rank, .alpha = o.alpha};
  if (way == "gate") {
    Model<Base> model = base;
    train_only(model, [](std::string_view name) { return name.starts_with("middle.gate."); });
    f(Way{"the gate", o.gate_rate, false}, std::move(model));
  } else if (way == "lora") {
    f(Way{"LoRA on experts", o.lora_rate, false},
      with_adapters<LoraExperts>(base, moe::adapt(layer, lora, seed)));
  } else if (way == "lora_and_gate") {
    const moe::LoraGateConfig gate{.rank = o.rank, .alpha = o.alpha};
    f(Way{"LoRA on experts and gate", o.lora_and_gate_rate, false},
      with_adapters<LoraBoth>(base, moe::adapt(layer, lora, gate, seed)));
  } else {
    f(Way{"all weights", o.all_rate, o.base.factored}, base);
  }
}

}  // namespace adapt
