/// Trains the language model of Shazeer et al. 2017 twice, side by side: with a sparse mixture of
/// experts, and with a dense one of the same operations a token; or the models of the paper's
/// tables, with --study. See README.md beside this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "contestant.hpp"
#include "corpus.hpp"
#include "mixture.hpp"
#include "options.hpp"
#include "report.hpp"
#include "study.hpp"
#include "study_report.hpp"
#include "study_training.hpp"

namespace language_model {

using examples::use_threads;

void add_options(CLI::App& app, Options& o) {
  const auto at_least = [](double lowest) { return CLI::Range(lowest, 1e9); };
  app.add_option("--data", o.data, "UTF-8 text files, a document a line, instead of WordNet")
      ->check(CLI::ExistingFile);
  app.add_option("--wordnet", o.wordnet, "folder with WordNet's data.noun and its sisters")
      ->capture_default_str();
  app.add_option("--vocabulary", o.vocabulary, "how many of the most frequent words are known")
      ->check(at_least(3))
      ->capture_default_str();
  app.add_option(
         "--cutoffs", o.cutoffs,
         "adaptive softmax: the first word of each tail, words being numbered from the most "
         "frequent on; one as large as the vocabulary makes it a full softmax")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--shrink", o.shrink,
                 "adaptive softmax: how much narrower each tail is than the words before it")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--width", o.width, "width D of the model")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--hidden", o.hidden, "hidden width H of an expert")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--experts", o.experts, "experts E of the sparse model")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--active", o.active,
                 "experts K used for a word; the dense model has as many and uses them all")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--sequences", o.sequences, "sequences in a batch")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--steps", o.steps, "words of a sequence in a batch")
      ->check(at_least(1))
      ->capture_default_str();
  auto* epochs = app.add_option("--epochs", o.epochs, "how often the training text is read")
                     ->check(at_least(0))
                     ->capture_default_str();
  app.add_option("--minutes", o.minutes, "train for so long instead, evaluations included")
      ->check(at_least(0))
      ->excludes(epochs);
  app.add_option("--learning-rate", o.learning_rate,
                 "highest learning rate of Adam; it grows at first, then falls linearly to 0")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--gate-rate", o.gate_rate, "learning rate of the gate's scores, as a factor")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--noise-rate", o.noise_rate, "learning rate of the gate's noise, as a factor")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--expert-rate", o.expert_rate,
                 "learning rate of the experts, as a factor; each sees few of the words")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--threshold-rate", o.threshold_rate,
                 "learning rate of the study's strictly balanced gate's thresholds, as a factor")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--bias-rate", o.bias_rate,
                 "what an update moves the selection biases of the study's loss-free gate by")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--warm-up", o.warm_up, "updates during which the learning rate grows")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--embedding-deviation", o.embedding_deviation,
                 "deviation of the normal distribution that embeddings start from")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--dropout", o.dropout, "probability of dropping an activation")
      ->check(CLI::Range(0.0, 0.99))
      ->capture_default_str();
  app.add_option("--clip", o.clip, "largest norm of the gradient of an update")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--importance-weight", o.importance_weight, "weight of the importance loss")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--load-weight", o.load_weight, "weight of the load loss")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--evaluations", o.evaluations, "how often the validation part is read")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--seed", o.seed, "of the weights, the noise and dropout")->capture_default_str();
  app.add_option(
         "--threads", o.threads,
         "threads, half of them for each model (in a study, models at a time); results do not "
         "depend on it")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--csv", o.csv, "file for every row, to plot")->capture_default_str();

  auto* study =
      app.add_option("--study", o.study,
                     "folder: train every model of the tables in README.md instead, as many at a "
                     "time as there are threads; what is in the folder is not trained again");
  for (const char* other : {"--experts", "--active", "--epochs", "--minutes", "--importance-weight",
                            "--load-weight", "--evaluations", "--seed", "--csv"}) {
    study->excludes(app.get_option(other));
  }
  app.add_option("--study-tables", o.tables, "which of the study's tables")
      ->check(CLI::IsMember(o.tables))
      ->needs(study)
      ->capture_default_str();
  app.add_option("--study-updates", o.updates, "updates of each of the study's models")
      ->check(at_least(1))
      ->needs(study)
      ->capture_default_str();
  app.add_option("--study-seeds", o.seeds, "seeds 1, 2, ... of each of the study's models")
      ->check(at_least(1))
      ->needs(study)
      ->capture_default_str();
}

using SparseMiddle = Mixture<moe::NoisyTopKGate<float>>;
using Competitor = Contestant<SparseMiddle>;

std::vector<Competitor> make_contestants(const Options& o, const Corpus& corpus) {
  const Index vocabulary = corpus.vocabulary.size();
  Competitor::Config sparse =
      contestant_config<SparseMiddle>(o, frequencies_of(corpus.train, vocabulary));
  sparse.name = "sparse";
  sparse.model.middle = {.gate = {.experts = o.experts,
                                  .active = o.active,
                                  .importance_weight = o.importance_weight,
                                  .load_weight = o.load_weight},
                         .hidden = o.hidden};
  Competitor::Config dense = sparse;
  dense.name = "dense";
  dense.model.middle.gate.experts = o.active;
  // The sparse model's larger gate costs operations too; the dense one gets them as hidden units.
  const Index gate = 2 * o.width * (o.experts - o.active);
  const Index unit = 2 * o.width * o.active;
  dense.model.middle.hidden += (gate + unit - 1) / unit;
  std::vector<Competitor> contestants;
  contestants.emplace_back(dense);
  contestants.emplace_back(sparse);
  return contestants;
}

/// Calls f(0), f(1), ... f(count - 1) at the same time, each with its share of the threads, and
/// returns when all are done: two small models on a core each are trained faster than one after the
/// other on two cores. With fewer threads than that, one after the other.
template <class F>
void side_by_side(std::size_t count, int threads, F f) {
  const int share = threads / static_cast<int>(count);
  if (share < 1) {
    for (std::size_t i = 0; i < count; ++i) f(i);
    return;
  }
  const auto run = [&](std::size_t i) {
    use_threads(share);
    f(i);
  };
  std::vector<std::future<void>> others;
  for (std::size_t i = 1; i < count; ++i) {
    others.push_back(std::async(std::launch::async, run, i));
  }
  run(0);
  for (std::future<void>& other : others) other.get();
  use_threads(threads);
}

Corpus read_corpus(const Options& o) {
  return make_corpus(o.data.empty() ? read_wordnet(o.wordnet) : read_text(o.data), o.vocabulary);
}

void compare(const Options& o) {
  use_threads(o.threads);
  examples::CsvFile csv(o.csv, csv_header);
  const Corpus corpus = read_corpus(o);
  const Batches training(corpus.train, o.sequences, o.steps);
  const Batches validation(corpus.validation, o.sequences, o.steps);
  const Batches test(corpus.test, o.sequences, o.steps);
  std::vector<Competitor> contestants = make_contestants(o, corpus);

  std::printf("%zu words to train on, %zu for validation, %zu for the test; vocabulary %td\n",
              corpus.train.size(), corpus.validation.size(), corpus.test.size(),
              corpus.vocabulary.size());
  std::printf("batches of %td x %td words, %d threads, seed %ju\n", o.sequences, o.steps, o.threads,
              static_cast<std::uintmax_t>(o.seed));
  std::puts(
      "operations: multiply-adds a word between embedding and softmax; "
      "perplexity: on the validation part\n");
  std::puts(row_header);

  const double start = seconds_now();
  const auto planned = static_cast<double>(training.count()) * o.epochs;
  Index total = o.minutes > 0 ? o.warm_up + 1 : std::max<Index>(1, static_cast<Index>(planned));
  Index update = 0;
  Index evaluated_at = 0;
  Index evaluations = 0;
  std::vector<Evaluation> latest(contestants.size());
  const auto evaluate_all = [&] {
    side_by_side(contestants.size(), o.threads, [&](std::size_t i) {
      latest[i] = evaluate(contestants[i].model(), validation, o.sequences);
    });
    for (std::size_t i = 0; i < contestants.size(); ++i) {
      print_row(contestants[i], update, latest[i]);
      csv.add(
          csv_row("validation", contestants[i], update, update * o.sequences * o.steps, latest[i]));
    }
    evaluated_at = update;
  };

  {
    examples::ProgressBar progress;
    Batches::Batch batch;
    double fraction = 0;
    while (fraction < 1 && !examples::interrupted) {
      ++update;
      if (o.minutes > 0) {
        // How many updates there will be is an estimate that gets better; the learning rate and
        // the evaluations follow it.
        fraction = (seconds_now() - start) / (60 * o.minutes);
        total = std::max(
            {update, o.warm_up + 1, static_cast<Index>(static_cast<double>(update) / fraction)});
      } else {
        fraction = static_cast<double>(update) / static_cast<double>(total);
      }
      const Index index = (update - 1) % training.count();
      training.get(index, batch);
      const moe::WarmUpLinearDecay learning_rate{
          .peak = o.learning_rate, .warm_up = std::min(o.warm_up, total), .total = total + 1};
      side_by_side(contestants.size(), o.threads, [&](std::size_t i) {
        if (index == 0) contestants[i].start_epoch();
        contestants[i].update(batch, static_cast<std::uint64_t>(update), learning_rate(update));
      });
      draw(progress, fraction, update, total, contestants);
      if (fraction * static_cast<double>(o.evaluations) >= static_cast<double>(evaluations + 1)) {
        ++evaluations;
        progress.clear();
        evaluate_all();
      }
    }
  }
  if (evaluated_at != update) evaluate_all();

  if (examples::interrupted) std::printf("\ninterrupted after update %td of %td\n", update, total);
  std::printf("\nPerplexity after %td updates, %.0f s; balance on the test part\n\n", update,
              seconds_now() - start);
  print_result_header();
  std::vector<Evaluation> results(contestants.size());
  side_by_side(contestants.size(), o.threads, [&](std::size_t i) {
    results[i] = evaluate(contestants[i].model(), test, o.sequences);
  });
  for (std::size_t i = 0; i < contestants.size(); ++i) {
    print_result(contestants[i], latest[i], results[i]);
    csv.add(csv_row("test", contestants[i], update, update * o.sequences * o.steps, results[i]));
  }
  std::puts("");
  for (const Competitor& contestant : contestants) {
    std::printf("%s writes: %s\n", contestant.name().c_str(),
                sample(contestant.model(), corpus.vocabulary, 40, o.seed).c_str());
  }
  std::printf("\nevery row is in %s\n", o.csv.c_str());
}

/// A name for the text, for the configuration of the study's runs.
std::string name_of(const Corpus& corpus) {
  std::string all;
  for (const auto* part : {&corpus.train, &corpus.validation, &corpus.test}) {
    for (const Index word : *part) all += std::to_string(word) + " ";
    all += "\n";
  }
  return print(" text=%016jx", static_cast<std::uintmax_t>(hash_of(all)));
}

void study(const Options& o) {
  const std::vector<Table> tables = tables_of(o);
  const std::vector<Run> runs = runs_of(tables, o);
  std::filesystem::create_directories(o.study);
  StudyFile file(std::filesystem::path(o.study) / "study.csv");
  const Corpus corpus = read_corpus(o);
  const Texts texts{frequencies_of(corpus.train, corpus.vocabulary.size()),
                    Batches(corpus.train, o.sequences, o.steps),
                    Batches(corpus.validation, o.sequences, o.steps),
                    Batches(corpus.test, o.sequences, o.steps)};
  const std::string text = name_of(corpus);
  train_missing(runs, o, text, o.threads, file,
                [&](const Run& run, Progress& progress) { return train(run, o, texts, progress); });
  report(tables, o, text, file, o.study);
}

}  // namespace language_model

int main(int argc, char** argv) {
  CLI::App app(
      "Trains a language model with a sparse mixture of experts on real text, beside a dense model "
      "of the same operations a word, and compares them on held-out text.\n"
      "Ctrl-C ends the training early and still shows the results.");
  language_model::Options options;
  language_model::add_options(app, options);
  CLI11_PARSE(app, argc, argv);
  examples::catch_interrupts();
  try {
    if (options.study.empty()) {
      language_model::compare(options);
    } else {
      language_model::study(options);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "language_model: %s\n", error.what());
    return 1;
  }
}
