#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "contestant.hpp"
#include "timetable.hpp"

/// \file
/// What the program shows: a progress bar, a row after every evaluation, the final table and a CSV.

namespace language_model {

template <class... Values>
std::string print(const char* format, Values... values) {
  char buffer[512];
  std::snprintf(buffer, sizeof(buffer), format, values...);
  return buffer;
}
inline std::string print(const char* text) { return text; }

/// 1234567 as "1.235 M".
inline std::string in_millions(Index count) {
  return print("%.3f M", static_cast<double>(count) * 1e-6);
}

/// What a progress bar or plot says of a training under way.
inline std::string progress_text(const Timetable& timetable, const std::vector<Figures>& models) {
  std::string text = std::to_string(timetable.update()) + "/" + std::to_string(timetable.total());
  for (const Figures& m : models) {
    text += print("  %s loss %.3f, %.0f tokens/s", m.name.c_str(), m.loss, m.tokens_per_second);
  }
  return text;
}

inline const char* const csv_header =
    "part,model,update,tokens,seconds,training_loss,perplexity,operations,parameters,"
    "cv_importance,cv_load,max_over_mean_load,unused_experts,tokens_per_second";

inline std::string csv_row(const char* part, const Figures& m, const Timetable& timetable,
                           const Options& o, const Evaluation& e) {
  return print(
      "%s,%s,%td,%td,%.2f,%.5f,%.4f,%td,%td,%.5f,%.5f,%.5f,%td,%.0f", part, m.name.c_str(),
      timetable.update(), timetable.update() * o.sequences * o.steps, m.seconds, m.loss,
      e.perplexity, m.operations, m.parameters, static_cast<double>(e.balance.cv_importance()),
      static_cast<double>(e.balance.cv_load()), static_cast<double>(e.balance.max_over_mean_load()),
      e.balance.unused_experts(), m.tokens_per_second);
}

/// The columns of the rows and of the final table; both have the same width.
inline const char* const row_header =
    "  update  model           loss   perplexity  operations  parameters  CV(imp.)  CV(load)  "
    "max/mean  tokens/s";

/// `workers`: what computes, in words.
inline void print_beginning(const Options& o, const Corpus& corpus, const std::string& workers) {
  const char* unit = o.unit == Unit::word ? "word" : "character";
  std::printf("%zu %ss to train on, %zu for validation, %zu for the test; vocabulary %td\n",
              corpus.train.size(), unit, corpus.validation.size(), corpus.test.size(),
              corpus.vocabulary.size());
  std::printf("batches of %td x %td %ss, %s, seed %ju\n", o.sequences, o.steps, unit,
              workers.c_str(), static_cast<std::uintmax_t>(o.seed));
  std::printf(
      "operations: multiply-adds a %s between embedding and softmax; perplexity a %s, on the "
      "validation part\n\n",
      unit, unit);
  std::puts(row_header);
}

inline void print_row(const Figures& m, Index update, const Evaluation& e) {
  std::printf("%8td  %-12s %6.3f  %11.2f  %10s  %10s  %8.3f  %8.3f  %8.2f  %8.0f\n", update,
              m.name.c_str(), m.loss, e.perplexity, in_millions(m.operations).c_str(),
              in_millions(m.parameters).c_str(), static_cast<double>(e.balance.cv_importance()),
              static_cast<double>(e.balance.cv_load()),
              static_cast<double>(e.balance.max_over_mean_load()), m.tokens_per_second);
  std::fflush(stdout);
}

/// One line of the final table, in Markdown.
inline void print_result(const Figures& m, const Evaluation& validation, const Evaluation& test) {
  std::printf(
      "| %-12s | %7td | %6td | %10s | %10s | %10.3f | %6.3f | %5.3f | %8.3f | %8.3f | %8.2f | "
      "%8.0f |\n",
      m.name.c_str(), m.experts, m.active, in_millions(m.operations).c_str(),
      in_millions(m.parameters).c_str(), validation.perplexity, test.perplexity,
      std::log2(test.perplexity), static_cast<double>(test.balance.cv_importance()),
      static_cast<double>(test.balance.cv_load()),
      static_cast<double>(test.balance.max_over_mean_load()), m.tokens_per_second);
}
inline void print_result_header(const Timetable& timetable, double seconds) {
  if (!timetable.is_over()) {
    std::printf("\ninterrupted after update %td of %td\n", timetable.update(), timetable.total());
  }
  std::printf("\nPerplexity after %td updates, %.0f s; balance on the test part\n\n",
              timetable.update(), seconds);
  std::puts(
      "| model        | experts | active | operations | parameters | validation |   test |  bits | "
      "CV(imp.) | CV(load) | max/mean | tokens/s |\n"
      "| ------------ | ------: | -----: | ---------: | ---------: | ---------: | -----: | ----: | "
      "-------: | -------: | -------: | -------: |");
}

}  // namespace language_model
