#include <algorithm>
#include <fstream>
#include <iterator>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../examples/language_model/study_report.hpp"
#include "../../examples/language_model/study_training.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

using namespace language_model;
using Catch::Matchers::Contains;
using moe::test::TemporaryFolder;

namespace {

std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void append(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary | std::ios::app) << text;
}

/// A study of the table that has three gates, all of whose runs are quick.
Options small_options() {
  Options o = word_options();
  o.tables = {"balance"};
  o.vocabulary = 12;
  o.cutoffs = {6};
  o.width = 8;
  o.sequences = 2;
  o.steps = 4;
  o.updates = 3;
  o.seeds = 2;
  return o;
}

Texts made_up_texts(const Options& o, std::vector<Index>& stream) {
  for (std::uint32_t i = 0; i < 100; ++i) {
    stream.push_back(static_cast<Index>(moe::philox({i, 0, 0, 0}, 5)[0] % 12));
  }
  const Batches batches(stream, o.sequences, o.steps);
  return {frequencies_of(stream, o.vocabulary), batches, batches, batches};
}

/// A result by which its run is known.
Result figures_of(const Run& run) {
  return {.operations = 1000,
          .parameters = 2e6,
          .seconds = 0.125,
          .validation = static_cast<double>(run.seed),
          .test = 100 + static_cast<double>(run.seed),
          .cv_importance = run.importance_weight};
}

/// Runs what is missing and tells which runs that were.
std::vector<std::string> runs_made(const std::string& path, const Options& o, int workers = 2) {
  std::vector<std::string> made;
  std::mutex mutex;
  StudyFile file(path);
  const bool all = train_missing(runs_of(tables_of(o), o), o, " text=1", workers, file,
                                 [&](const Run& run, Progress&) -> std::optional<Result> {
                                   const std::lock_guard lock(mutex);
                                   made.push_back(configuration_of(run, o));
                                   return figures_of(run);
                                 });
  CHECK(all);
  return made;
}

}  // namespace

TEST_CASE("language model: the study's runs", "[examples][language_model]") {
  const Options o = word_options();
  const std::vector<Run> runs = runs_of(tables_of(o), o);
  CHECK(runs.size() == 3 * (6 + 9 + 3 - 2));  // 64 experts with weights of 0.1 are in all tables
  std::set<std::string> configurations;
  for (const Run& run : runs) configurations.insert(configuration_of(run, o));
  CHECK(configurations.size() == runs.size());
  CHECK(std::is_sorted(runs.begin(), runs.end(),
                       [](const Run& a, const Run& b) { return a.seed < b.seed; }));
  CHECK(runs.front().experts == 1024);

  // Those of characters have larger models; what two tables have in common is trained once.
  Options characters;
  characters.tables = {"experts", "scaling"};
  CHECK(runs_of(tables_of(characters), characters).size() == 3 * (12 + 2 * 5));
  const Table scaling = scaling_table(characters);
  REQUIRE(scaling.rows.size() == 15);
  CHECK(scaling.rows[0].label == "4 experts, all used, 158 updates");
  CHECK(scaling.rows[8].label == "256 experts, 475 updates");
  CHECK(scaling.rows[14].label == "1024 experts, hierarchical, 1425 updates");
  CHECK(updates_of(scaling.rows[8].run, characters) == 475);
  CHECK(updates_of(scaling.rows[14].run, characters) == 1425);

  // Those of 4096 experts can be left out: one behind a hierarchical gate, one behind product keys.
  characters.tables = {"experts"};
  characters.most_experts = 1024;
  const std::vector<Table> smaller = tables_of(characters);
  REQUIRE(smaller.size() == 1);
  REQUIRE(smaller[0].rows.size() == 10);
  CHECK(smaller[0].rows[8].label == "1024 experts, hierarchical");
  CHECK(smaller[0].rows[9].label == "1024 experts, product keys");

  // Without noise its rows would differ by the weight of a loss that has no gradient.
  characters.tables = {"loss_weights"};
  REQUIRE(characters.noise == 0);
  CHECK_THROWS_WITH(tables_of(characters), Contains("loss_weights needs --noise above 0"));
  characters.tables = {"balance"};
  CHECK(tables_of(characters)[0].rows[0].label == "top-k, importance loss");
  CHECK(tables_of(characters)[0].rows[0].run.importance_weight == 0.3);

  Options too_narrow = o;
  too_narrow.hidden = 32;
  CHECK_THROWS_WITH(tables_of(too_narrow), Contains("--hidden 32"));
}

TEST_CASE("language model: every setting is part of a run's configuration",
          "[examples][language_model]") {
  const Options o = word_options();
  const Run run{.experts = 64, .top_k = 4, .hidden = 96};
  std::set<std::string> all{configuration_of(run, o)};
  std::size_t changes = 1;
  const auto option = [&](auto member, auto value) {
    Options changed = o;
    changed.*member = value;
    all.insert(configuration_of(run, changed));
    ++changes;
  };
  option(&Options::unit, Unit::character);
  option(&Options::memory, Index{7});
  option(&Options::mixtures, Index{2});
  option(&Options::pre_norm, true);
  option(&Options::gate_deviation, 0.5);
  option(&Options::gated, true);
  option(&Options::noise, 0.5);
  option(&Options::noise_until, 0.5);
  option(&Options::factored, true);
  option(&Options::updates, Index{7});
  option(&Options::vocabulary, Index{7});
  option(&Options::cutoffs, std::vector<Index>{500});
  option(&Options::shrink, Index{7});
  option(&Options::width, Index{7});
  option(&Options::sequences, Index{7});
  option(&Options::steps, Index{7});
  option(&Options::learning_rate, 0.1 + 0.2);
  option(&Options::learning_rate, 0.3);
  option(&Options::warm_up, Index{7});
  option(&Options::gate_rate, 0.5);
  option(&Options::noise_rate, 0.5);
  option(&Options::threshold_rate, 0.5);
  option(&Options::bias_rate, 0.5);
  option(&Options::expert_rate, 0.5);
  option(&Options::dense_expert_rate, 0.5);
  option(&Options::embedding_deviation, 0.5);
  option(&Options::dropout, 0.5);
  option(&Options::clip, 0.5);
  const auto field = [&](auto member, auto value) {
    Run changed = run;
    changed.*member = value;
    all.insert(configuration_of(changed, o));
    ++changes;
  };
  field(&Run::kind, Kind::balanced);
  field(&Run::experts, Index{7});
  field(&Run::top_k, Index{7});
  field(&Run::hidden, Index{7});
  field(&Run::groups, Index{7});
  field(&Run::top_k_groups, Index{7});
  field(&Run::layers, Index{7});
  field(&Run::memory, Index{7});
  field(&Run::importance_weight, 0.5);
  field(&Run::load_weight, 0.5);
  field(&Run::seed, std::uint64_t{7});
  field(&Run::updates, Index{9});
  CHECK(all.size() == changes);
}

TEST_CASE("language model: a study goes on where it was stopped", "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("study.csv");
  const Options o = small_options();
  CHECK(runs_made(path, o).size() == 6);
  const std::string whole = content_of(path);
  CHECK(std::count(whole.begin(), whole.end(), '\n') == 7);
  CHECK(runs_made(path, o).empty());
  CHECK(content_of(path) == whole);

  SECTION("a line that is not whole is run again, wherever it was cut") {
    const std::size_t last = whole.rfind('\n', whole.size() - 2) + 1;
    for (const std::size_t cut : {last + 1, (last + whole.size()) / 2, whole.size() - 1}) {
      std::filesystem::resize_file(path, cut);
      CHECK(runs_made(path, o).size() == 1);
      CHECK(content_of(path).size() == whole.size());
      CHECK(runs_made(path, o).empty());
    }
    std::filesystem::resize_file(path, last);
    CHECK(runs_made(path, o).size() == 1);
  }
  SECTION("a header that is not whole") {
    std::filesystem::resize_file(path, 10);
    CHECK(runs_made(path, o).size() == 6);
    CHECK(content_of(path).size() == whole.size());
  }
  SECTION("other settings are other runs, and both stay") {
    Options longer = o;
    longer.updates = 4;
    CHECK(runs_made(path, longer).size() == 6);
    CHECK(runs_made(path, longer).empty());
    CHECK(runs_made(path, o).empty());
    longer.seeds = 3;
    CHECK(runs_made(path, longer).size() == 3);
  }
  SECTION("other text is other runs") {
    StudyFile file(path);
    int made = 0;
    train_missing(runs_of(tables_of(o), o), o, " text=2", 1, file,
                  [&](const Run& run, Progress&) -> std::optional<Result> {
                    ++made;
                    return figures_of(run);
                  });
    CHECK(made == 6);
  }
  SECTION("what no study wrote is left alone") {
    append(path, "1,2,3\n");
    CHECK_THROWS_WITH(StudyFile(path), Contains("study.csv:8"));
    CHECK(content_of(path) == whole + "1,2,3\n");
    const std::string other = folder.file("other.csv");
    append(other, "a,b\n1,2\n");
    CHECK_THROWS_WITH(StudyFile(other), Contains("other.csv:1"));
    CHECK(content_of(other) == "a,b\n1,2\n");
    const std::string text = folder.file("text");
    append(text, "no line at all");
    CHECK_THROWS_WITH(StudyFile(text), Contains("is not a file of a study"));
    CHECK(content_of(text) == "no line at all");
  }
}

TEST_CASE("language model: a result comes back from the file with the same bits",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("study.csv");
  Result result;
  double value = 0.1;
  Result::for_each(result, [&](const char*, double& figure) { figure = value *= 1.7; });
  result.cv_load = std::numeric_limits<double>::quiet_NaN();
  StudyFile(path).add("a b=1", result);
  const StudyFile file(path);
  CHECK(!file.find("a b=2"));
  const auto found = file.find("a b=1");
  REQUIRE(found);
  CHECK(found->test == result.test);
  CHECK(found->operations == result.operations);
  CHECK(found->unused_experts == result.unused_experts);
  CHECK(std::isnan(found->cv_load));
}

TEST_CASE("language model: a study that is stopped keeps what is done and nothing half",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("study.csv");
  const Options o = small_options();
  const std::vector<Run> runs = runs_of(tables_of(o), o);
  SECTION("by Ctrl-C") {
    StudyFile file(path);
    int started = 0;
    const bool all = train_missing(runs, o, "", 1, file,
                                   [&](const Run& run, Progress& p) -> std::optional<Result> {
                                     if (++started == 1) return figures_of(run);
                                     examples::interrupted = 1;
                                     while (!*p.stop) std::this_thread::yield();
                                     return std::nullopt;
                                   });
    examples::interrupted = 0;
    CHECK(!all);
    CHECK(started == 2);
  }
  SECTION("by an exception") {
    StudyFile file(path);
    int started = 0;
    CHECK_THROWS_WITH(train_missing(runs, o, "", 1, file,
                                    [&](const Run& run, Progress&) -> std::optional<Result> {
                                      if (++started == 2) throw std::runtime_error("out of luck");
                                      return figures_of(run);
                                    }),
                      "out of luck");
    CHECK(started == 2);
  }
  const std::string text = content_of(path);
  CHECK(std::count(text.begin(), text.end(), '\n') == 2);
}

TEST_CASE("language model: the study's tables", "[examples][language_model]") {
  const TemporaryFolder folder;
  Options o = small_options();
  o.tables = {"loss_weights"};
  o.seeds = 3;
  const Table table = loss_weight_table(o);
  StudyFile file(folder.file("study.csv"));
  const double tests[] = {62, 63, 65.5};
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    Run run = table.rows[3].run;
    run.seed = seed;
    Result result = figures_of(run);
    result.test = tests[seed - 1];
    result.cv_load = 0.25 * static_cast<double>(seed);
    result.max_over_mean_load = 1.5;
    file.add(configuration_of(run, o), result);
  }
  const std::string text = text_of(table, o, "", file);
  CHECK_THAT(text, Contains("\n| 0.1, 0.1 | 1000 | 2.000 M | 0 | 2.00 | 62.00 / 63.00 / 65.50 | "
                            "63.50 | 1.80 | 0.10 (0.10-0.10) | 0.50 (0.25-0.75) | "
                            "1.50 (1.50-1.50) | 35.6 | 0.06 | 0.05 | 1.14 |\n"));
  CHECK_THAT(text, Contains("\n| 1, 1 | | | | | | | | | | | 35.7 | 0.03 | 0.02 | 1.07 |\n"));
  CHECK(points_of(table, o, "", file) ==
        "\"64 experts\"\n"
        "3 \"0.1, 0.1\" 64 1 62.0000 0.10000 0.25000 1.50000\n"
        "3 \"0.1, 0.1\" 64 2 63.0000 0.10000 0.50000 1.50000\n"
        "3 \"0.1, 0.1\" 64 3 65.5000 0.10000 0.75000 1.50000\n");
  report({table}, o, "", file, folder.file(""));
  CHECK(content_of(folder.file("tables.md")) == text);
}

TEST_CASE("language model: a run's figures do not depend on what is trained beside it",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const Options o = small_options();
  std::vector<Index> stream;
  const Texts texts = made_up_texts(o, stream);
  const std::vector<Run> runs{
      {.experts = 6, .top_k = 2, .hidden = 5, .importance_weight = 0.1, .load_weight = 0.1},
      {.kind = Kind::recurrent, .hidden = 5, .layers = 2},
      {.kind = Kind::recurrent, .memory = 5}};
  const auto study = [&](const std::string& path, int workers) {
    StudyFile file(path);
    CHECK(train_missing(runs, o, "", workers, file, [&](const Run& run, Progress& p) {
      return run.kind == Kind::recurrent
                 ? train_as<RecurrentStack<>>(run, o, texts, p)
                 : train_as<Mixture<moe::NoisyTopKGate<float>>>(run, o, texts, p);
    }));
    std::vector<Result> results;
    for (const Run& run : runs) results.push_back(*file.find(configuration_of(run, o)));
    return results;
  };
  const std::vector<Result> alone = study(folder.file("1.csv"), 1);
  const std::vector<Result> beside = study(folder.file("3.csv"), 3);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    CHECK(alone[i].validation == beside[i].validation);
    CHECK(alone[i].test == beside[i].test);
    CHECK(alone[i].cv_importance == beside[i].cv_importance);
    CHECK(alone[i].validation == alone[i].test);  // the same text here
    CHECK(alone[i].test > 1);
    CHECK(alone[i].test < 20);
  }
  CHECK(alone[0].operations == 16 * 64 + 2 * 8 * 6 + 2 * 2 * 8 * 5);
  CHECK(alone[1].operations == 16 * 64 + 2 * ((8 + 5) * 4 * 5 + 5 * 8));
  CHECK(alone[2].operations == 2 * ((8 + 5) * 4 * 5 + 5 * 8));
}
