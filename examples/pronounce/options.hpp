#pragma once

#include <cstdint>
#include <string>

#include "dictionary.hpp"

/// \file
/// What can be asked of the program.

namespace pronounce {

/// Everything that decides the outcome of a training; saved with the model, so that whoever resumes
/// it goes on with the same.
struct Options {
  // the network
  Index embedding = 64;
  Index width = 128;
  Index experts = 16;
  Index active = 2;
  Index hidden = 128;
  double dropout = 0.2;
  double balance_weight = 0.01;

  // the plan
  Index updates = 6000;
  Index cross_entropy = 4500;
  Index words = 128;
  double learning_rate = 3e-3;
  double late_rate = 5e-4;
  double clip = 5;

  // REINFORCE
  std::string schedule = "alternation";
  double share = 0.5;
  Index rise = 500;
  std::string baseline = "leave_one_out";
  Index samples = 4;
  double temperature = 1;
  bool normalise = false;
  double entropy_bonus = 0;
  double exact_bonus = 1;
  std::string reward = "score";
  Index longest = 32;

  std::uint64_t seed = 1;
};

/// Calls f(name, member, what it is) for every option.
template <class OptionsType, class F>
void for_each_option(OptionsType& o, F&& f) {
  f("embedding", o.embedding, "width of the embeddings of letters and phonemes");
  f("width", o.width, "width H of the LSTMs; the mixture is twice as wide");
  f("experts", o.experts, "experts E of the mixture");
  f("active", o.active, "experts K used for a letter");
  f("hidden", o.hidden, "hidden width of an expert");
  f("dropout", o.dropout, "probability of dropping an activation");
  f("balance-weight", o.balance_weight, "weight of the importance and of the load loss");
  f("updates", o.updates, "updates in all");
  f("cross-entropy", o.cross_entropy, "the first so many updates know cross-entropy only");
  f("words", o.words, "words in a batch");
  f("learning-rate", o.learning_rate,
    "highest rate of Adam in the first phase; it grows over 200 updates, then falls to a tenth");
  f("late-rate", o.late_rate, "highest rate of Adam after that; it falls linearly to 0");
  f("clip", o.clip, "largest norm of the gradient of an update");
  f("schedule", o.schedule, "how REINFORCE comes in: alternation, prefix, blend or none");
  f("share", o.share, "share or weight that REINFORCE rises to");
  f("rise", o.rise, "updates in which it rises; updates of a stage for prefix");
  f("baseline", o.baseline, "none, running_mean, linear, greedy or leave_one_out");
  f("samples", o.samples, "pronunciations sampled for a word");
  f("temperature", o.temperature, "of sampling");
  f("normalise", o.normalise, "scale the advantages of a batch to deviation 1");
  f("entropy-bonus", o.entropy_bonus, "weight of the entropy in what REINFORCE maximises");
  f("exact-bonus", o.exact_bonus, "what a listed pronunciation earns besides");
  f("reward", o.reward, "score; or, to see what a score is good for, constant or shuffled");
  f("longest", o.longest, "most phonemes of a word, the end included");
  f("seed", o.seed, "of the weights, the order of the words, the noise and the samples");
}

}  // namespace pronounce
