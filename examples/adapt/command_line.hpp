#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "../language_model/command_line.hpp"
#include "options.hpp"

/// \file
/// The program's own options, behind those of the base.

namespace adapt {

inline void add_options(CLI::App& app, Options& o) {
  using language_model::at_least;
  language_model::add_training_options(app, o.base);
  // The base is evaluated at its end alone, and a file of it is known by its number of updates.
  for (const char* other : {"--evaluations", "--minutes"}) app.remove_option(app.get_option(other));
  app.add_option("--threads", o.base.threads, "threads; results do not depend on it")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--base", o.base_file,
                 "file of the trained base: read if it is there, else written (safetensors)");
  app.add_option("--new-data", o.new_data,
                 "UTF-8 text files, a document a line, as the new text instead of the Bible")
      ->check(CLI::ExistingFile);
  app.add_option("--updates", o.updates, "updates of each way on the new text")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--ways", o.ways, "which of the ways to adapt it")
      ->check(CLI::IsMember(all_ways()))
      ->capture_default_str();
  app.add_option("--adapt-warm-up", o.warm_up,
                 "updates on the new text during which the learning rate grows")
      ->check(at_least(0))
      ->capture_default_str();
  const auto add_rate = [&](const char* option, double& rate, const char* what) {
    app.add_option(option, rate, std::string("highest learning rate where ") + what)
        ->check(at_least(0))
        ->capture_default_str();
  };
  add_rate("--rate-of-gate", o.gate_rate, "the gate is trained");
  add_rate("--rate-of-lora", o.lora_rate, "adapters on the experts are");
  add_rate("--rate-of-lora-and-gate", o.lora_and_gate_rate, "adapters on experts and gate are");
  add_rate("--rate-of-all", o.all_rate, "all weights are");
  app.add_option("--rank", o.rank, "of the adapters")->check(at_least(1))->capture_default_str();
  app.add_option("--alpha", o.alpha, "of the adapters, which count alpha / rank times")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_flag("!--no-test", o.test, "read the validation parts alone, to choose settings");
}

}  // namespace adapt
