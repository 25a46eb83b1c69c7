/// Trains a language model twice, side by side: with a sparse mixture of experts, and with a dense one
/// of the same operations a token; or the models of the paper's tables, with --study. See README.md
/// beside this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../common/csv_file.hpp"
#include "../common/help.hpp"
#include "../common/live_plot.hpp"
#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "checkpoint.hpp"
#include "command_line.hpp"
#include "competitor.hpp"
#include "contestant.hpp"
#include "contexts.hpp"
#include "corpus.hpp"
#include "load_map.hpp"
#include "mixture.hpp"
#include "options.hpp"
#include "report.hpp"
#include "serving.hpp"
#include "study.hpp"
#include "study_report.hpp"
#include "study_training.hpp"
#include "timetable.hpp"

namespace language_model {

using examples::use_threads;

void add_options(CLI::App& app, Options& o) {
  add_training_options(app, o);
  add_checkpoint_option(app, o);
  app.add_option("--picture", o.picture,
                 "picture of the experts' load in training (SVG); \"\": none")
      ->capture_default_str();
  app.add_option("--threads", o.threads,
                 "half for each model (study: models at a time); results are the same")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--groups", o.groups,
                 "groups of a third model's experts, behind a hierarchical gate; 0: no third model")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--group-experts", o.group_experts, "experts in each of its groups")
      ->check(at_least(1))
      ->capture_default_str();
  app.add_option("--mixtures", o.mixtures,
                 "1: a mixture between the LSTMs; 2: another behind the second one")
      ->check(CLI::Range(1, 2))
      ->capture_default_str();
  app.add_option("--gated", o.gated, "1: gated experts, with SiLU (SwiGLU); 0: plain, with ReLU")
      ->capture_default_str();
  app.add_option("--noise", o.noise,
                 "factor of the gates' noise at the start; 0: gates without noise")
      ->check(at_least(0))
      ->capture_default_str();
  app.add_option("--noise-until", o.noise_until,
                 "share of the training during which the noise falls to 0; 0: it stays")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  app.add_option("--dense-expert-rate", o.dense_expert_rate,
                 "learning rate of the dense model's experts, as a factor; each sees every token")
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
  auto* no_test =
      app.add_flag("!--no-test", o.test, "leave the test part unread, to choose settings");
  app.add_option("--serve", o.serve,
                 "evaluate the sparse model rounded to this format too; all: to each")
      ->check(CLI::IsMember(serving_choices()))
      ->excludes(no_test);

  auto* study = app.add_option("--study", o.study,
                               "folder: train the models of README.md's tables that are not in it");
  for (const char* other :
       {"--experts", "--top-k", "--epochs", "--minutes", "--evaluations", "--seed", "--csv",
        "--serve", "--checkpoint", "--picture", "--no-test"}) {
    study->excludes(app.get_option(other));
  }
  app.add_option("--study-tables", o.tables, "which of the study's tables")
      ->check(CLI::IsMember({"loss_weights", "experts", "balance", "recurrent", "scaling"}))
      ->needs(study)
      ->capture_default_str();
  app.add_option("--study-updates", o.updates, "updates of each of the study's models")
      ->check(at_least(1))
      ->needs(study)
      ->capture_default_str();
  app.add_option("--study-most-experts", o.most_experts,
                 "leave out the study's models of more experts, which take long")
      ->check(at_least(0))
      ->needs(study)
      ->capture_default_str();
  app.add_option("--study-seeds", o.seeds, "seeds 1, 2, ... of each of the study's models")
      ->check(at_least(1))
      ->needs(study)
      ->capture_default_str();
}

using Competitors = std::vector<std::unique_ptr<Competitor>>;

/// The dense model first, that of the options last.
Competitors make_competitors(const Options& o, const Corpus& corpus) {
  using Flat = Mixture<moe::NoisyTopKGate<float>>;
  using Hierarchical = Mixture<moe::HierarchicalGate<float>>;
  const auto frequencies = frequencies_of(corpus.train, corpus.vocabulary.size());
  const ContestantConfig<Flat> sparse = sparse_config<Flat>(o, frequencies);
  const Index scores = scores_of(sparse.model.middle.gate);
  // The operations of a gate's scores, as hidden units of the experts that are used.
  const auto units = [&](Index count) {
    const Index unit = maps_of(o.gated) * o.top_k;
    return count >= 0 ? (count + unit - 1) / unit : count / unit;
  };

  Competitors competitors;
  // The sparse model's larger gate costs operations too; the dense one gets them as hidden units.
  ContestantConfig<Flat> dense = sparse;
  dense.name = "dense";
  dense.model.middle.gate.experts = o.top_k;
  dense.expert_rate = o.dense_expert_rate;
  dense.model.middle.hidden += units(scores - scores_of(dense.model.middle.gate));
  competitors.push_back(make_competitor(dense));
  if (o.groups > 0) {
    moe::detail::require(o.groups >= 2 && o.top_k % 2 == 0, "--groups ", o.groups, " and --top-k ",
                         o.top_k, ": a token goes to two groups, to --top-k / 2 experts in each");
    ContestantConfig<Hierarchical> hierarchical = hierarchical_config<Hierarchical>(o, frequencies);
    Index& hidden = hierarchical.model.middle.hidden;
    hidden += units(scores - scores_of(hierarchical.model.middle.gate));
    moe::detail::require(hidden >= 1, "the hierarchical gate's scores take all operations of ",
                         o.experts, " experts; take fewer --group-experts than ", o.group_experts);
    competitors.push_back(make_competitor(hierarchical));
  }
  competitors.push_back(make_competitor(sparse));
  return competitors;
}

std::vector<Figures> figures_of(const Competitors& competitors) {
  std::vector<Figures> figures;
  for (const auto& competitor : competitors) figures.push_back(competitor->figures());
  return figures;
}

std::vector<examples::LivePlot::Curve> curves_of(const Competitors& competitors) {
  std::vector<examples::LivePlot::Curve> curves;
  for (const Figures& figures : figures_of(competitors)) {
    const char mark = curves.empty() ? '.' : curves.size() + 1 == competitors.size() ? '#' : 'o';
    curves.push_back({"loss of " + figures.name, mark});
  }
  return curves;
}

/// Calls f(count - 1), ... f(1), f(0), as many at the same time as there are threads, each with its
/// share of these, and returns when all are done: two small models on a core each are trained faster
/// than one after the other on two cores. The last one is the largest, so it comes first.
template <class F>
void side_by_side(std::size_t count, int threads, F f) {
  const int workers = std::min(threads, static_cast<int>(count));
  std::atomic<std::size_t> left = count;
  const auto work = [&] {
    const moe::FlushDenormals flush;
    use_threads(threads / workers);
    for (std::size_t next = left--; next > 0 && next <= count; next = left--) f(next - 1);
  };
  std::vector<std::future<void>> others;
  for (int i = 1; i < workers; ++i) others.push_back(std::async(std::launch::async, work));
  work();
  for (std::future<void>& other : others) other.get();
  use_threads(threads);
}

/// All that decides the weights of the models after the last update.
std::string comparison_settings(const Options& o, const Corpus& corpus, Index updates) {
  // Where a time decides how many updates there are, their number is an estimate.
  return training_settings(o, corpus, o.minutes > 0 ? 0 : updates) +
         print(" minutes=%g groups=%td group_experts=%td", o.minutes, o.groups, o.group_experts);
}

/// Of the models whose gates have a choice.
void write_picture(const std::string& path, const Competitors& competitors,
                   const std::vector<LoadMap>& load_maps) {
  std::vector<std::pair<std::string, LoadMap>> models;
  for (std::size_t i = 0; i < competitors.size(); ++i) {
    const Figures figures = competitors[i]->figures();
    if (figures.active < figures.experts) models.emplace_back(figures.name, load_maps[i]);
  }
  if (path.empty() || models.empty()) return;
  load_picture(models).write(path);
  std::printf("the experts' load in training is in %s\n", path.c_str());
}

/// The end: the only reading of the test part, by the trained models and by the sparse one served.
void read_test_part(const Options& o, const Competitors& competitors,
                    const std::vector<Evaluation>& latest, const Batches& validation,
                    const Batches& test, const Timetable& timetable, double seconds,
                    examples::CsvFile& csv) {
  print_result_header(timetable, seconds);
  std::vector<Evaluation> results(competitors.size());
  side_by_side(competitors.size(), o.threads,
               [&](std::size_t i) { results[i] = competitors[i]->evaluate(test, o.sequences); });
  for (std::size_t i = 0; i < competitors.size(); ++i) {
    print_result(competitors[i]->figures(), latest[i], results[i]);
    csv.add(csv_row("test", competitors[i]->figures(), timetable, o, results[i]));
  }
  if (!o.serve.empty()) {
    std::printf("\nThe sparse model with narrow weights; ratios to float32\n\n%s\n", served_header);
    std::vector<Served> rows;
    examples::ProgressBar progress;
    const std::vector<Serving> servings = servings_of(o.serve);
    for (const Serving& serving : servings) {
      progress.draw(static_cast<double>(rows.size()) / static_cast<double>(servings.size()),
                    serving.format);
      rows.push_back(competitors.back()->serve(serving, validation, test, o.sequences));
      const Served& served = rows.back();
      progress.clear();
      std::puts(served_row(served, rows.front()).c_str());
      std::fflush(stdout);
      Figures figures = competitors.back()->figures();
      figures.name += print(" %s %s", serving.format.c_str(), name_of(serving.activations).c_str());
      csv.add(csv_row("validation", figures, timetable, o, served.validation));
      csv.add(csv_row("test", figures, timetable, o, served.test));
    }
  }
}

void compare(const Options& o) {
  use_threads(o.threads);
  examples::CsvFile csv(o.csv, csv_header, Checkpoint(o.checkpoint, "").exists());
  const Corpus corpus = read_corpus(o);
  const Batches training(corpus.train, o.sequences, o.steps);
  const Batches validation(corpus.validation, o.sequences, o.steps);
  const Batches test(corpus.test, o.sequences, o.steps);
  Competitors competitors = make_competitors(o, corpus);

  print_beginning(o, corpus, std::to_string(o.threads) + " threads");

  Timetable timetable(o, training.count());
  std::vector<LoadMap> load_maps;
  for (const Figures& figures : figures_of(competitors)) load_maps.emplace_back(figures.experts);
  Checkpoint checkpoint;
  if (!o.checkpoint.empty()) {
    checkpoint = {o.checkpoint, comparison_settings(o, corpus, timetable.total())};
  }
  const Place place = checkpoint.read([&](const moe::SafetensorsFile& file, const Place& reached) {
    for (std::size_t i = 0; i < competitors.size(); ++i) {
      const std::string prefix = competitors[i]->figures().name + ".";
      competitors[i]->load(file, prefix);
      load_maps[i].resume(reached.update, file.matrix<double>(prefix + "load"));
    }
    std::printf("goes on from %s, after update %td of %td\n", o.checkpoint.c_str(), reached.update,
                timetable.total());
  });
  timetable.resume(place);
  const double start = seconds_now() - place.seconds;
  Index saved_at = timetable.update();
  const auto save = [&] {
    checkpoint.write(timetable.place(seconds_now() - start), [&](moe::SafetensorsWriter& writer) {
      for (std::size_t i = 0; i < competitors.size(); ++i) {
        const std::string prefix = competitors[i]->figures().name + ".";
        competitors[i]->save(writer, prefix);
        writer.add(prefix + "load", load_maps[i].tokens());
      }
    });
    saved_at = timetable.update();
  };
  Index evaluated_at = -1;
  std::vector<Evaluation> latest(competitors.size());
  const auto evaluate_all = [&] {
    side_by_side(competitors.size(), o.threads, [&](std::size_t i) {
      latest[i] = competitors[i]->evaluate(validation, o.sequences);
    });
    for (std::size_t i = 0; i < competitors.size(); ++i) {
      print_row(competitors[i]->figures(), timetable.update(), latest[i]);
      csv.add(csv_row("validation", competitors[i]->figures(), timetable, o, latest[i]));
    }
    evaluated_at = timetable.update();
  };

  {
    examples::LivePlot plot(curves_of(competitors));
    Batches::Batch batch;
    while (!timetable.is_over() && !examples::interrupted) {
      timetable.next(seconds_now() - start);
      training.get(timetable.batch(), batch);
      side_by_side(competitors.size(), o.threads,
                   [&](std::size_t i) { competitors[i]->update(batch, timetable); });
      const std::vector<Figures> figures = figures_of(competitors);
      for (std::size_t i = 0; i < figures.size(); ++i) {
        plot.add(i, timetable.fraction(), figures[i].loss);
        load_maps[i].add(competitors[i]->balance());
      }
      if (plot.is_due()) plot.draw(timetable.fraction(), progress_text(timetable, figures));
      if (timetable.evaluation_is_due()) {
        plot.clear();
        evaluate_all();
        save();
      }
    }
  }
  if (timetable.update() == 0) {
    std::puts("\ninterrupted before the first update");
    return;
  }
  if (saved_at != timetable.update()) save();
  if (evaluated_at != timetable.update()) evaluate_all();
  if (!timetable.is_over() && checkpoint.is_wanted()) {
    // The test part is left for the end of the training.
    std::printf("\ninterrupted after update %td of %td; the same command goes on from %s\n",
                timetable.update(), timetable.total(), o.checkpoint.c_str());
    write_picture(o.picture, competitors, load_maps);
    return;
  }

  if (o.test) {
    read_test_part(o, competitors, latest, validation, test, timetable, seconds_now() - start, csv);
  } else {
    std::puts("\nthe test part was not read");
  }
  std::puts("");
  const Index length = o.unit == Unit::word ? 40 : 300;
  for (const auto& competitor : competitors) {
    std::printf("%s writes: %s\n\n", competitor->figures().name.c_str(),
                competitor->sample(corpus.vocabulary, length, o.seed).c_str());
  }
  std::printf(
      "What is routed to the six experts between the sparse model's LSTMs that have the fewest "
      "contexts\n\n");
  print_contexts(competitors.back()->contexts(validation, corpus.vocabulary, o.sequences,
                                              200000 / (o.sequences * o.steps) + 1, 6));
  std::printf("\nevery row is in %s\n", o.csv.c_str());
  write_picture(o.picture, competitors, load_maps);
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
      "of the same operations a character, and compares them on held-out text. Ctrl-C ends the "
      "training early and still shows the results.");
  // The other options' defaults depend on these.
  const auto is_given = [&](std::string_view option) {
    return std::find(argv, argv + argc, option) != argv + argc;
  };
  language_model::Options options = is_given("--words")  ? language_model::word_options()
                                    : is_given("--full") ? language_model::full_options()
                                                         : language_model::Options();
  bool asked = false;
  auto* words = app.add_flag("--words", asked,
                             "the paper's model of words, by default on WordNet's definitions");
  app.add_flag("--full", asked,
               "one reading of the text, and a third model, whose 256 experts in each mixture are "
               "in 4 groups")
      ->excludes(words);
  language_model::add_options(app, options);
  examples::set_help(
      app, {"--words", "--full", "--data", "--experts", "--top-k", "--epochs", "--minutes",
            "--serve", "--study", "--checkpoint", "--seed", "--threads", "--csv", "--picture"});
  CLI11_PARSE(app, argc, argv);
  examples::catch_interrupts();
  const moe::FlushDenormals flush;
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
