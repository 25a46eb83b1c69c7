#pragma once

#include <cstdio>
#include <sstream>
#include <string>

#include "../common/terminal.hpp"
#include "score.hpp"
#include "trainer.hpp"

/// \file
/// What the program shows: a progress bar, a row after every evaluation, the final table and a CSV.

namespace pronounce {

/// Share is that of REINFORCE in the last updates; xentropy is nats a phoneme on training words with
/// dropout; reward is what sampled pronunciations of training words earned.
inline const char* const row_header =
    "  update  share  xentropy  reward    PER    WER  WER(first)  CV(imp.)  seconds";

/// How much a forward pass computes, and how much of it is the mixture.
inline void print_operations(const Network::Operations& operations) {
  std::printf("multiply-adds: %td a letter, %td of them the mixture's, and %td a phoneme\n",
              operations.letter, operations.mixture, operations.phoneme);
}

inline void print_row(const Trainer& trainer, const ErrorRates& rates) {
  std::printf("%8td  %5.2f  %8.4f  %6.3f  %5.2f  %5.2f  %10.2f  %8.3f  %7.0f\n", trainer.update(),
              trainer.share(), trainer.cross_entropy(), trainer.reward(),
              rates.phoneme_error_rate(), rates.word_error_rate(), rates.word_error_rate_first(),
              static_cast<double>(trainer.balance().cv_importance()), trainer.seconds());
  std::fflush(stdout);
}

/// One line of the final table, in Markdown.
inline void print_result(const char* part, const ErrorRates& rates) {
  std::printf("| %-10s | %5td | %18.2f | %16.2f | %22.2f |\n", part, rates.words,
              rates.phoneme_error_rate(), rates.word_error_rate(), rates.word_error_rate_first());
}
inline void print_result_header() {
  std::puts(
      "| part       | words | phoneme error rate | word error rate  | word error rate, first |\n"
      "| ---------- | ----: | -----------------: | ---------------: | ---------------------: |");
}

inline void draw(examples::ProgressBar& progress, const Trainer& trainer) {
  if (!progress.is_due()) return;
  const Index total = trainer.options().updates;
  char text[128];
  std::snprintf(text, sizeof(text), "%td/%td  xentropy %.3f  reward %.3f", trainer.update(), total,
                trainer.cross_entropy(), trainer.reward());
  progress.draw(static_cast<double>(trainer.update()) / static_cast<double>(total), text);
}

inline const char* const csv_header =
    "seed,schedule,reward_kind,update,seconds,share,cross_entropy,reward,phoneme_error_rate,"
    "word_error_rate,word_error_rate_first";

inline std::string csv_row(const Trainer& trainer, const ErrorRates& rates) {
  const Options& o = trainer.options();
  std::ostringstream row;
  row << o.seed << ',' << o.schedule << ',' << o.reward << ',' << trainer.update() << ','
      << trainer.seconds() << ',' << trainer.share() << ',' << trainer.cross_entropy() << ','
      << trainer.reward() << ',' << rates.phoneme_error_rate() << ',' << rates.word_error_rate()
      << ',' << rates.word_error_rate_first();
  return row.str();
}

}  // namespace pronounce
