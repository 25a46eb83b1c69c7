/// Trains the language model of Shazeer et al. 2017 twice, side by side: with a sparse mixture of
/// experts, and with a dense one of the same operations a token. See README.md beside this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <future>
#include <string>
#include <utility>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/terminal.hpp"
#include "contestant.hpp"
#include "corpus.hpp"
#include "report.hpp"

namespace language_model {

struct Options {
  std::vector<std::string> data;
  std::string wordnet = "/usr/share/wordnet";
  Index vocabulary = 8000;
  std::vector<Index> cutoffs{500, 2000};
  Index shrink = 2;
  Index width = 96;
  Index hidden = 96;
  Index experts = 64;
  Index active = 4;
  Index sequences = 64;
  Index steps = 16;
  double epochs = 2.45;
  double minutes = 0;
  double learning_rate = 1e-2;
  Index warm_up = 100;
  double gate_rate = 3;
  double noise_rate = 0.03;
  double expert_rate = 0.3;
  double embedding_deviation = 0.1;
  double dropout = 0;
  double clip = 1.0;
  double importance_weight = 0.1;
  double load_weight = 0.1;
  Index evaluations = 2;
  std::uint64_t seed = 1;
  int threads = static_cast<int>(moe::worker_count());
  std::string csv = "language_model.csv";
};

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
  app.add_option("--threads", o.threads,
                 "threads, half of them for each model; results do not depend on it")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--csv", o.csv, "file for every row, to plot")->capture_default_str();
}

std::vector<Contestant> make_contestants(const Options& o, const Corpus& corpus) {
  const Index vocabulary = corpus.vocabulary.size();
  const Model::Config sparse{.vocabulary = vocabulary,
                             .width = o.width,
                             .hidden = o.hidden,
                             .experts = o.experts,
                             .active = o.active,
                             .cutoffs = o.cutoffs,
                             .shrink = o.shrink,
                             .embedding_deviation = o.embedding_deviation,
                             .dropout = o.dropout,
                             .importance_weight = o.importance_weight,
                             .load_weight = o.load_weight,
                             .seed = o.seed};
  Model::Config dense = sparse;
  dense.experts = o.active;
  // The sparse model's larger gate costs operations too; the dense one gets them as hidden units.
  const Index gate = 2 * o.width * (o.experts - o.active);
  const Index unit = 2 * o.width * o.active;
  dense.hidden += (gate + unit - 1) / unit;
  Contestant::Config config{.sequences = o.sequences,
                            .clip = o.clip,
                            .gate_rate = o.gate_rate,
                            .noise_rate = o.noise_rate,
                            .expert_rate = o.expert_rate,
                            .frequencies = frequencies_of(corpus.train, vocabulary)};
  std::vector<Contestant> contestants;
  for (const auto& [name, model] : {std::pair{"dense", dense}, std::pair{"sparse", sparse}}) {
    config.name = name;
    config.model = model;
    contestants.emplace_back(config);
  }
  return contestants;
}

void use_threads([[maybe_unused]] int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);  // of regions that the calling thread opens
#endif
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

void run(const Options& o) {
  use_threads(o.threads);
  examples::CsvFile csv(o.csv, csv_header);
  const Corpus corpus =
      make_corpus(o.data.empty() ? read_wordnet(o.wordnet) : read_text(o.data), o.vocabulary);
  const Batches training(corpus.train, o.sequences, o.steps);
  const Batches validation(corpus.validation, o.sequences, o.steps);
  const Batches test(corpus.test, o.sequences, o.steps);
  std::vector<Contestant> contestants = make_contestants(o, corpus);

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
  for (const Contestant& contestant : contestants) {
    std::printf("%s writes: %s\n", contestant.name().c_str(),
                sample(contestant.model(), corpus.vocabulary, 40, o.seed).c_str());
  }
  std::printf("\nevery row is in %s\n", o.csv.c_str());
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
    language_model::run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "language_model: %s\n", error.what());
    return 1;
  }
}
