#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "../common/terminal.hpp"
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
template <class Middle, class Team>
std::string progress_text(const Timetable& timetable,
                          const std::vector<Contestant<Middle, Team>>& contestants) {
  std::string text = std::to_string(timetable.update()) + "/" + std::to_string(timetable.total());
  for (const auto& c : contestants) {
    text +=
        print("  %s loss %.3f, %.0f tokens/s", c.name().c_str(), c.loss(), c.tokens_per_second());
  }
  return text;
}

inline const char* const csv_header =
    "part,model,update,tokens,seconds,training_loss,perplexity,operations,parameters,"
    "cv_importance,cv_load,max_over_mean_load,unused_experts,tokens_per_second";

template <class Middle, class Team>
std::string csv_row(const char* part, const Contestant<Middle, Team>& c, const Timetable& timetable,
                    const Options& o, const Evaluation& e) {
  return print("%s,%s,%td,%td,%.2f,%.5f,%.4f,%td,%td,%.5f,%.5f,%.5f,%td,%.0f", part,
               c.name().c_str(), timetable.update(), timetable.update() * o.sequences * o.steps,
               c.seconds(), c.loss(), e.perplexity, c.model().operations(), c.parameters(),
               static_cast<double>(e.balance.cv_importance()),
               static_cast<double>(e.balance.cv_load()),
               static_cast<double>(e.balance.max_over_mean_load()), e.balance.unused_experts(),
               c.tokens_per_second());
}

/// The columns of the rows and of the final table; both have the same width.
inline const char* const row_header =
    "  update  model    loss   perplexity  operations  parameters  CV(imp.)  CV(load)  max/mean  "
    "tokens/s";

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

template <class Middle, class Team>
void print_row(const Contestant<Middle, Team>& c, Index update, const Evaluation& e) {
  std::printf("%8td  %-6s %6.3f  %11.2f  %10s  %10s  %8.3f  %8.3f  %8.2f  %8.0f\n", update,
              c.name().c_str(), c.loss(), e.perplexity, in_millions(c.model().operations()).c_str(),
              in_millions(c.parameters()).c_str(), static_cast<double>(e.balance.cv_importance()),
              static_cast<double>(e.balance.cv_load()),
              static_cast<double>(e.balance.max_over_mean_load()), c.tokens_per_second());
  std::fflush(stdout);
}

/// One line of the final table, in Markdown.
template <class Middle, class Team>
void print_result(const Contestant<Middle, Team>& c, const Evaluation& validation,
                  const Evaluation& test) {
  const Middle& middle = c.model().middle();
  std::printf(
      "| %-6s | %7td | %6td | %10s | %10s | %10.3f | %6.3f | %5.3f | %8.3f | %8.3f | %8.2f | %8.0f "
      "|\n",
      c.name().c_str(), middle.experts(), middle.top_k(),
      in_millions(c.model().operations()).c_str(), in_millions(c.parameters()).c_str(),
      validation.perplexity, test.perplexity, std::log2(test.perplexity),
      static_cast<double>(test.balance.cv_importance()),
      static_cast<double>(test.balance.cv_load()),
      static_cast<double>(test.balance.max_over_mean_load()), c.tokens_per_second());
}
inline void print_result_header(const Timetable& timetable, double seconds) {
  if (examples::interrupted) {
    std::printf("\ninterrupted after update %td of %td\n", timetable.update(), timetable.total());
  }
  std::printf("\nPerplexity after %td updates, %.0f s; balance on the test part\n\n",
              timetable.update(), seconds);
  std::puts(
      "| model  | experts | active | operations | parameters | validation |   test |  bits | "
      "CV(imp.) | "
      "CV(load) | max/mean | tokens/s |\n"
      "| ------ | ------: | -----: | ---------: | ---------: | ---------: | -----: | ----: | "
      "-------: | "
      "-------: | -------: | -------: |");
}

}  // namespace language_model
