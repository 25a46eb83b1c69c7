#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "../../examples/language_model/checkpoint.hpp"
#include "../../examples/language_model/competitor.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

/// \file
/// Trainings of the language model that go on from a file.

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
    if (timetable.evaluation_is_due()) evaluated.push_back(timetable.update());
  }

  const Batches& batches;
  Timetable timetable;
  Contestant<Flat> model;
  std::vector<Index> evaluated;  ///< the updates after which an evaluation was due
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
    CHECK(second.model.figures().loss == first.model.figures().loss);
    CHECK(second.model.seconds() == first.model.seconds());
    while (!second.timetable.is_over()) second.update();
    CHECK(second.timetable.update() == 13);
    first.evaluated.insert(first.evaluated.end(), second.evaluated.begin(), second.evaluated.end());
    CHECK(first.evaluated == std::vector<Index>{3, 6, 8, 11, 13});
    CHECK(have_same_weights(second.model, whole.model));
    CHECK(second.model.figures().loss == whole.model.figures().loss);
  }
}

TEST_CASE("language model: the gate's noise falls to 0", "[examples][language_model]") {
  Options o;
  o.noise = 0.5;
  o.noise_until = 0.75;
  CHECK(noise_at(o, 0) == 0.5);
  CHECK(noise_at(o, 0.375) == 0.25);
  CHECK(noise_at(o, 0.75) == 0);
  CHECK(noise_at(o, 1) == 0);
  o.noise_until = 0;
  CHECK(noise_at(o, 0) == 0.5);
  CHECK(noise_at(o, 1) == 0.5);

  // The timetable's third update of four is at three quarters.
  o.noise_until = 1;
  o.epochs = 1;
  Timetable timetable(o, 4);
  for (int i = 0; i < 3; ++i) timetable.next(0);
  CHECK(timetable.noise() == 0.125);
}

TEST_CASE("language model: what the gate's noise is multiplied by", "[examples][language_model]") {
  constexpr Index width = 8, tokens = 500;
  Flat mixture({.gate = {.experts = 20, .top_k = 2}, .hidden = 3, .gate_deviation = 1}, width, 7);
  const Matrix x = moe::test::random_matrix(tokens, width, 1).cast<float>();
  Flat::State state;
  Flat::Tape tape, other;
  const auto forward = [&](double factor, std::uint64_t step, Flat::Tape& at) -> const Matrix& {
    mixture.set_noise(factor);
    return mixture.forward(x, state, at, {.step = step});
  };
  const Matrix evaluated = mixture.evaluate(x, state, tape);
  CHECK(forward(0, 1, tape) == evaluated);
  CHECK(forward(1, 1, tape) != evaluated);
  const Matrix noise = tape.gate.noise;
  REQUIRE(noise.rows() == tokens);
  CHECK(forward(0.5, 1, other) != tape.y);
  CHECK(other.gate.noise == 0.5f * noise);
  CHECK(forward(0.5, 2, tape) != other.y);
}

TEST_CASE("language model: the options of the noise and of gated experts change the training",
          "[examples][language_model]") {
  const std::vector<Index> stream = made_up_text();
  const Options o = small_options(Unit::character);
  const Batches text(stream, o.sequences, o.steps);
  const auto trained = [&](const Options& options) {
    auto training = std::make_unique<Training>(options, text);
    for (int i = 0; i < 4; ++i) training->update();
    return training;
  };
  const auto whole = trained(o);
  Options changed = o;
  SECTION("the noise") { changed.noise = 0; }
  SECTION("when it ends") { changed.noise_until = 0; }
  SECTION("the experts' form") { changed.gated = false; }
  const auto other = trained(changed);
  CHECK(other->model.figures().loss != whole->model.figures().loss);
  // An expert is of 3 maps of 8 x 4, or of 2 with 4 + 8 biases. LSTMs of 6 with a projection, a gate
  // of 2 x 6 scores.
  const Index beside = 2 * ((8 + 6) * 4 * 6 + 6 * 8) + 2 * 6 * 8;
  CHECK(whole->model.figures().operations == beside + 2 * 3 * 8 * 4);
  CHECK(other->model.figures().operations == beside + 2 * (changed.gated ? 3 : 2) * 8 * 4);
  const Index fewer = whole->model.figures().parameters - other->model.figures().parameters;
  CHECK(fewer == (changed.gated ? 0 : 6 * (8 * 4 - (4 + 8))));
}

TEST_CASE("language model: a training goes on with another number of evaluations",
          "[examples][language_model]") {
  Options o;
  o.epochs = 1;
  const auto evaluated_after = [&](Index resumed_at, Index evaluations) {
    o.evaluations = evaluations;
    Timetable timetable(o, 100);
    timetable.resume({resumed_at, 12.5});
    std::vector<Index> updates;
    while (!timetable.is_over()) {
      timetable.next(0);
      if (timetable.evaluation_is_due()) updates.push_back(timetable.update());
    }
    return updates;
  };
  // Of 8 evaluations 6 were due by then, which is more than 2.
  CHECK(evaluated_after(80, 2) == std::vector<Index>{100});
  CHECK(evaluated_after(80, 8) == std::vector<Index>{88, 100});
  CHECK(evaluated_after(80, 10) == std::vector<Index>{90, 100});
  CHECK(evaluated_after(40, 2) == std::vector<Index>{50, 100});
  CHECK(evaluated_after(0, 2) == std::vector<Index>{50, 100});
  CHECK(evaluated_after(100, 2).empty());
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
  const std::vector<Index> updates{-1};
  const moe::Matrix<double> seconds = moe::Matrix<double>::Zero(1, 1);
  writer.add("training.updates", updates);
  writer.add("training.seconds", seconds);
  writer.set_metadata("training", "seed=1");
  writer.write(path);
  CHECK_THROWS_WITH(read(checkpoint, training), Contains("training.updates"));
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
