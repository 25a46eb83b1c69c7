/// Trains the language model of examples/language_model on several processes, its experts spread over
/// them. See README.md beside this file.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <moe/moe.hpp>
#include <moe/mpi/communicator.hpp>
#include <moe/mpi/environment.hpp>
#include <moe/mpi/expert_parallel.hpp>
#include <optional>
#include <string>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "../language_model/checkpoint.hpp"
#include "../language_model/command_line.hpp"
#include "../language_model/contestant.hpp"
#include "../language_model/corpus.hpp"
#include "../language_model/mixture.hpp"
#include "../language_model/options.hpp"
#include "../language_model/report.hpp"
#include "../language_model/timetable.hpp"
#include "communication.hpp"
#include "rank_checkpoint.hpp"
#include "ranks.hpp"

namespace expert_parallel {

using language_model::Batches;
using language_model::Corpus;
using language_model::Evaluation;
using language_model::Options;

using Gate = moe::NoisyTopKGate<float>;
using Layer = moe::mpi::ExpertParallel<moe::MoELayer<moe::Expert<moe::FeedForward>, Gate>>;
using Middle = language_model::Mixture<Gate, Layer>;
using Contestant = language_model::Contestant<Middle, Ranks>;

/// All ranks read the whole text and take their sequences of each batch.
struct Data {
  Data(const Options& o, const Ranks& ranks)
      : corpus(language_model::read_corpus(o)),
        training(corpus.train, o.sequences, o.steps, ranks.part()),
        validation(corpus.validation, o.sequences, o.steps, ranks.part()),
        test(corpus.test, o.sequences, o.steps, ranks.part()) {}
  Data(const Data&) = delete;
  Data& operator=(const Data&) = delete;

  Corpus corpus;
  Batches training, validation, test;
};

void check_same_text(const Corpus& corpus, const Ranks& ranks) {
  ranks.communicator().agree("the text",
                             {{"the number of words to train on", std::ssize(corpus.train)},
                              {"the number of words for validation", std::ssize(corpus.validation)},
                              {"the number of words for the test", std::ssize(corpus.test)},
                              {"the vocabulary", corpus.vocabulary.size()}});
}

/// A rank's own part of the training: it goes on with as many ranks.
RankCheckpoint checkpoint_of(const Options& o, const Ranks& ranks, const Corpus& corpus,
                             Index updates) {
  const language_model::BatchPart part = ranks.part();
  return {o.checkpoint,
          language_model::training_settings(o, corpus, o.minutes > 0 ? 0 : updates) +
              language_model::print(" minutes=%g rank=%td ranks=%td", o.minutes, part.index,
                                    part.count),
          ranks.communicator()};
}

void train(const Options& o, bool shows_progress, const Ranks& ranks) {
  const int threads = o.threads > 0 ? o.threads : ranks.default_threads();
  examples::use_threads(threads);
  std::optional<Data> data;
  std::optional<examples::CsvFile> csv;
  RankCheckpoint checkpoint;
  ranks.communicator().attempt("the beginning", [&] {
    data.emplace(o, ranks);
    checkpoint = checkpoint_of(o, ranks, data->corpus,
                               language_model::Timetable(o, data->training.count()).total());
    if (ranks.is_root()) csv.emplace(o.csv, language_model::csv_header, checkpoint.exists());
  });
  const Corpus& corpus = data->corpus;
  check_same_text(corpus, ranks);

  Contestant model(language_model::sparse_config<Middle>(
                       o, language_model::frequencies_of(corpus.train, corpus.vocabulary.size())),
                   ranks, ranks.communicator());
  if (ranks.is_root()) {
    language_model::print_beginning(o, corpus,
                                    std::to_string(ranks.communicator().size()) + " ranks x " +
                                        std::to_string(threads) + " threads");
  }

  language_model::Timetable timetable(o, data->training.count());
  const language_model::Place place = checkpoint.read(
      ranks.communicator(), [&](const moe::SafetensorsFile& file, const language_model::Place&) {
        model.load(file, "sparse.");
      });
  timetable.resume(place);
  const double start = examples::seconds_now() - place.seconds;
  const Index first_update = timetable.update();
  if (ranks.is_root() && first_update > 0) {
    std::printf("goes on from %s, after update %td of %td\n", checkpoint.path().c_str(),
                first_update, timetable.total());
  }
  Index saved_at = timetable.update();
  const auto save = [&] {
    checkpoint.write(ranks.communicator(), timetable.place(examples::seconds_now() - start),
                     [&](moe::SafetensorsWriter& writer) { model.save(writer, "sparse."); });
    saved_at = timetable.update();
  };
  Meter meter(ranks);
  Index evaluated_at = -1;
  Evaluation latest;
  const auto evaluate_now = [&] {
    latest = language_model::evaluate(model.model(), data->validation, o.sequences, ranks);
    evaluated_at = timetable.update();
    if (!ranks.is_root()) return;
    language_model::print_row(model.figures(), timetable.update(), latest);
    csv->add(language_model::csv_row("validation", model.figures(), timetable, o, latest));
  };

  {
    examples::ProgressBar progress(shows_progress && ranks.is_root());
    Batches::Batch batch;
    while (!timetable.is_over()) {
      const auto [seconds, interrupted] = ranks.agree(examples::seconds_now() - start);
      if (interrupted) {
        examples::interrupted = 1;  // on the other ranks too
        break;
      }
      timetable.next(seconds);
      data->training.get(timetable.batch(), batch);
      meter.measure([&] { model.update(batch, timetable); });
      if (progress.is_due()) {
        progress.draw(timetable.fraction(),
                      language_model::progress_text(timetable, {model.figures()}));
      }
      if (timetable.evaluation_is_due()) {
        progress.clear();
        evaluate_now();
        save();
      }
    }
  }
  if (timetable.update() == 0) {
    if (ranks.is_root()) std::puts("\ninterrupted before the first update");
    return;
  }
  if (saved_at != timetable.update()) save();
  if (evaluated_at != timetable.update()) evaluate_now();
  if (!timetable.is_over() && checkpoint.is_wanted()) {
    if (ranks.is_root()) {
      std::printf("\ninterrupted after update %td of %td; the same command goes on from %s\n",
                  timetable.update(), timetable.total(), o.checkpoint.c_str());
    }
    return;
  }

  const double seconds = examples::seconds_now() - start;
  const Evaluation result = language_model::evaluate(model.model(), data->test, o.sequences, ranks);
  if (ranks.is_root()) {
    language_model::print_result_header(timetable, seconds);
    language_model::print_result(model.figures(), latest, result);
    csv->add(language_model::csv_row("test", model.figures(), timetable, o, result));
  }
  const double slots = static_cast<double>(timetable.update() - first_update) *
                       static_cast<double>(o.sequences * o.steps / ranks.part().count) *
                       static_cast<double>(o.top_k);
  print_communication(ranks, meter, model.model().middle().layer().dispatch_policy().placement(),
                      slots);
  // A rank draws from its own logarithms, whose last bits may differ; one text is enough.
  const std::string text = language_model::sample(model.model(), corpus.vocabulary, 40, o.seed);
  if (ranks.is_root()) {
    std::printf("\n%s writes: %s\n\nevery row is in %s\n", model.figures().name.c_str(),
                text.c_str(), o.csv.c_str());
  }
}

int run(int argc, char** argv, const Ranks& ranks) {
  CLI::App app(
      "Trains the language model with a sparse mixture of experts on several processes, its "
      "experts spread over them:\n"
      "    mpirun -n 2 expert_parallel\n"
      "SIGINT, SIGTERM or SIGUSR1 to any of them ends the training early and still shows the "
      "results.");
  Options options = language_model::word_options();
  options.threads = 0;
  options.csv = "expert_parallel.csv";
  bool progress = false;
  language_model::add_training_options(app, options);
  language_model::add_checkpoint_option(app, options);
  app.get_option("--sequences")
      ->description("sequences in a batch of all processes together; each gets as many of them");
  app.get_option("--top-k")->description("experts K used for a token");
  app.add_option("--threads", options.threads,
                 "threads of each process; results do not depend on it")
      ->check(CLI::Range(1, 4096))
      ->default_str("the machine's cores over its processes");
  app.add_flag("--progress", progress,
               "draw a progress bar where standard error is no terminal, as under mpirun");
  examples::set_help(app, {"--data", "--experts", "--top-k", "--epochs", "--minutes", "--sequences",
                           "--checkpoint", "--seed", "--threads", "--csv", "--progress"});
  int code = -1;
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    code = ranks.is_root() ? app.exit(error) : error.get_exit_code();
  }
  // Arguments are the same for all ranks, but the files that they name need not be there for all.
  ranks.communicator().agree("the arguments", {{"the exit code", code}});
  if (code >= 0) return code;

  const moe::FlushDenormals flush;
  examples::catch_interrupts();
  for (const int signal : {SIGTERM, SIGUSR1}) std::signal(signal, examples::on_interrupt);
  train(options, progress || isatty(STDERR_FILENO) != 0, ranks);
  return 0;
}

}  // namespace expert_parallel

int main(int argc, char** argv) {
  return moe::mpi::run(&argc, &argv, [&] {
    return expert_parallel::run(argc, argv, expert_parallel::Ranks(moe::mpi::Communicator()));
  });
}
