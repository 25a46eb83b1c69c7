#pragma once

#include <CLI/CLI.hpp>

#include "options.hpp"

/// \file
/// The options of every program that trains the model.

namespace language_model {

inline CLI::Range at_least(double lowest) { return {lowest, 1e9}; }

inline void add_training_options(CLI::App& app, Options& o) {
  app.add_option("--data", o.data, "UTF-8 text files, a document a line, instead of the dictionary")
      ->check(CLI::ExistingFile);
  app.add_option("--gcide", o.gcide, "the dictionary GCIDE, compressed")->capture_default_str();
  app.add_option("--wordnet", o.wordnet, "folder with WordNet's data.noun and its sisters")
      ->capture_default_str();
  app.add_option("--vocabulary", o.vocabulary,
                 "how many of the most frequent characters or words are known")
      ->check(at_least(3))
      ->capture_default_str();
  app.add_option(
         "--cutoffs", o.cutoffs,
         "adaptive softmax: the first word of each tail, words being numbered from the most "
         "frequent on; one as large as the vocabulary makes it a full softmax")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--shrink", o.shrink,
                 "adaptive softmax: how much narrower each tail is than the words before it")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--width", o.width, "width D of the model")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--memory", o.memory, "hidden width of the LSTMs; 0: that of the model")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option(
         "--pre-norm", o.pre_norm,
         "1: RMSNorm before each layer and the softmax; 0: the paper's model, without norms "
         "and with a sigmoid on the mixture")
      ->capture_default_str();
  app.add_option("--factored", o.factored,
                 "1: FactoredAdam for the experts; 0: Adam for everything")
      ->capture_default_str();
  app.add_option("--gate-deviation", o.gate_deviation,
                 "deviation of the gate's scores at the start; 0: noise, if there is any, alone "
                 "chooses at first")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--hidden", o.hidden, "hidden width H of an expert")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--experts", o.experts, "experts E of the sparse model")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--top-k", o.top_k,
                 "experts K used for a token; the dense model has K and uses them all")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--sequences", o.sequences, "sequences in a batch")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--steps", o.steps, "tokens (characters or words) of a sequence in a batch")
      ->check(at_least(1))
      ->capture_default_str();
  auto* epochs = app.add_option("--epochs", o.epochs, "how often the training text is read")
                     ->check(at_least(0))
                     ->capture_default_str();
  app.add_option("--minutes", o.minutes, "train for so long instead, evaluations included")
      ->check(at_least(0))
      ->excludes(epochs);
  app.add_option("--learning-rate", o.learning_rate,
                 "highest learning rate of Adam; it grows at first, then falls linearly to 0")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--gate-rate", o.gate_rate, "learning rate of the gate's scores, as a factor")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--noise-rate", o.noise_rate, "learning rate of the gate's noise, as a factor")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--expert-rate", o.expert_rate,
                 "learning rate of the experts, as a factor; each sees few of the tokens")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--warm-up", o.warm_up, "updates during which the learning rate grows")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--embedding-deviation", o.embedding_deviation,
                 "deviation of the normal distribution that embeddings start from")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--dropout", o.dropout, "probability of dropping an activation")
      ->check(CLI::Range(0.0, 0.99))
      ->capture_default_str();
  app.add_option("--clip", o.clip, "largest norm of the gradient of an update")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--importance-weight", o.importance_weight, "weight of the importance loss")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--load-weight", o.load_weight, "weight of the load loss")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--evaluations", o.evaluations, "how often the validation part is read")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--seed", o.seed, "of the weights, the noise and dropout")->capture_default_str();
  app.add_option("--csv", o.csv, "file for every row, to plot")->capture_default_str();
}

inline void add_checkpoint_option(CLI::App& app, Options& o) {
  app.add_option("--checkpoint", o.checkpoint,
                 "save the training here, and go on from it if it is there");
}

}  // namespace language_model
