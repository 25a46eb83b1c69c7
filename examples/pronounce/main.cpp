/// Learns to pronounce words from the CMU dictionary, first by cross-entropy, then by REINFORCE as
/// well; and pronounces. See README.md beside this file.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "dictionary.hpp"
#include "options.hpp"
#include "trainer.hpp"

namespace pronounce {

/// What does not decide the outcome.
struct Surroundings {
  std::vector<std::string> words;
  std::string dictionary = "/usr/share/pocketsphinx/model/en-us/cmudict-en-us.dict";
  std::string model = "pronounce.safetensors";
  std::string start;
  bool resume = false;
  bool full = false;
  bool test = true;
  Index evaluations = 12;
  int threads = static_cast<int>(moe::worker_count());
  std::string csv;
};

volatile std::sig_atomic_t interrupted = 0;

extern "C" void on_interrupt(int) {
  interrupted = 1;
  std::signal(SIGINT, SIG_DFL);  // whoever presses twice means it
}

Options full_options() {
  Options o;
  o.updates = 30000;
  o.cross_entropy = 24000;
  return o;
}

void print_row(const Trainer& trainer, const ErrorRates& rates) {
  std::printf("%8td %6.2f %9.4f %8.4f %8.2f %9.2f %9.2f %9.3f %8.0f\n", trainer.update(),
              trainer.share(), trainer.cross_entropy(), trainer.reward(),
              rates.phoneme_error_rate(), rates.word_error_rate(), rates.word_error_rate_first(),
              static_cast<double>(trainer.balance().cv_importance()), trainer.seconds());
  std::fflush(stdout);
}

void train(const Options& options, const Surroundings& s) {
  const Dictionary dictionary = read_dictionary(s.dictionary);
  Trainer trainer(options, dictionary.train);
  if (!s.start.empty()) trainer.load(moe::SafetensorsFile(s.start));
  std::printf("%zu words to train on, %zu for validation, %zu for the test; %td parameters\n",
              dictionary.train.size(), dictionary.validation.size(), dictionary.test.size(),
              moe::parameter_count(trainer.network()));
  std::printf("%td updates of %td words, %.1f epochs\n", options.updates, options.words,
              static_cast<double>(options.updates) / static_cast<double>(trainer.batches()));
  std::puts("  update  share  xentropy   reward      PER       WER  WER first   CV(imp)  seconds");
  std::ofstream csv;
  if (!s.csv.empty()) csv.open(s.csv);
  Index evaluated = -1;
  const auto evaluate_now = [&] {
    const ErrorRates rates = evaluate(trainer.network(), trainer.helper(), dictionary.validation);
    print_row(trainer, rates);
    if (csv) csv << trainer.update() << ',' << trainer.seconds() << ',' << rates.phoneme_error_rate() << ',' << rates.word_error_rate() << ',' << rates.word_error_rate_first() << ',' << trainer.reward() << std::endl;
    trainer.save(s.model);
    evaluated = trainer.update();
  };
  const Index every = std::max<Index>(1, options.updates / s.evaluations);
  while (trainer.update() < options.updates && !interrupted) {
    trainer.train();
    if (trainer.update() % every == 0) evaluate_now();
  }
  if (evaluated != trainer.update()) evaluate_now();
  if (s.test) {
    const ErrorRates rates = evaluate(trainer.network(), trainer.helper(), dictionary.test);
    print_row(trainer, rates);
  }
}

}  // namespace pronounce

int main(int argc, char** argv) {
  using namespace pronounce;
  CLI::App app("Learns to pronounce");
  Options options;
  Surroundings s;
  for_each_option(options, [&](const char* name, auto& value, const char* what) {
    app.add_option(std::string("--") + name, value, what)->capture_default_str();
  });
  app.add_option("--model", s.model);
  app.add_option("--start", s.start);
  app.add_option("--csv", s.csv);
  app.add_option("--evaluations", s.evaluations);
  app.add_option("--test", s.test);
  app.add_option("--threads", s.threads);
  CLI11_PARSE(app, argc, argv);
#ifdef _OPENMP
  omp_set_num_threads(s.threads);
#endif
  try {
    train(options, s);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pronounce: %s\n", error.what());
    return 1;
  }
}
