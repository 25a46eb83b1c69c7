#pragma once

#include <cstdint>
#include <cstdio>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>

#include "dictionary.hpp"

/// \file
/// The options of the program.

namespace pronounce {

/// Everything that decides the outcome of a training; saved with the model, so that whoever resumes
/// it goes on with the same.
struct Options {
  // the network
  Index embedding = 24;
  Index width = 32;
  Index experts = 16;
  Index top_k = 2;
  Index hidden = 32;
  double dropout = 0;
  double balance_weight = 0.1;

  // the plan
  Index updates = 19000;
  Index cross_entropy = 16000;
  Index words = 128;
  double learning_rate = 5e-3;
  double late_rate = 1e-3;
  double clip = 5;

  // REINFORCE
  std::string schedule = "alternation";
  double sampled_dropout = 0;
  double share = 0.9;
  Index rise = 500;
  std::string baseline = "leave_one_out";
  Index samples = 8;
  double temperature = 1;
  bool normalise = false;
  double entropy_bonus = 0;
  double exact_bonus = 4;
  std::string reward = "score";
  Index max_length = 32;

  std::uint64_t seed = 1;
};

/// --full: a larger network, trained to convergence. It overfits without dropout, so most updates of
/// its second phase are of cross-entropy, which has it.
inline Options full_options() {
  Options o;
  o.embedding = 32;
  o.width = 64;
  o.hidden = 64;
  o.dropout = 0.1;
  o.updates = 32500;
  o.cross_entropy = 24000;
  o.share = 0.2;
  o.learning_rate = 3e-3;
  return o;
}

/// Throws std::runtime_error for what no part of the training complains about by itself.
inline void check_options(const Options& o) {
  const auto check = [](bool holds, const char* what) {
    if (!holds) throw std::runtime_error(what);
  };
  check(o.updates >= 1, "--updates must be at least 1");
  check(o.cross_entropy >= 0, "--cross-entropy must be at least 0");
  check(o.words >= 1, "--words must be at least 1");
  check(o.clip > 0, "--clip must be above 0");
  // The training would only complain when the first phase is over.
  check(o.sampled_dropout >= 0 && o.sampled_dropout < 1, "--sampled-dropout must be in [0, 1)");
}

/// Calls f(name, member, what it is) for every option.
template <class OptionsType, class F>
void for_each_option(OptionsType& o, F&& f) {
  f("embedding", o.embedding, "width of the embeddings of letters and phonemes");
  f("width", o.width, "width H of the LSTMs; the mixture is twice as wide");
  f("experts", o.experts, "experts E of the mixture");
  f("top_k", o.top_k, "experts K used for a letter");
  f("hidden", o.hidden, "hidden width of an expert");
  f("dropout", o.dropout,
    "probability of dropping an activation in updates of cross-entropy alone");
  f("balance-weight", o.balance_weight, "weight of the importance and of the load loss");
  f("updates", o.updates, "updates in all");
  f("cross-entropy", o.cross_entropy, "the first so many updates know cross-entropy only");
  f("words", o.words, "words in a batch");
  f("learning-rate", o.learning_rate,
    "highest rate of Adam in the first phase; it grows over 200 updates, then falls to a tenth");
  f("late-rate", o.late_rate, "highest rate of Adam after that; it falls linearly to 0");
  f("clip", o.clip, "largest norm of the gradient of an update");
  f("schedule", o.schedule, "how REINFORCE comes in: alternation, prefix, blend or none");
  f("sampled-dropout", o.sampled_dropout, "probability of dropping one in updates of REINFORCE");
  f("share", o.share, "share or weight that REINFORCE rises to");
  f("rise", o.rise, "updates in which it rises; updates of a stage for prefix");
  f("baseline", o.baseline, "none, running_mean, linear, greedy or leave_one_out");
  f("samples", o.samples, "pronunciations sampled for a word");
  f("temperature", o.temperature, "of sampling");
  f("normalise", o.normalise, "scale the advantages of a batch to standard deviation 1");
  f("entropy-bonus", o.entropy_bonus, "weight of the entropy in what REINFORCE maximises");
  f("exact-bonus", o.exact_bonus, "what a listed pronunciation earns besides");
  f("reward", o.reward, "score; or, to see what a score is good for, constant or shuffled");
  f("longest", o.max_length, "most phonemes of a word, the end included");
  f("seed", o.seed, "of the weights, the order of the words, the noise and the samples");
}

inline std::string to_text(const std::string& value) { return value; }
inline std::string to_text(bool value) { return value ? "true" : "false"; }
inline std::string to_text(Index value) { return std::to_string(value); }
inline std::string to_text(std::uint64_t value) { return std::to_string(value); }
inline std::string to_text(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.17g", value);
  return text;
}

/// The value again if to_text() makes the same text of it; whether it does.
inline bool from_text(const std::string& text, std::string& value) {
  value = text;
  return true;
}
inline bool from_text(const std::string& text, bool& value) {
  value = text == "true";
  return to_text(value) == text;
}
template <class Number>
bool from_text(const std::string& text, Number& value) {
  std::istringstream(text) >> value;
  return to_text(value) == text;
}

/// The options that a model was saved with. Throws std::runtime_error naming one that is missing or
/// makes no sense.
inline Options read_options(const std::map<std::string, std::string>& metadata) {
  Options options;
  for_each_option(options, [&](const char* name, auto& value, const char*) {
    const auto found = metadata.find(name);
    if (found == metadata.end()) {
      throw std::runtime_error(std::string("this is no model of pronounce: it has no ") + name);
    }
    if (!from_text(found->second, value)) {
      throw std::runtime_error(std::string("this is no model of pronounce: its ") + name +
                               " is \"" + found->second + '"');
    }
  });
  return options;
}

}  // namespace pronounce
