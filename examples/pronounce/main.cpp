/// Learns to pronounce words from the CMU dictionary, first by cross-entropy, then by REINFORCE as
/// well; and pronounces words. See README.md beside this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <moe/io/safetensors.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "dictionary.hpp"
#include "options.hpp"
#include "report.hpp"
#include "score.hpp"
#include "trainer.hpp"

namespace pronounce {

/// What does not decide the outcome.
struct Surroundings {
  std::vector<std::string> words;
  std::string dictionary = "/usr/share/pocketsphinx/model/en-us/cmudict-en-us.dict";
  std::string model = "pronounce.safetensors";
  std::string resume;
  bool full = false;
  bool no_test = false;
  Index evaluate_every = 1000;
  int threads = static_cast<int>(moe::worker_count());
  std::string csv;
};

/// Compares the sizes in the options with a few tensors, before anything is as large as they say.
void check_sizes(const moe::SafetensorsFile& file, const Options& o) {
  const auto check = [&](const char* name, Index rows, Index columns) {
    const auto found = file.tensors().find(name);
    // A single row is a vector there.
    const bool fits = found != file.tensors().end() && !found->second.shape.empty() &&
                      found->second.shape.back() == static_cast<std::uint64_t>(columns) &&
                      found->second.end - found->second.begin ==
                          static_cast<std::uint64_t>(rows * columns) * sizeof(float);
    if (!fits) {
      throw std::runtime_error(file.path() + ": " + name + " is not as large as the options say");
    }
  };
  check("letters.weight", letters().size(), o.embedding);
  check("decoder.weight_hh", o.width, 4 * o.width);
  check("mixture.gate.weight", 2 * o.width, o.experts);
  check("mixture.experts.0.up.weight", 2 * o.width, o.hidden);
}

/// Every n-th of them.
std::vector<Entry> every(std::size_t n, const std::vector<Entry>& entries) {
  std::vector<Entry> some;
  for (std::size_t i = 0; i < entries.size(); i += n) some.push_back(entries[i]);
  return some;
}

void train(const Options& options, const Surroundings& s) {
  const Dictionary dictionary = read_dictionary(s.dictionary);
  std::optional<moe::SafetensorsFile> file;
  if (!s.resume.empty()) check_sizes(file.emplace(s.resume), options);
  Trainer trainer(options, dictionary.train);
  if (file) trainer.load(*file);
  std::optional<examples::CsvFile> csv;
  if (!s.csv.empty()) csv.emplace(s.csv, csv_header, !s.resume.empty());
  std::printf("%zu words to train on, %zu for validation, %zu for the test; %td parameters\n",
              dictionary.train.size(), dictionary.validation.size(), dictionary.test.size(),
              moe::parameter_count(trainer.network()));
  print_operations(trainer.network().operations());
  std::printf("%td updates of %td words, %.1f readings; %d threads, seed %s\n%s\n\n",
              options.updates, options.words,
              static_cast<double>(options.updates) / static_cast<double>(trainer.batches()),
              s.threads, to_text(options.seed).c_str(), schedule_in_words(options).c_str());
  std::puts(row_header);
  std::fflush(stdout);

  ErrorRates validation;
  Index evaluated = -1;
  const Index begun = trainer.update();
  examples::ProgressBar progress;
  const auto evaluate_and_save = [&] {
    if (evaluated == trainer.update()) return;
    progress.clear();
    validation = evaluate(trainer.network(), trainer.helper(), dictionary.validation);
    print_row(trainer, validation);
    if (csv) csv->add(csv_row(trainer, validation));
    trainer.save(s.model);
    evaluated = trainer.update();
  };
  while (trainer.update() < options.updates && !examples::interrupted) {
    trainer.train();
    draw(progress, trainer);
    if (trainer.update() % s.evaluate_every == 0) evaluate_and_save();
  }
  if (trainer.update() < options.updates) {
    progress.clear();
    if (trainer.update() == begun) {
      std::puts("\ninterrupted before the first update");
      return;
    }
    if (evaluated != trainer.update()) trainer.save(s.model);
    std::printf("\ninterrupted after update %td of %td; --resume %s goes on\n", trainer.update(),
                options.updates, s.model.c_str());
    return;
  }
  evaluate_and_save();
  std::printf("\nError rates in percent after %td updates, %.0f s of training\n\n",
              trainer.update(), trainer.seconds());
  print_result_header();
  // Words of the training part, as many as there are for validation, show how far it overfits.
  const std::size_t n =
      std::max<std::size_t>(1, dictionary.train.size() / dictionary.validation.size());
  print_result("training",
               evaluate(trainer.network(), trainer.helper(), every(n, dictionary.train)));
  print_result("validation", validation);
  if (!s.no_test) {
    print_result("test", evaluate(trainer.network(), trainer.helper(), dictionary.test));
  }
  std::printf("\nthe model is in %s\n", s.model.c_str());
}

void pronounce_words(const Surroundings& s) {
  const moe::SafetensorsFile file(s.model);
  const Options options = read_options(file.metadata());
  check_sizes(file, options);
  Network network(network_of(options));
  file.read_parameters(network);
  const Helper helper(helper_of(options));
  const Alphabet spelling = letters();
  const Alphabet sounds = phonemes();
  std::vector<std::vector<Index>> spelled;
  for (const std::string& word : s.words) spelled.push_back(spell(spelling, word));
  std::vector<Word> words;
  for (const auto& word : spelled) words.push_back({word, {}});
  Helper::Tape tape;
  helper.decode(network, words, tape);
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::printf("%s", s.words[i].c_str());
    for (const Index phoneme : without_end(tape.rollout.sequence(static_cast<Index>(i)))) {
      std::printf(" %s", sounds.symbol(phoneme).c_str());
    }
    std::puts(tape.rollout.truncated[i] != 0 ? " ..." : "");
  }
}

/// The options that the others start from: those of --full, or of the file after --resume.
Options first_options(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    constexpr std::string_view resume = "--resume";
    if (argument == "--full") options = full_options();
    if (argument == resume && i + 1 < argc) {
      return read_options(moe::SafetensorsFile(argv[i + 1]).metadata());
    }
    if (argument.starts_with("--resume=")) {
      const std::string path(argument.substr(resume.size() + 1));
      return read_options(moe::SafetensorsFile(path).metadata());
    }
  }
  return options;
}

int run(int argc, char** argv) {
  CLI::App app(
      "Learns to pronounce English words from the CMU dictionary: cross-entropy first, then "
      "REINFORCE as well. With words, it pronounces them instead. Ctrl-C ends the training and "
      "saves the model.");
  Options options = first_options(argc, argv);
  Surroundings s;
  app.add_option("words", s.words, "words to pronounce with the trained model");
  app.add_option("--model", s.model, "where the model is saved, and loaded from to pronounce")
      ->capture_default_str();
  auto* full = app.add_flag("--full", s.full, "train to convergence, a larger network");
  app.add_option("--resume", s.resume,
                 "go on from this model, with its options where none is given")
      ->check(CLI::ExistingFile)
      ->excludes(full);
  app.add_option("--dictionary", s.dictionary, "lines of \"word PH PH ...\"")
      ->capture_default_str();
  app.add_option("--evaluate-every", s.evaluate_every,
                 "updates between two looks at the validation words, at each of which it saves")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_flag("--no-test", s.no_test, "leave the test words alone, as one should while tuning");
  app.add_option("--csv", s.csv, "file for every row, to plot");
  app.add_option("--threads", s.threads, "threads; results do not depend on it")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  for_each_option(options, [&](const char* name, auto& value, const char* what) {
    app.add_option(std::string("--") + name, value, what)->capture_default_str();
  });
  examples::set_help(
      app, {"--model", "--full", "--resume", "--evaluate-every", "--no-test", "--csv", "--threads",
            "--updates", "--cross-entropy", "--experts", "--schedule", "--seed"});
  CLI11_PARSE(app, argc, argv);
  check_options(options);
#ifdef _OPENMP
  omp_set_num_threads(s.threads);
#endif
  if (!s.words.empty()) {
    pronounce_words(s);
  } else {
    examples::catch_interrupts();
    train(options, s);
  }
  return 0;
}

}  // namespace pronounce

int main(int argc, char** argv) {
  try {
    return pronounce::run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pronounce: %s\n", error.what());
    return 1;
  }
}
