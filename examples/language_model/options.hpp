#pragma once

#include <cstdint>
#include <moe/moe.hpp>
#include <string>
#include <vector>

/// \file
/// The options of the program.

namespace language_model {

using moe::Index;

/// What a text is read by.
enum class Unit { character, word };

/// The maps of D x H weights of an expert.
inline Index maps_of(bool gated) { return gated ? 3 : 2; }

/// The defaults are those of the language model of characters.
struct Options {
  Unit unit = Unit::character;
  std::vector<std::string> data;
  std::string gcide = "/usr/share/dictd/gcide.dict.dz";
  std::string wordnet = "/usr/share/wordnet";
  Index vocabulary = 256;
  std::vector<Index> cutoffs{};
  Index shrink = 2;
  Index width = 64;
  Index memory = 40;   ///< hidden width of the LSTMs; 0 stands for `width`
  Index mixtures = 2;  ///< 1: between the LSTMs; 2: another behind the second one
  Index hidden = 80;
  bool gated = true;  ///< the experts are gated, with SiLU (SwiGLU); else plain, with ReLU
  Index experts = 256;
  Index top_k = 4;
  Index groups = 0;  ///< of a third model, behind a hierarchical gate; 0: there is none
  Index group_experts = 64;
  bool pre_norm = true;       ///< else the layers of the paper, the mixture with a sigmoid
  double gate_deviation = 1;  ///< of the gate's first scores; 0: all of them are 0 at first
  double noise = 0;           ///< factor of the gate's noise at the start; 0: the gate has none
  double noise_until = 0;     ///< share of the training after which there is no noise; 0: it stays
  bool factored = true;       ///< FactoredAdam for the experts
  Index sequences = 256;
  Index steps = 16;
  double epochs = 0.31;
  double minutes = 0;
  double learning_rate = 1e-2;
  Index warm_up = 100;
  double gate_rate = 2;
  double noise_rate = 0.03;
  double expert_rate = 0.5;
  double dense_expert_rate = 1;  ///< of the dense model's experts, which see every token
  double threshold_rate = 0.03;
  double bias_rate = 0.001;
  double embedding_deviation = 0.1;
  double dropout = 0;
  double clip = 1.0;
  double importance_weight = 0.3;
  double load_weight = 0.1;
  Index evaluations = 2;
  std::uint64_t seed = 1;
  int threads = static_cast<int>(moe::worker_count());
  std::string csv = "language_model.csv";
  std::string picture = "language_model.svg";  ///< of the load in training; empty: none
  std::string checkpoint;  ///< file that a training is saved in and goes on from; empty: none
  bool test = true;        ///< whether the test part is read at the end
  std::string serve;  ///< format to serve the trained sparse model in, or "all"; empty: it is not

  // the study
  std::string study;
  std::vector<std::string> tables{"loss_weights", "experts", "balance"};
  Index updates = 1425;
  Index seeds = 3;
  Index most_experts = 4096;  ///< of the study's models; larger ones are left out
};

/// Whether the gate has noise in training, which costs it as many operations as its scores.
inline bool has_noise(const Options& o) { return o.noise > 0; }

/// Those of --full.
inline Options full_options() {
  Options o;
  o.groups = 4;
  o.epochs = 1;
  o.evaluations = 8;
  return o;
}

/// Those of the paper's model of words.
inline Options word_options() {
  Options o;
  o.unit = Unit::word;
  o.vocabulary = 8000;
  o.cutoffs = {500, 2000};
  o.width = 96;
  o.memory = 0;
  o.mixtures = 1;
  o.hidden = 96;
  o.gated = false;
  o.experts = 64;
  o.pre_norm = false;
  o.gate_deviation = 0;
  o.noise = 1;
  o.noise_until = 0;
  o.factored = false;
  o.sequences = 64;
  o.steps = 16;
  o.epochs = 2.45;
  o.gate_rate = 3;
  o.expert_rate = 0.3;
  o.dense_expert_rate = o.expert_rate;
  o.importance_weight = 0.1;
  return o;
}

}  // namespace language_model
