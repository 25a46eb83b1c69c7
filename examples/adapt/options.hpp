#pragma once

#include <cstdint>
#include <moe/moe.hpp>
#include <string>
#include <vector>

#include "../language_model/options.hpp"

/// \file
/// The options of the program.

namespace adapt {

using moe::Index;

/// The model that is adapted and how it is trained on the old text.
inline language_model::Options base_options() {
  language_model::Options o;
  o.mixtures = 1;
  o.hidden = 240;
  o.gated = false;  // the adapters are those of plain experts
  o.noise = 1;
  o.noise_until = 0;
  o.sequences = 128;
  o.steps = 32;
  o.expert_rate = 0.3;
  o.importance_weight = 0.1;
  o.epochs = 0.15;
  o.csv = "adapt.csv";
  return o;
}

/// The ways to adapt a model, in the order of the table.
inline std::vector<std::string> all_ways() { return {"gate", "lora", "lora_and_gate", "all"}; }

struct Options {
  language_model::Options base = base_options();
  std::string base_file;                ///< where the trained base is; empty: nowhere
  std::vector<std::string> new_data{};  ///< empty: the King James Bible
  Index updates = 200;                  ///< of each way
  Index warm_up = 20;
  std::vector<std::string> ways = all_ways();
  // The highest learning rate of each way.
  double gate_rate = 2e-2;
  double lora_rate = 3e-2;
  double lora_and_gate_rate = 3e-2;
  double all_rate = 1e-2;
  // Adapters, on experts and gate alike.
  Index rank = 8;
  double alpha = 16;
  bool test = true;
};

}  // namespace adapt
