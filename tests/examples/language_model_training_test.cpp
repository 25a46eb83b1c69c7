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
  Options o = small_options(Unit::character);
  o.mixtures = GENERATE(Index{1}, Index{2});
  o.noise = 0.3;
  o.noise_until = 0.7;
  const Batches text(stream, o.sequences, o.steps);
  const auto trained = [&](const Options& options) {
    auto training = std::make_unique<Training>(options, text);
    for (int i = 0; i < 4; ++i) training->update();
    return training;
  };
  const auto whole = trained(o);
  Options changed = o;
  SECTION("the noise") { changed.noise = 0; }
  SECTION("less of it") { changed.noise = 0.1; }
  SECTION("when it ends") { changed.noise_until = 0; }
  SECTION("the experts' form") { changed.gated = false; }
  const auto other = trained(changed);
  CHECK(other->model.figures().loss != whole->model.figures().loss);
  // An expert is of 3 maps of 8 x 4, or of 2 with 4 + 8 biases. LSTMs of 6 with a projection, a gate
  // of 6 scores, and as many of its noise.
  const Index lstms = 2 * ((8 + 6) * 4 * 6 + 6 * 8);
  const auto operations = [&](Index scores, Index maps) {
    return lstms + o.mixtures * (scores * 8 + 2 * maps * 8 * 4);
  };
  CHECK(whole->model.figures().operations == operations(2 * 6, 3));
  CHECK(other->model.figures().operations ==
        operations(changed.noise > 0 ? 2 * 6 : 6, changed.gated ? 3 : 2));
  // The weights of the noise stay, unused.
  const Index fewer = whole->model.figures().parameters - other->model.figures().parameters;
  CHECK(fewer == (changed.gated ? 0 : o.mixtures * 6 * (8 * 4 - (4 + 8))));
}

namespace {

/// Of the sparse model of the options, without what is drawn and without losses of the gate.
Model<Flat>::Config plain_config(Options o) {
  o.dropout = 0;
  o.importance_weight = 0;
  o.load_weight = 0;
  o.embedding_deviation = 1;
  return sparse_config<Flat>(o, std::vector<double>(12, 1. / 12)).model;
}

}  // namespace

TEST_CASE("language model: the gradient of a model of two mixtures is that of its loss",
          "[examples][language_model]") {
  const std::vector<Index> stream = made_up_text();
  Options o = small_options(Unit::character);
  o.top_k = o.experts;  // so that no choice changes, which the gradient knows nothing of
  Model<Flat> model(plain_config(o));
  moe::for_each_parameter(model, [](const std::string& name, auto& parameter) {
    if (name.ends_with("down.weight")) parameter.value *= 4;
  });
  const Batches text(stream, 4, 8);
  Batches::Batch batch;
  text.get(0, batch);
  Model<Flat>::Tape tape;
  auto state = model.initial_state(4);
  moe::zero_gradients(model);
  const double trained = model.train(batch.input, batch.target, state, tape, {.step = 1});
  const auto loss = [&] {
    Model<Flat>::Tape scratch;
    auto first = model.initial_state(4);
    return model.evaluate(batch.input, batch.target, first, scratch);
  };
  CHECK(std::abs(trained - loss()) < 1e-5);
  // Along the gradient of a part, the loss rises by the gradient's square.
  for (const std::string part : {"embedding", "first.", "middle.gate", "middle.experts", "second.",
                                 "last.gate", "last.experts", "last.norm", "softmax."}) {
    CAPTURE(part);
    double square = 0;
    moe::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
      if (name.starts_with(part)) square += static_cast<double>(parameter.gradient().squaredNorm());
    });
    REQUIRE(square > 1e-8);
    const double step = 2e-3 / std::sqrt(square);
    const auto move = [&](double by) {
      moe::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
        if (name.starts_with(part))
          parameter.value += static_cast<float>(by) * parameter.gradient();
      });
    };
    move(step);
    const double above = loss();
    move(-2 * step);
    const double below = loss();
    move(step);
    CHECK(std::abs((above - below) / (2 * step * square) - 1) < 0.02);
  }
}

TEST_CASE("language model: a model of two mixtures has the experts of both",
          "[examples][language_model]") {
  const std::vector<Index> stream = made_up_text();
  Options o = small_options(Unit::character);
  const Batches text(stream, o.sequences, o.steps);
  Training two(o, text);
  two.update();
  CHECK(two.model.figures().experts == 2 * 6);
  CHECK(two.model.figures().active == 2 * 2);
  // Of a batch of 2 x 4 characters each mixture gives a character to two of its own experts.
  const moe::Balance<float>& balance = two.model.balance();
  REQUIRE(balance.tokens_per_expert.size() == 12);
  REQUIRE(balance.importance.size() == 12);
  REQUIRE(balance.load.size() == 12);
  for (const Index first : {0, 6}) {
    Index slots = 0;
    for (Index e = first; e < first + 6; ++e) {
      slots += balance.tokens_per_expert[static_cast<std::size_t>(e)];
    }
    CHECK(slots == 2 * 8);
    CHECK(std::abs(balance.importance.segment(first, 6).sum() - 8) < 1e-4f);
    CHECK(balance.load.segment(first, 6).sum() == 16);
  }
  CHECK(balance.importance.head(6) != balance.importance.tail(6));
  // Without noise the load's loss of each has a value too.
  const auto of = [&](const auto& figures, double weight) {
    const auto cv_squared = [](const auto& part) {
      const double mean = part.template cast<double>().mean();
      return (part.template cast<double>().array() - mean).square().mean() / (mean * mean);
    };
    return weight * (cv_squared(figures.head(6)) + cv_squared(figures.tail(6)));
  };
  const double importance = of(balance.importance, o.importance_weight);
  const double load = of(balance.load, o.load_weight);
  CHECK(std::abs(balance.losses.importance / importance - 1) < 1e-4);
  CHECK(std::abs(balance.losses.load / load - 1) < 1e-4);
  CHECK(std::abs(balance.loss / (importance + load) - 1) < 1e-4);
  CHECK(evaluate(two.model.model(), text, o.sequences).balance.tokens_per_expert.size() == 12);

  // Where the last mixture adds nothing, the model is the one without it, of the same seed.
  Model<Flat> both(plain_config(o));
  moe::for_each_parameter(both, [](const std::string& name, auto& parameter) {
    if (name.starts_with("last.") && name.ends_with("down.weight")) parameter.value.setZero();
  });
  o.mixtures = 1;
  const Model<Flat> one(plain_config(o));
  CHECK(one.experts() == 6);
  CHECK(evaluate(one, text, o.sequences).perplexity ==
        evaluate(both, text, o.sequences).perplexity);
  CHECK(evaluate(Model<Flat>(plain_config(small_options(Unit::character))), text, o.sequences)
            .perplexity != evaluate(both, text, o.sequences).perplexity);

  CHECK_THROWS_WITH(Model<Flat>(both, Flat(one.middle(), one.middle().layer())),
                    Contains("two mixtures"));
  o.mixtures = 3;
  CHECK_THROWS_WITH(Model<Flat>(plain_config(o)), Contains("mixtures = 3"));
}

TEST_CASE("language model: both mixtures have the gate's and the experts' rates",
          "[examples][language_model]") {
  const std::vector<Index> stream = made_up_text();
  Options o = small_options(Unit::character);
  o.gate_rate = 0;
  o.expert_rate = 0;
  o.factored = GENERATE(true, false);
  const Batches text(stream, o.sequences, o.steps);
  Training training(o, text);
  const Training before(o, text);
  training.update();
  std::vector<const moe::Matrix<float>*> values;
  moe::for_each_parameter(before.model.model(), [&](const std::string&, const auto& parameter) {
    values.push_back(&parameter.value);
  });
  std::size_t i = 0;
  moe::for_each_parameter(
      training.model.model(), [&](const std::string& name, const auto& parameter) {
        CAPTURE(name);
        CHECK((parameter.value == *values[i++]) == (is_of_gate(name) || is_of_expert(name)));
      });
  CHECK(is_of_expert("last.experts.5.down.weight"));
  CHECK(is_of_gate("last.gate.weight"));
  CHECK_FALSE(is_of_gate("last.norm.weight"));
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
