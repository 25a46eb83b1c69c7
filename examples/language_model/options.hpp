#pragma once

#include <cstdint>
#include <moe/moe.hpp>
#include <string>
#include <vector>

/// \file
/// What can be asked of the program.

namespace language_model {

using moe::Index;

struct Options {
  std::vector<std::string> data;
  std::string wordnet = "/usr/share/wordnet";
  Index vocabulary = 8000;
  std::vector<Index> cutoffs{500, 2000};
  Index shrink = 2;
  Index width = 96;
  Index hidden = 96;
  Index experts = 64;
  Index top_k = 4;
  Index sequences = 64;
  Index steps = 16;
  double epochs = 2.45;
  double minutes = 0;
  double learning_rate = 1e-2;
  Index warm_up = 100;
  double gate_rate = 3;
  double noise_rate = 0.03;
  double expert_rate = 0.3;
  double threshold_rate = 0.03;
  double bias_rate = 0.001;
  double embedding_deviation = 0.1;
  double dropout = 0;
  double clip = 1.0;
  double importance_weight = 0.1;
  double load_weight = 0.1;
  Index evaluations = 2;
  std::uint64_t seed = 1;
  int threads = static_cast<int>(moe::worker_count());
  std::string csv = "language_model.csv";

  // the study
  std::string study;
  std::vector<std::string> tables{"loss_weights", "experts", "balance"};
  Index updates = 1425;
  Index seeds = 3;
};

}  // namespace language_model
