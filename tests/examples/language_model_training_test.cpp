#include <filesystem>
#include <string>
#include <vector>

#include "../../examples/language_model/checkpoint.hpp"
#include "../../examples/language_model/competitor.hpp"
#include "../../examples/language_model/load_map.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

/// \file
/// Trainings of the language model that go on from a file, and the picture of their experts' load.

using namespace language_model;
using Catch::Matchers::Contains;
using moe::test::TemporaryFolder;

namespace {

using Flat = Mixture<moe::NoisyTopKGate<float>>;

Options small_options(Unit unit) {
  Options o = unit == Unit::word ? word_options() : Options();
  o.vocabulary = 12;
  if (unit == Unit::word) o.cutoffs = {6};
  o.width = 8;
  o.memory = unit == Unit::word ? 0 : 6;
  o.hidden = 4;
  o.experts = 6;
  o.top_k = 2;
  o.sequences = 2;
  o.steps = 4;
  o.epochs = 1.5;
  o.warm_up = 3;
  o.dropout = 0.1;
  o.evaluations = 5;
  return o;
}

std::vector<Index> made_up_text() {
  std::vector<Index> stream;
  for (std::uint32_t i = 0; i < 80; ++i) {
    stream.push_back(static_cast<Index>(moe::philox({i, 0, 0, 0}, 5)[0] % 12));
  }
  return stream;
}

/// A model, and where its training is.
struct Training {
  explicit Training(const Options& o, const Batches& text)
      : batches(text),
        timetable(o, batches.count()),
        model(sparse_config<Flat>(o, std::vector<double>(12, 1. / 12))) {}

  void update() {
    timetable.next(0);
    Batches::Batch batch;
    batches.get(timetable.batch(), batch);
    model.update(batch, timetable);
    timetable.evaluation_is_due();
  }

  const Batches& batches;
  Timetable timetable;
  Contestant<Flat> model;
};

void write(const Checkpoint& checkpoint, Training& training) {
  checkpoint.write(training.timetable.place(12.5),
                   [&](moe::SafetensorsWriter& writer) { training.model.save(writer, "a."); });
}
double read(const Checkpoint& checkpoint, Training& training) {
  const Place place = checkpoint.read([&](const moe::SafetensorsFile& file, const Place& reached) {
    training.model.load(file, "a.");
    CHECK(reached.seconds == 12.5);
  });
  training.timetable.resume(place);
  return place.seconds;
}

bool have_same_weights(const Contestant<Flat>& a, const Contestant<Flat>& b) {
  std::vector<const moe::Matrix<float>*> values;
  moe::for_each_parameter(a.model(), [&](const std::string&, const auto& parameter) {
    values.push_back(&parameter.value);
  });
  std::size_t i = 0;
  bool same = true;
  moe::for_each_parameter(b.model(), [&](const std::string&, const auto& parameter) {
    same = same && parameter.value == *values[i++];
  });
  return same && i == values.size();
}

moe::Balance<float> balance_of(std::vector<Index> tokens) {
  moe::Balance<float> balance;
  balance.tokens_per_expert.assign(tokens.begin(), tokens.end());
  return balance;
}

}  // namespace

TEST_CASE("language model: a training that goes on ends in the numbers of an unbroken one",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::vector<Index> stream = made_up_text();
  const Unit unit = GENERATE(Unit::word, Unit::character);
  Options o = small_options(unit);
  o.factored = GENERATE(true, false);
  const Batches text(stream, o.sequences, o.steps);  // 9 batches: 13 updates, with a second reading
  Training whole(o, text);
  REQUIRE(whole.timetable.total() == 13);
  while (!whole.timetable.is_over()) whole.update();

  const Checkpoint checkpoint(folder.file("training.safetensors"), "settings=1");
  // Before the first update, within a reading, where one ends, and at the end.
  for (const Index updates : {0, 1, 5, 9, 13}) {
    CAPTURE(updates);
    Training first(o, text);
    while (first.timetable.update() < updates) first.update();
    write(checkpoint, first);

    Training second(o, text);
    CHECK(read(checkpoint, second) == 12.5);
    CHECK(second.timetable.update() == updates);
    CHECK(second.timetable.place(0).evaluations == first.timetable.place(0).evaluations);
    CHECK(second.model.figures().loss == first.model.figures().loss);
    CHECK(second.model.seconds() == first.model.seconds());
    while (!second.timetable.is_over()) second.update();
    CHECK(second.timetable.update() == 13);
    CHECK(second.timetable.place(0).evaluations == 5);
    CHECK(have_same_weights(second.model, whole.model));
    CHECK(second.model.figures().loss == whole.model.figures().loss);
  }
}

TEST_CASE("language model: a checkpoint of another training is refused",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::vector<Index> stream = made_up_text();
  const Options o = small_options(Unit::word);
  const Batches text(stream, o.sequences, o.steps);
  Training training(o, text);
  training.update();
  const std::string path = folder.file("training.safetensors");
  const Checkpoint checkpoint(path, "seed=1");
  CHECK_FALSE(checkpoint.exists());
  write(checkpoint, training);
  CHECK(checkpoint.exists());

  CHECK_THROWS_WITH(
      read(Checkpoint(path, "seed=2"), training),
      Contains(path + " is another training") && Contains("seed=1") && Contains("seed=2"));
  // A larger model, though the settings say that it is the same.
  Options larger = o;
  larger.experts = 7;
  Training other(larger, text);
  CHECK_THROWS_AS(read(checkpoint, other), std::runtime_error);
  // Counts that cannot be.
  moe::SafetensorsWriter writer;
  const std::vector<Index> counts{-1, 0};
  const moe::Matrix<double> seconds = moe::Matrix<double>::Zero(1, 1);
  writer.add("training.counts", counts);
  writer.add("training.seconds", seconds);
  writer.set_metadata("training", "seed=1");
  writer.write(path);
  CHECK_THROWS_WITH(read(checkpoint, training), Contains("training.counts"));
  // Without a path.
  write(Checkpoint(), training);
  CHECK_FALSE(Checkpoint().exists());
  CHECK(Checkpoint().read([](const moe::SafetensorsFile&, const Place&) { FAIL(); }).update == 0);
  // A damaged file.
  std::filesystem::resize_file(path, 20);
  CHECK_THROWS_AS(read(checkpoint, training), std::runtime_error);
}

TEST_CASE("language model: every option that decides the outcome is in the settings",
          "[examples][language_model]") {
  const std::vector<Index> stream = made_up_text();
  const Document document{1, "a b c"};
  const Corpus corpus{Vocabulary(Unit::word, {&document}, 12), stream, stream, stream};
  const Options o = small_options(Unit::word);
  const std::string settings = training_settings(o, corpus, 13);
  CHECK_THAT(settings, Contains(" experts=6 ") && Contains(" top_k=2 ") && Contains(" hidden=4 ") &&
                           Contains(" updates=13 ") && Contains(" text="));
  Options changed = o;
  changed.experts = 7;
  CHECK(training_settings(changed, corpus, 13) != settings);
  changed = o;
  changed.load_weight = 1;
  CHECK(training_settings(changed, corpus, 13) != settings);
  Corpus other = corpus;
  other.train.back() = 3 - std::min<Index>(other.train.back(), 2);
  CHECK(training_settings(o, other, 13) != settings);
}

TEST_CASE("language model: two columns of the load become one when there are too many",
          "[examples][language_model]") {
  LoadMap map(2);
  for (Index update = 0; update < 64; ++update) map.add(balance_of({1, 3}));
  CHECK(map.updates_per_column() == 1);
  CHECK(map.tokens().rows() == 64);
  map.add(balance_of({6, 0}));
  CHECK(map.updates() == 65);
  CHECK(map.updates_per_column() == 2);
  REQUIRE(map.tokens().rows() == 33);
  CHECK(map.tokens()(0, 0) == 2);
  CHECK(map.tokens()(31, 1) == 6);
  CHECK(map.tokens()(32, 0) == 6);
  CHECK(map.load(0, 0) == 0.5);  // 2 of a mean of 4
  CHECK(map.load(0, 1) == 1.5);
  CHECK(map.load(32, 0) == 2);
  CHECK(map.load(32, 1) == 0);
  map.add(balance_of({0, 2}));
  REQUIRE(map.tokens().rows() == 33);
  CHECK(map.load(32, 1) == 0.5);  // 6 and 2

  // It goes on in the middle of a column, and where one ends.
  for (const Index more : {0, 1}) {
    LoadMap whole = map;
    for (Index i = 0; i < more; ++i) whole.add(balance_of({5, 5}));
    LoadMap resumed(2);
    resumed.resume(whole.updates(), whole.tokens());
    for (Index i = 0; i < 100; ++i) {
      whole.add(balance_of({i, 3}));
      resumed.add(balance_of({i, 3}));
    }
    CHECK(resumed.updates_per_column() == 4);
    CHECK(resumed.tokens() == whole.tokens());
  }
  LoadMap other(3);
  CHECK_THROWS_WITH(other.resume(66, map.tokens()), Contains("3 experts") && Contains("33 x 2"));
  LoadMap shorter(2);
  CHECK_THROWS_AS(shorter.resume(64, map.tokens()), std::invalid_argument);
}

TEST_CASE("language model: the picture has a row for each expert and a colour for each load",
          "[examples][language_model]") {
  CHECK(std::string(colour_of_load(0).text) == "none");
  CHECK(std::string(colour_of_load(0.2).text) == "below 1/4");
  CHECK(std::string(colour_of_load(0.8).text) == "to 1.25");
  CHECK(std::string(colour_of_load(1).text) == "to 1.25");
  CHECK(std::string(colour_of_load(3.9).text) == "to 4 x mean");
  CHECK(std::string(colour_of_load(1e9).text) == "above 4");

  LoadMap map(2);
  map.add(balance_of({0, 8}));
  map.add(balance_of({4, 4}));
  const std::string text = load_picture({{"sparse", map}, {"without updates", LoadMap(2)}}).text();
  CHECK_THAT(text, Contains("sparse: load of 2 experts (rows) over the mean, in 2 updates"));
  CHECK_THAT(text, !Contains("without updates"));
  // Two columns of 384 pixels; two rows of 12 below the title: none and the mean, twice the mean and
  // the mean.
  CHECK_THAT(text, Contains("fill=\"#20304c\" d=\"M12 32h384v12h-384z\""));
  CHECK_THAT(text, Contains("fill=\"#f4f4f0\" d=\"M396 32h384v12h-384zM396 44h384v12h-384z\""));
  CHECK_THAT(text, Contains("fill=\"#e8814d\" d=\"M12 44h384v12h-384z\""));
}
