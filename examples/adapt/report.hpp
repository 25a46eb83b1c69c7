#pragma once

#include <cstdio>
#include <optional>
#include <string>

#include "../language_model/report.hpp"
#include "adaptation.hpp"

/// \file
/// What the program shows: a table in Markdown, and the same as a CSV.

namespace adapt {

inline void print_beginning(const Options& o, const Corpus& old_corpus, const Corpus& new_corpus) {
  const char* unit = o.base.unit == language_model::Unit::word ? "word" : "character";
  const auto print_text = [&](const char* which, const Corpus& corpus) {
    std::printf("%s text: %zu %ss to train on, %zu for validation, %zu for the test\n", which,
                corpus.train.size(), unit, corpus.validation.size(), corpus.test.size());
  };
  print_text("old", old_corpus);
  print_text("new", new_corpus);
  std::printf("vocabulary %td, batches of %td x %td, %d threads, seed %ju\n",
              old_corpus.vocabulary.size(), o.base.sequences, o.base.steps, o.base.threads,
              static_cast<std::uintmax_t>(o.base.seed));
  std::fflush(stdout);
}

inline void print_header(const Options& o) {
  std::printf(
      "\nPerplexities after %td updates on the new text; MB: of gradients and optimizer; CPU s: of "
      "all "
      "threads\n\n"
      "| seed | what is trained          | parameters |    MB | seconds | CPU s | new: validation "
      "| "
      "new: test | old: test |\n"
      "| ---: | ------------------------ | ---------: | ----: | ------: | ----: | --------------: "
      "| "
      "--------: | --------: |\n",
      o.updates);
  std::fflush(stdout);
}

/// A perplexity; empty where the test was not read.
inline std::string in_table(const std::optional<double>& perplexity) {
  return perplexity ? language_model::print("%.3f", *perplexity) : "";
}

inline std::string row(const Options& o, const std::string& name, const Adapted& a) {
  return language_model::print(
      "| %4ju | %-24s | %10td | %5.2f | %7.1f | %5.1f | %15.3f | %9s | %9s |",
      static_cast<std::uintmax_t>(o.base.seed), name.c_str(), a.trained,
      static_cast<double>(a.bytes) * 1e-6, a.seconds, a.processor_seconds,
      a.perplexities.new_validation, in_table(a.perplexities.new_test).c_str(),
      in_table(a.perplexities.old_test).c_str());
}

inline const char* const csv_header =
    "seed,trained,updates,parameters,bytes,seconds,processor_seconds,new_validation,new_test,old_"
    "test";

inline std::string csv_row(const Options& o, const std::string& name, const Adapted& a) {
  return language_model::print(
      "%ju,%s,%td,%td,%td,%.2f,%.2f,%.4f,%s,%s", static_cast<std::uintmax_t>(o.base.seed),
      name.c_str(), a.trained > 0 ? o.updates : 0, a.trained, a.bytes, a.seconds,
      a.processor_seconds, a.perplexities.new_validation, in_table(a.perplexities.new_test).c_str(),
      in_table(a.perplexities.old_test).c_str());
}

}  // namespace adapt
