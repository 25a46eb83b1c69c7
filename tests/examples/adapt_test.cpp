#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../../examples/adapt/adaptation.hpp"
#include "../../examples/adapt/base.hpp"
#include "../../examples/adapt/bible.hpp"
#include "../../examples/adapt/report.hpp"
#include "../../examples/adapt/ways.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

using namespace adapt;
using Catch::Matchers::Contains;
using Catch::Matchers::WithinRel;
using language_model::Contestant;
using language_model::Corpus;
using language_model::hash_of;
using language_model::Unit;
using language_model::Vocabulary;
using moe::test::TemporaryFolder;

namespace {

/// With every part that the model can have: projections, norms, FactoredAdam.
Options small_options() {
  Options o;
  o.base.vocabulary = 5;
  o.base.width = 8;
  o.base.memory = 6;
  o.base.hidden = 7;
  o.base.experts = 6;
  o.base.top_k = 2;
  o.base.sequences = 2;
  o.base.steps = 4;
  o.base.warm_up = 1;
  o.base.epochs = 1;
  o.updates = 3;
  return o;
}

/// Letters a, b, c and the ends of documents.
Corpus small_corpus(std::uint64_t seed) {
  const Document document{2, "aabbc"};
  Corpus corpus{Vocabulary(Unit::character, {&document}, 5), {}, {}, {}};
  std::uint32_t next = 0;
  for (auto* stream : {&corpus.train, &corpus.validation, &corpus.test}) {
    for (int i = 0; i < 50; ++i) {
      stream->push_back(static_cast<Index>(moe::philox({next++, 0, 0, 0}, seed)[0] % 5));
    }
  }
  return corpus;
}

Model<Base> small_model(const Options& o) {
  return Model<Base>(
      language_model::sparse_config<Base>(o.base, std::vector<double>(5, 0.2)).model);
}

using Values = std::map<std::string, moe::Matrix<float>>;

template <class Module>
Values values_of(const Module& module) {
  Values values;
  moe::for_each_parameter(module, [&](const std::string& name, const auto& parameter) {
    values[name] = parameter.value;
  });
  return values;
}

/// Without the texts of all numbers that Catch2 would make.
bool is_equal(const Values& a, const Values& b) { return a == b; }

bool is_of_gate(std::string_view name) { return name.starts_with("middle.gate."); }

}  // namespace

TEST_CASE("adapt: the Bible's documents are its chapters", "[examples][adapt]") {
  const auto chapters = chapters_of(
      "Ge1:1 In the beginning\nGe1:2 And, (as it were) GOD said:\nGe2:1 Thus\n1Jo1:1 That\n\n"
      "1Jo1:2 (For the life)");
  REQUIRE(chapters.size() == 3);
  CHECK(chapters[0].text == "in the beginning and, as it were god said:");
  CHECK(chapters[0].hash == hash_of("Ge1"));
  CHECK(chapters[1].text == "thus");
  CHECK(chapters[1].hash == hash_of("Ge2"));
  CHECK(chapters[2].text == "that for the life");
  CHECK(chapters[2].hash == hash_of("1Jo1"));
  CHECK(chapters_of("").empty());
  CHECK(chapters_of("Ge1:1 12\n").empty());  // nothing is left of it
}

TEST_CASE("adapt: what a command prints, and that it failed", "[examples][adapt]") {
  using language_model::output_of;
  using language_model::shell_word;
  CHECK(output_of("printf %s " + shell_word("it's \"$HOME\""), "no") == "it's \"$HOME\"");
  CHECK_THROWS_WITH(output_of("false", "there is no text"), "there is no text");
  CHECK_THROWS_WITH(output_of("printf text; exit 3", "half a text"), "half a text");
}

TEST_CASE("adapt: the new text is read by the old one's vocabulary", "[examples][adapt]") {
  const Document old{2, "aab"};
  const Vocabulary vocabulary(Unit::character, {&old}, 9);
  // The hash's remainder by 25 is the part: 0 validation, 1 test.
  const std::vector<Document> documents{{2, "bxa"}, {25, "ab"}, {51, "b"}, {24, "a"}, {3, ""}};
  const Corpus corpus = make_corpus(vocabulary, language_model::split(documents));
  CHECK(corpus.train == std::vector<Index>{3, Vocabulary::unknown, 2, 0, 2, 0});
  CHECK(corpus.validation == std::vector<Index>{2, 3, 0});
  CHECK(corpus.test == std::vector<Index>{3, 0});
  CHECK(corpus.vocabulary.size() == 4);
}

TEST_CASE("adapt: another layer in the middle of a trained model", "[examples][adapt]") {
  const Options o = small_options();
  const Model<Base> model = small_model(o);
  const Corpus corpus = small_corpus(1);
  const Text text(corpus, o.base);
  const auto perplexity = [&](const Model<Base>& m) {
    return language_model::evaluate(m, text.test, o.base.sequences).perplexity;
  };
  const Model<Base> same(model, Base(model.middle(), model.middle().layer()));
  CHECK(is_equal(values_of(same), values_of(model)));
  CHECK(perplexity(same) == perplexity(model));
  Options with_other_seed = o;
  with_other_seed.base.seed = 9;
  const Model<Base> other = small_model(with_other_seed);
  const Model<Base> changed(model, Base(model.middle(), other.middle().layer()));
  auto expected = values_of(model);
  for (auto& [name, value] : values_of(other)) {
    // The norm before the layer is not part of it.
    if (name.starts_with("middle.") && !name.starts_with("middle.norm")) expected[name] = value;
  }
  CHECK(is_equal(values_of(changed), expected));
  CHECK(perplexity(changed) != perplexity(model));
}

TEST_CASE("adapt: only what is chosen is trained", "[examples][adapt]") {
  const Options o = small_options();
  const Corpus corpus = small_corpus(1);
  const Text text(corpus, o.base);
  Model<Base> model = small_model(o);
  train_only(model, is_of_gate);
  const auto before = values_of(model);
  auto config = language_model::sparse_config<Base>(o.base, {});
  config.factored = GENERATE(true, false);
  Contestant<Base> contestant(config, model);
  Batches::Batch batch;
  for (Index update = 1; update <= 3; ++update) {
    text.training.get(update - 1, batch);
    contestant.update(batch, static_cast<std::uint64_t>(update), 1e-2);
  }
  int moved = 0;
  for (const auto& [name, value] : values_of(contestant.model())) {
    CAPTURE(name);
    const bool has_moved = value != before.at(name);
    CHECK(has_moved == is_of_gate(name));
    moved += has_moved ? 1 : 0;
  }
  CHECK(moved == 2);  // scores and noise
  // Of 2 x 8 x 6 weights: the gradient and two moments.
  CHECK(contestant.figures().parameters == 96);
  CHECK(contestant.training_bytes() == 96 * 3 * 4);
  // What is frozen stays so.
  train_only(model, [](std::string_view) { return true; });
  CHECK(moe::parameter_count(model) == 96);
}

TEST_CASE("adapt: the memory of a training is counted", "[examples][adapt]") {
  const Options o = small_options();
  const Corpus corpus = small_corpus(1);
  const Text text(corpus, o.base);
  Batches::Batch batch;
  text.training.get(0, batch);
  const Index experts = 6 * (8 * 7 + 7 + 7 * 8 + 8);
  // Embedding; an LSTM of 6 in a width of 8, its projection and norm, twice; the mixture's norm; the
  // gate; the softmax and its norm.
  const Index others = 5 * 8 + 2 * ((8 + 6) * 24 + 24 + 6 * 8 + 8) + 8 + 96 + (8 * 5 + 5) + 8;
  for (const bool factored : {true, false}) {
    CAPTURE(factored);
    auto config = language_model::sparse_config<Base>(o.base, {});
    config.factored = factored;
    Contestant<Base> contestant(config, small_model(o));
    contestant.update(batch, 1, 1e-2);
    // A row's and a column's means of each weight and bias, or Adam's moments.
    const Index of_experts = factored ? 6 * (8 + 7 + 1 + 7 + 7 + 8 + 1 + 8) : 2 * experts;
    CHECK(contestant.figures().parameters == experts + others);
    CHECK(contestant.training_bytes() == 4 * (experts + others + of_experts + 2 * others));
  }
}

TEST_CASE("adapt: a gradient is that of the whole model, where only the middle is trained",
          "[examples][adapt]") {
  const Options o = small_options();
  const Corpus corpus = small_corpus(1);
  Batches::Batch batch;
  Batches(corpus.train, 2, 4).get(0, batch);
  const auto gradients_of = [&](Model<Base> model) {
    Model<Base>::Tape tape;
    auto state = model.initial_state(2);
    moe::zero_gradients(model);
    const double loss = model.train(batch.input, batch.target, state, tape, {.step = 1});
    std::map<std::string, moe::Matrix<float>> gradients;
    moe::for_each_parameter(model, [&](const std::string& name, const auto& parameter) {
      if (parameter.trained) gradients[name] = std::as_const(parameter).gradient();
    });
    return std::pair(loss, gradients);
  };
  const auto [loss, all] = gradients_of(small_model(o));
  for (const std::string first : {"middle.", "embedding", "first"}) {
    CAPTURE(first);
    Model<Base> model = small_model(o);
    train_only(model, [&](std::string_view name) { return name.starts_with(first); });
    const auto [same_loss, some] = gradients_of(std::move(model));
    CHECK(same_loss == loss);
    CHECK_FALSE(some.empty());
    for (const auto& [name, gradient] : some) {
      CAPTURE(name);
      const bool is_same = gradient == all.at(name);
      CHECK(is_same);
      CHECK(gradient.squaredNorm() > 0);
    }
  }
}

TEST_CASE("adapt: adapters start as the base, and they alone are trained", "[examples][adapt]") {
  Options o = small_options();
  o.rank = 3;
  const Corpus corpus = small_corpus(1);
  const Text text(corpus, o.base);
  const Model<Base> base = small_model(o);
  const auto perplexity = [&](const auto& model) {
    return language_model::evaluate(model, text.test, 2).perplexity;
  };
  Batches::Batch batch;
  text.training.get(0, batch);
  const auto check = [&](const Way& way, const auto& model, Index adapters) {
    using Middle = std::remove_cvref_t<decltype(model.middle())>;
    CHECK_THAT(perplexity(model), WithinRel(perplexity(base), 1e-6));
    auto config = language_model::sparse_config<Middle>(o.base, {});
    config.factored = way.factored;
    Contestant<Middle> contestant(config, model);
    CHECK(contestant.figures().parameters == adapters);
    const Values before = values_of(model);
    for (std::uint64_t update = 1; update <= 2; ++update) contestant.update(batch, update, 1e-2);
    CHECK(contestant.training_bytes() == adapters * 3 * 4);
    for (const auto& [name, value] : values_of(contestant.model())) {
      CAPTURE(name);
      const bool has_moved = value != before.at(name);
      CHECK(has_moved == (name.find("lora_") < name.size()));
    }
    const double adapted = perplexity(contestant.model());
    CHECK(adapted != perplexity(base));
    const Model<Base> merged(
        contestant.model(),
        Base(contestant.model().middle(), moe::merged(contestant.model().middle().layer())));
    CHECK_THAT(perplexity(merged), WithinRel(adapted, 1e-5));
    for (const auto& [name, value] : values_of(merged)) {
      CAPTURE(name);
      const bool is_changed = value != before.at(name);
      const bool is_adapted = name.ends_with("up.weight") || name.ends_with("down.weight") ||
                              (way.name.ends_with("gate") && name == "middle.gate.weight");
      CHECK(is_changed == is_adapted);
    }
  };
  // Of 6 experts 8 x 7 and 7 x 8, and of a gate 8 x 6.
  const Index of_experts = 6 * 2 * 3 * (8 + 7);
  int ways = 0;
  const auto count = [&](const std::string& name, Index adapters) {
    with_way(name, base, o, [&](const Way& way, const auto& model) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(model)>, Model<Base>>) {
        FAIL("no adapters");
      } else {
        check(way, model, adapters);
        ++ways;
      }
    });
  };
  count("lora", of_experts);
  count("lora_and_gate", of_experts + 3 * (8 + 6));
  CHECK(ways == 2);
}

TEST_CASE("adapt: a way has its own learning rate, and trains its own part", "[examples][adapt]") {
  Options o = small_options();
  o.gate_rate = 1;
  o.lora_rate = 2;
  o.lora_and_gate_rate = 3;
  o.all_rate = 4;
  const Model<Base> base = small_model(o);
  double rate = 0;
  for (const std::string& name : all_ways()) {
    CAPTURE(name);
    with_way(name, base, o, [&](const Way& way, const auto& model) {
      CHECK(way.learning_rate == ++rate);
      CHECK(way.factored == (name == "all"));
      if (name == "gate") CHECK(moe::parameter_count(model) == 96);
      if (name == "all") CHECK(moe::parameter_count(model) == moe::parameter_count(base));
    });
  }
  CHECK(rate == 4);
  o.base.factored = false;
  with_way("all", base, o, [](const Way& way, const auto&) { CHECK_FALSE(way.factored); });
  o.rank = -1;
  CHECK_THROWS_WITH(with_way("lora", base, o, [](const Way&, const auto&) {}),
                    Contains("LoraConfig.rank = -1"));
}

TEST_CASE("adapt: a way's row has its size, and the test part only where it may be read",
          "[examples][adapt]") {
  Options o = small_options();
  const Corpus old_corpus = small_corpus(1), new_corpus = small_corpus(2);
  const Text old_text(old_corpus, o.base), new_text(new_corpus, o.base);
  Model<Base> model = small_model(o);
  train_only(model, is_of_gate);
  const auto adapted = train({"the gate", 1e-2, false}, model, o, old_text, new_text);
  REQUIRE(adapted);
  CHECK(adapted->trained == 96);
  CHECK(adapted->bytes == 96 * 3 * 4);
  REQUIRE(adapted->perplexities.new_test);
  REQUIRE(adapted->perplexities.old_test);
  CHECK(*adapted->perplexities.new_test != adapted->perplexities.new_validation);
  CHECK(*adapted->perplexities.new_test != *adapted->perplexities.old_test);

  // Before: the model as it is, on each part.
  const Perplexities before = evaluate(model, o, old_text, new_text);
  CHECK(before.new_validation ==
        language_model::evaluate(model, new_text.validation, 2).perplexity);
  CHECK(before.new_test == language_model::evaluate(model, new_text.test, 2).perplexity);
  CHECK(before.old_test == language_model::evaluate(model, old_text.test, 2).perplexity);

  o.test = false;
  const auto without = train({"the gate", 1e-2, false}, model, o, old_text, new_text);
  REQUIRE(without);
  CHECK(without->perplexities.new_validation == adapted->perplexities.new_validation);
  CHECK_FALSE(without->perplexities.new_test);
  CHECK_FALSE(without->perplexities.old_test);

  // Of FactoredAdam and of Adam for the experts, as counted above.
  for (const auto& [factored, bytes] : {std::pair(true, 16524), std::pair(false, 21492)}) {
    const auto all = train({"all weights", 1e-2, factored}, small_model(o), o, old_text, new_text);
    REQUIRE(all);
    CHECK(all->bytes == bytes);
  }

  examples::interrupted = 1;
  CHECK_FALSE(train({"the gate", 1e-2, false}, model, o, old_text, new_text));
  // Where there is a file it goes on from there, and at its end there is nothing more to do.
  const TemporaryFolder folder;
  const language_model::Checkpoint checkpoint(folder.file("way.part"), "way=gate");
  CHECK_FALSE(train({"the gate", 1e-2, false}, model, o, old_text, new_text, checkpoint));
  CHECK(checkpoint.exists());
  examples::interrupted = 0;
  const auto resumed = train({"the gate", 1e-2, false}, model, o, old_text, new_text, checkpoint);
  examples::interrupted = 1;
  const auto again = train({"the gate", 1e-2, false}, model, o, old_text, new_text, checkpoint);
  for (const auto& late : {resumed, again}) {
    REQUIRE(late);
    CHECK(late->perplexities.new_validation == adapted->perplexities.new_validation);
    CHECK(late->bytes == adapted->bytes);
    CHECK(late->processor_seconds == resumed->processor_seconds);
  }
  examples::interrupted = 0;

  const Adapted figures{96, 1234567, 2.25, 1.5, {3.5, 4.25, {}}};
  CHECK(row(o, "the gate", figures) ==
        "|    1 | the gate                 |         96 |  1.23 |     2.2 |   1.5 |           "
        "3.500 | "
        "    4.250 |           |");
  CHECK(csv_row(o, "the gate", figures) == "1,the gate,3,96,1234567,2.25,1.50,3.5000,4.250,");
  CHECK(csv_row(o, "before", {}) == "1,before,0,0,0,0.00,0.00,0.0000,,");
}

TEST_CASE("adapt: rank and alpha are settings of the ways with adapters alone",
          "[examples][adapt]") {
  const TemporaryFolder folder;
  Options o = small_options();
  o.base_file = folder.file("base.safetensors");
  Options changed = o;
  if (GENERATE(true, false)) {
    changed.rank = o.rank + 1;
  } else {
    changed.alpha = o.alpha + 1;
  }
  for (const std::string& name : all_ways()) {
    CAPTURE(name);
    const Way way{name, 1e-2};
    checkpoint_of(name, way, o, "seed=1").write({3, 1.0}, [](moe::SafetensorsWriter&) {});
    const auto other = checkpoint_of(name, way, changed, "seed=1");
    if (name == "gate" || name == "all") {
      CHECK(other.place().update == 3);
    } else {
      CHECK_THROWS_WITH(other.place(), Contains(name + ".part is another training") &&
                                           Contains("Delete it, or take the same options."));
    }
    Options longer = o;
    longer.updates = 4;
    CHECK_THROWS_WITH(checkpoint_of(name, way, longer, "seed=1").place(),
                      Contains("updates=3") && Contains("updates=4"));
  }
}

TEST_CASE("adapt: the base is written once and read by who asks for the same",
          "[examples][adapt]") {
  const TemporaryFolder folder;
  Options o = small_options();
  o.base_file = folder.file("base.safetensors");
  const Corpus corpus = small_corpus(1);
  const Text text(corpus, o.base);
  const Model<Base> trained = make_base(o, corpus, text).value();
  CHECK_FALSE(is_equal(values_of(trained), values_of(small_model(o))));
  CHECK(is_equal(values_of(make_base(o, corpus, text).value()), values_of(trained)));

  Options longer = o;
  longer.base.epochs = 2;
  CHECK_THROWS_WITH(make_base(longer, corpus, text), Contains(o.base_file + " is another base") &&
                                                         Contains("updates=6") &&
                                                         Contains("updates=12"));
  Options other_seed = o;
  other_seed.base.seed = 2;
  CHECK_THROWS_WITH(make_base(other_seed, corpus, text), Contains("seed=2"));
  const Corpus other_corpus = small_corpus(2);
  CHECK_THROWS_WITH(make_base(o, other_corpus, Text(other_corpus, o.base)), Contains(" text="));
  moe::save_parameters(o.base_file, trained);
  CHECK_THROWS_WITH(make_base(o, corpus, text), Contains("no settings"));

  // Ctrl-C: no base is written, and the next call goes on.
  Options interrupted = o;
  interrupted.base_file = folder.file("interrupted.safetensors");
  examples::interrupted = 1;
  CHECK_FALSE(make_base(interrupted, corpus, text));
  examples::interrupted = 0;
  CHECK_FALSE(std::filesystem::exists(interrupted.base_file));
  CHECK(std::filesystem::exists(interrupted.base_file + ".part"));
  Options changed = interrupted;
  changed.base.seed = 2;
  CHECK_THROWS_WITH(make_base(changed, corpus, text), Contains(".part is another training"));
  CHECK(is_equal(values_of(make_base(interrupted, corpus, text).value()), values_of(trained)));
  CHECK(std::filesystem::exists(interrupted.base_file));
  CHECK_FALSE(std::filesystem::exists(interrupted.base_file + ".part"));

  // A signal after the last update loses nothing: the base is written all the same.
  Options late = o;
  late.base_file = folder.file("late.safetensors");
  Contestant<Base> at_its_end(
      language_model::sparse_config<Base>(o.base, std::vector<double>(5, 0.2)),
      Model<Base>(trained));
  const language_model::Checkpoint whole(late.base_file + ".part", base_settings(o, corpus, text));
  whole.write({6, 1.0}, [&](moe::SafetensorsWriter& writer) { at_its_end.save(writer, "base."); });
  examples::interrupted = 1;
  const auto written = make_base(late, corpus, text);
  examples::interrupted = 0;
  REQUIRE(written);
  CHECK(is_equal(values_of(*written), values_of(trained)));
  CHECK(std::filesystem::exists(late.base_file));
  CHECK_FALSE(whole.exists());
}
