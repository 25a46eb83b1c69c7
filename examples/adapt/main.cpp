/// Trains a language model on one text and adapts it to another in several ways. See README.md beside
/// this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "adaptation.hpp"
#include "base.hpp"
#include "bible.hpp"
#include "command_line.hpp"
#include "options.hpp"
#include "report.hpp"
#include "ways.hpp"

namespace adapt {

void run(const Options& o) {
  examples::use_threads(o.base.threads);
  examples::CsvFile csv(o.base.csv, csv_header);
  const Corpus old_corpus = language_model::read_corpus(o.base);
  const Corpus new_corpus = read_new(o, old_corpus.vocabulary);
  const Text old_text(old_corpus, o.base), new_text(new_corpus, o.base);
  print_beginning(o, old_corpus, new_corpus);

  const double start = examples::seconds_now();
  const std::optional<Model<Base>> trained = make_base(o, old_corpus, old_text);
  if (!trained) {
    std::puts("\ninterrupted before the first row");
    return;
  }
  const Model<Base>& base = *trained;
  print_header(o);
  const auto report = [&](const std::string& name, const Adapted& adapted) {
    std::puts(row(o, name, adapted).c_str());
    std::fflush(stdout);
    csv.add(csv_row(o, name, adapted));
  };
  report("before", {.perplexities = evaluate(base, o, old_text, new_text)});
  const std::string settings = o.base_file.empty() ? ""
                                                   : base_settings(o, old_corpus, old_text) +
                                                         language_model::name_of(new_corpus);
  std::vector<language_model::Checkpoint> checkpoints;
  for (const std::string& name : all_ways()) {
    const bool is_chosen = std::find(o.ways.begin(), o.ways.end(), name) != o.ways.end();
    if (!is_chosen || examples::interrupted) continue;
    with_way(name, base, o, [&](const Way& way, auto model) {
      const auto& checkpoint = checkpoints.emplace_back(checkpoint_of(name, way, o, settings));
      const auto adapted = train(way, std::move(model), o, old_text, new_text, checkpoint);
      if (adapted) report(way.name, *adapted);
    });
  }
  if (examples::interrupted) {
    std::printf("\ninterrupted: a way that was not at its end has no row%s\n",
                o.base_file.empty() ? "" : "; the same command goes on");
  } else {
    // Until all ways are done the trainings stay, so that none is made again.
    for (const auto& checkpoint : checkpoints) std::filesystem::remove(checkpoint.path());
  }
  std::printf("\n%.0f s after reading the texts; every row is in %s\n",
              examples::seconds_now() - start, o.base.csv.c_str());
}

}  // namespace adapt

int main(int argc, char** argv) {
  CLI::App app(
      "Trains the language model with a sparse mixture of experts on a text, then adapts it to "
      "another text in several ways, and compares them on held-out text of both. Ctrl-C ends the "
      "program early and still shows the rows of the ways that are done.");
  adapt::Options options;
  adapt::add_options(app, options);
  examples::set_help(app, {"--data", "--new-data", "--base", "--epochs", "--updates", "--ways",
                           "--rank", "--alpha", "--no-test", "--seed", "--threads", "--csv"});
  CLI11_PARSE(app, argc, argv);
  examples::catch_interrupts();
  const moe::FlushDenormals flush;
  try {
    adapt::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "adapt: %s\n", error.what());
    return 1;
  }
}
