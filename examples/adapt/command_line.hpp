#pragma once

#include <CLI/CLI.hpp>

#include "../language_model/command_line.hpp"
#include "options.hpp"

/// \file
/// The program's own options, behind those of the base.

namespace adapt {

inline void add_options(CLI::App& app, Options& o) {
  using language_model::at_least;
  language_model::add_training_options(app, o.base);
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
  app.add_option("--all-rate", o.all_rate, "highest learning rate where all weights are trained")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--only-gate-rate", o.gate_rate, "highest learning rate where the gate is")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_flag("!--no-test", o.test, "read the validation parts alone, to choose settings");
}

}  // namespace adapt
