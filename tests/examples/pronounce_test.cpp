#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "../../examples/pronounce/trainer.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

using namespace pronounce;
using Catch::Matchers::Contains;
using moe::Matrix;
using moe::test::random_matrix;
using moe::test::same_bits;

namespace {

const std::vector<Phonemes> two_ways{{1, 2, 3, 4}, {5, 6}};

/// A dictionary of made-up words, all of whose parts are small and not empty.
std::vector<Entry> made_up_words(std::size_t count) {
  std::vector<Entry> entries;
  for (std::size_t i = 0; i < count; ++i) {
    const auto dice = moe::philox({static_cast<std::uint32_t>(i), 0, 0, 0}, 3);
    Entry entry{"w" + std::to_string(i), {}, {}};
    for (std::size_t j = 0; j < 2 + dice[0] % 5; ++j) {
      entry.letters.push_back(static_cast<Index>((dice[1] >> (4 * j)) % 5));
    }
    Phonemes pronunciation;
    for (const Index letter : entry.letters) pronunciation.push_back(1 + letter);
    entry.pronunciations.push_back(pronunciation);
    if (dice[2] % 3 == 0) {
      pronunciation.push_back(7);
      entry.pronunciations.push_back(pronunciation);
    }
    entries.push_back(entry);
  }
  return entries;
}

Options small_options() {
  Options o;
  o.embedding = 6;
  o.width = 8;
  o.experts = 4;
  o.hidden = 6;
  o.dropout = 0.3;
  o.sampled_dropout = 0.1;
  o.words = 8;
  o.max_length = 12;
  o.updates = 12;
  o.cross_entropy = 4;
  o.rise = 2;
  o.share = 0.8;
  return o;
}

template <class Network>
std::vector<Matrix<float>> values_of(const Network& network) {
  std::vector<Matrix<float>> values;
  moe::for_each_parameter(network,
                          [&](const std::string&, const auto& p) { values.push_back(p.value); });
  return values;
}

}  // namespace

TEST_CASE("pronounce: edit distance by hand", "[pronounce]") {
  const auto distance = [](Phonemes a, Phonemes b) { return edit_distance(a, b); };
  CHECK(distance({}, {}) == 0);
  CHECK(distance({1, 2}, {}) == 2);
  CHECK(distance({}, {1, 2, 3}) == 3);
  CHECK(distance({1, 2, 3}, {1, 2, 3}) == 0);
  CHECK(distance({1, 2, 3}, {1, 3}) == 1);
  CHECK(distance({1, 2, 3}, {2, 1, 3}) == 2);
  // "kitten" and "sitting"
  CHECK(distance({11, 9, 20, 20, 5, 14}, {19, 9, 20, 20, 9, 14, 7}) == 3);
}

TEST_CASE("pronounce: rewards by hand", "[pronounce]") {
  const auto reward = [](Phonemes sequence) { return reward_of(sequence, two_ways, 0.5); };
  CHECK(reward({1, 2, 3, 4, 0}) == 1.5);
  CHECK(reward({5, 6, 0}) == 1.5);
  CHECK(reward({1, 2, 3, 0}) == 0.75);
  CHECK(reward({1, 2, 3, 4}) == 1);  // all there, but it did not end
  CHECK(reward({0}) == 0);
  CHECK(reward({5, 7, 0}) == 0.5);
  CHECK(reward({5, 7, 7, 7, 7, 0}) == -0.25);  // five from the first, of four; four from the second
}

TEST_CASE("pronounce: error rates by hand", "[pronounce]") {
  ErrorRates rates;
  rates.add(Phonemes{1, 2, 3, 4, 0}, two_ways);  // the first
  rates.add(Phonemes{5, 6, 0}, two_ways);        // the second
  rates.add(Phonemes{5, 7, 0}, two_ways);        // one of two wrong
  rates.add(Phonemes{1, 2, 3, 4}, two_ways);     // truncated, but right
  CHECK(rates.word_error_rate() == 25);
  CHECK(rates.word_error_rate_first() == 50);
  CHECK(std::abs(rates.phoneme_error_rate() - 100.0 / 12) < 1e-12);
}

TEST_CASE("pronounce: attention's gradients agree with differences", "[pronounce]") {
  const std::vector<Index> offsets{0, 3, 4, 6};
  const std::vector<Index> words{0, 2, 2, 1, 2, 0};
  Matrix<double> query = random_matrix(6, 4, 1);
  Matrix<double> keys = random_matrix(6, 4, 2);
  Matrix<double> values = random_matrix(6, 5, 3);
  const Matrix<double> weights = random_matrix(6, 5, 4);
  using Layer = Attention<double>;
  Layer::Tape tape;
  const auto loss = [&] {
    Layer::Tape other;
    return Layer::forward(query, words, {offsets, keys, values}, other).cwiseProduct(weights).sum();
  };
  const Matrix<double>& context = Layer::forward(query, words, {offsets, keys, values}, tape);
  CHECK(same_bits(context.row(3), values.row(3)));  // a word of one letter
  Layer::backward(weights, {offsets, keys, values}, tape);
  const auto check = [&](const Matrix<double>& actual, Matrix<double>& by) {
    CHECK(moe::test::relative_error(actual, moe::test::difference_gradient(by, loss)) < 1e-7);
  };
  check(tape.dquery, query);
  check(tape.dkeys, keys);
  check(tape.dvalues, values);
}

TEST_CASE("pronounce: the network's gradients agree with differences", "[pronounce]") {
  using Small = Model<double>;
  Small network({.letters = 5,
                 .phonemes = 4,
                 .embedding = 3,
                 .width = 3,
                 .experts = 3,
                 .top_k = 3,  // all of them: no choice that a difference could change
                 .expert_hidden = 2,
                 .dropout = 0.3,
                 .balance_weight = 0});
  std::uint64_t seed = 10;
  moe::for_each_parameter(network, [&](const std::string&, auto& p) {
    p.value = random_matrix(p.value.rows(), p.value.cols(), ++seed, 0.6);
  });
  const std::vector<std::vector<Index>> letters{{1, 4, 0}, {2}};
  const std::vector<Word> words{{letters[0], {}}, {letters[1], {}}};
  // Two samples of the first word, two of the second; the last has ended after a step.
  const std::vector<Index> previous{0, 0, 0, 0, 1, 2, 3, -1, 3, -1, 1, -1};
  const moe::NoiseKey key{.step = 3};
  Small::Tape tape;
  const auto loss_of = [&](Small::Tape& t, Matrix<double>* gradient) {
    const Matrix<double>& logits = network.forward(words, 2, previous, key, t);
    Matrix<double> weights = random_matrix(logits.rows(), logits.cols(), 5);
    for (Index i = 0; i < weights.rows(); ++i) {
      if (previous[static_cast<std::size_t>(i)] < 0) weights.row(i).setZero();
    }
    if (gradient != nullptr) *gradient = weights;
    return logits.cwiseProduct(weights).sum();
  };
  Matrix<double> dlogits;
  loss_of(tape, &dlogits);
  moe::zero_gradients(network);
  network.backward(dlogits, tape);
  moe::test::check_parameter_gradients(
      network,
      [&] {
        Small::Tape other;
        return loss_of(other, nullptr);
      },
      1e-6, 1e-5);
}

TEST_CASE("pronounce: steps give the logits of the whole, to the bit", "[pronounce]") {
  Network network(network_of(small_options()));
  const std::vector<std::vector<Index>> letters{{4, 5, 6, 7}, {8, 9}, {10}};
  std::vector<Word> words;
  for (const auto& word : letters) words.push_back({word, {}});
  const std::vector<Index> previous{0, 0, 0, 0, 0, 0, 3, 4, 5, 6, 7, 8, 1, -1, 2, 2, -1, 9};
  for (const auto& noise : {std::optional<moe::NoiseKey>{}, std::optional(moe::NoiseKey{5, 0})}) {
    Network::Tape tape;
    const Matrix<float> all = network.forward(words, 2, previous, noise, tape);
    Network::State state;
    network.begin(words, 2, noise, state);
    for (Index t = 0; t < 3; ++t) {
      const Matrix<float> step =
          network.step(std::span(previous).subspan(static_cast<std::size_t>(6 * t), 6), state);
      CHECK(same_bits(step, all.middleRows(6 * t, 6)));
    }
    // And a word's logits do not depend on the words beside it, where nothing is drawn.
    if (noise) continue;
    Network::Tape single;
    const std::vector<Index> own{previous[4], previous[10], previous[16]};
    const Matrix<float> alone = network.forward(std::span(words).last(1), 1, own, noise, single);
    for (Index t = 0; t < 2; ++t) CHECK(same_bits(alone.row(t), all.row(6 * t + 4)));
  }
}

TEST_CASE("pronounce: updates of REINFORCE have a dropout of their own", "[pronounce]") {
  Options options = small_options();
  options.updates = 40;
  const std::vector<Entry> entries = made_up_words(50);
  Trainer trainer(options, entries);
  const auto schedule = std::get<moe::Alternation>(schedule_of(options));
  Index sampled = 0;
  for (Index update = 1; update <= options.updates; ++update) {
    trainer.train();
    const bool is_sampled = schedule(update).reinforce > 0;
    CHECK(trainer.network().config().dropout == (is_sampled ? 0.1 : 0.3));
    sampled += is_sampled;
  }
  CHECK(sampled > 20);
  CHECK(sampled < options.updates - options.cross_entropy);  // the two kinds alternate

  // Each of the three that drop has the new rate: at this one, nothing is left.
  Network network(network_of(options));
  const std::vector<std::vector<Index>> letters{{4, 5, 6, 7}, {8, 9}};
  const std::vector<Word> words{{letters[0], {}}, {letters[1], {}}};
  const std::vector<Index> previous{0, 0, 3, 4, 5, -1};
  Network::Tape tape;
  const auto is_zero = [&](double rate) {
    network.set_dropout(rate);
    network.forward(words, 1, previous, moe::NoiseKey{5, 0}, tape);
    return std::vector<bool>{tape.encoder.dropout.y.isZero(0),
                             tape.decoder.dropout_embedding.y.isZero(0),
                             tape.decoder.dropout_output.y.isZero(0)};
  };
  CHECK(is_zero(0.999999) == std::vector<bool>{true, true, true});
  CHECK(is_zero(0) == std::vector<bool>{false, false, false});

  Options other = options;
  other.sampled_dropout = 1;
  CHECK_THROWS_WITH(check_options(other), Contains("--sampled-dropout"));
  other.sampled_dropout = -0.1;
  CHECK_THROWS_WITH(check_options(other), Contains("--sampled-dropout"));
}

TEST_CASE("pronounce: operations are the weights that a letter or phoneme meets", "[pronounce]") {
  Options options = small_options();
  options.top_k = 3;
  const Network network(network_of(options));
  Network::Operations expected;
  moe::for_each_parameter(network, [&](const std::string& name, const auto& parameter) {
    if (parameter.value.rows() == 1) return;  // added, not multiplied by
    const auto is_of = [&](std::string_view part) { return name.starts_with(part); };
    const Index size = parameter.value.size();
    if (is_of("rightwards.") || is_of("leftwards.") || is_of("keys.")) expected.letter += size;
    if (is_of("mixture.gate.")) expected.mixture += size;
    for (const char* used : {"mixture.experts.0.", "mixture.experts.1.", "mixture.experts.2."}) {
      if (is_of(used)) expected.mixture += size;
    }
    if (is_of("decoder.") || is_of("query.") || is_of("output.") || is_of("logits.")) {
      expected.phoneme += size;
    }
  });
  CHECK(network.operations().mixture == expected.mixture);
  CHECK(network.operations().letter == expected.letter + expected.mixture);
  CHECK(network.operations().phoneme == expected.phoneme);
}

TEST_CASE("pronounce: every pronunciation once an epoch, in an order of its own", "[pronounce]") {
  const std::vector<Entry> entries = made_up_words(200);
  Batches batches(entries, 8, 1);
  std::size_t pairs = 0;
  for (const Entry& entry : entries) pairs += entry.pronunciations.size();
  CHECK(batches.count() == static_cast<Index>(pairs) / 8);
  std::multiset<std::pair<const Index*, Phonemes>> seen;
  Batch batch;
  std::vector<const Index*> first_epoch;
  for (Index update = 1; update <= batches.count(); ++update) {
    batches.get(update, batch);
    REQUIRE(batch.words.size() == 8);
    for (std::size_t i = 0; i < 8; ++i) {
      seen.emplace(batch.words[i].letters.data(), batch.references[i]);
      first_epoch.push_back(batch.words[i].letters.data());
    }
  }
  for (const auto& pair : seen) CHECK(seen.count(pair) == 1);
  std::vector<const Index*> second_epoch;
  for (Index update = batches.count() + 1; update <= 2 * batches.count(); ++update) {
    batches.get(update, batch);
    for (const Word& word : batch.words) second_epoch.push_back(word.letters.data());
  }
  CHECK(first_epoch != second_epoch);
  // A batch is a function of its number.
  Batches other(entries, 8, 1);
  Batch again;
  other.get(batches.count() + 3, again);
  batches.get(batches.count() + 3, batch);
  CHECK(again.references == batch.references);
}

TEST_CASE("pronounce: training stops and resumes with the same bits", "[pronounce]") {
  const moe::test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const std::vector<Entry> entries = made_up_words(100);
  Options options = small_options();
  options.baseline =
      GENERATE(as<std::string>(), "leave_one_out", "running_mean", "linear", "greedy");
  options.reward = GENERATE(as<std::string>(), "score", "shuffled");
  if (options.reward == "shuffled" && options.baseline != "leave_one_out") return;
  const Index stop = GENERATE(3, 7);  // in either phase
  Trainer whole(options, entries);
  for (Index i = 0; i < stop; ++i) whole.train();
  whole.save(path);
  Trainer resumed(options, entries);
  resumed.load(moe::SafetensorsFile(path));
  CHECK(resumed.update() == stop);
  while (whole.update() < options.updates) whole.train();
  while (resumed.update() < options.updates) resumed.train();
  const auto expected = values_of(whole.network());
  const auto actual = values_of(resumed.network());
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(same_bits(actual[i], expected[i]));
  CHECK(resumed.cross_entropy() == whole.cross_entropy());
  CHECK(resumed.reward() == whole.reward());
}

TEST_CASE("pronounce: a training that cannot be is not resumed", "[pronounce]") {
  const moe::test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const std::vector<Entry> entries = made_up_words(50);
  const Options options = small_options();
  Trainer trainer(options, entries);
  trainer.train();
  const std::string broken = GENERATE(as<std::string>(), "training.counts 0", "training.counts 1",
                                      "training.adam.steps 0", "training.adam.updates 3");
  // The same file with one number changed.
  moe::SafetensorsWriter writer;
  trainer.save(path);
  const moe::SafetensorsFile whole(path);
  std::vector<std::vector<Index>> numbers;
  std::vector<Matrix<float>> floats;
  std::vector<Matrix<double>> doubles;
  for (const auto& [name, tensor] : whole.tensors()) {
    if (tensor.type == "I64") {
      auto& values = numbers.emplace_back(tensor.shape[0]);
      whole.read(name, std::span<Index>(values));
      for (std::size_t i = 0; i < values.size(); ++i) {
        if (broken == name + ' ' + std::to_string(i)) values[i] = i == 1 ? 1000000000 : -100;
      }
    } else if (tensor.type == "F32") {
      floats.push_back(whole.matrix<float>(name));
    } else {
      doubles.push_back(whole.matrix<double>(name));
    }
  }
  auto number = numbers.begin();
  auto single = floats.begin();
  auto twice = doubles.begin();
  for (const auto& [name, tensor] : whole.tensors()) {
    if (tensor.type == "I64") {
      writer.add(name, std::span<const Index>(*number++));
    } else if (tensor.type == "F32") {
      writer.add(name, *single++);
    } else {
      writer.add(name, *twice++);
    }
  }
  writer.write(path);
  Trainer resumed(options, entries);
  const auto before = values_of(resumed.network());
  CHECK_THROWS_WITH(resumed.load(moe::SafetensorsFile(path)),
                    Contains(broken.substr(0, broken.find(' '))));
  const auto after = values_of(resumed.network());
  for (std::size_t i = 0; i < before.size(); ++i) CHECK(same_bits(after[i], before[i]));
}

TEST_CASE("pronounce: options are saved as text and read back", "[pronounce]") {
  Options options = small_options();
  options.learning_rate = 1.0 / 3;
  options.normalise = true;
  std::map<std::string, std::string> texts;
  for_each_option(options, [&](const char* name, const auto& value, const char*) {
    texts[name] = to_text(value);
  });
  const Options back = read_options(texts);
  CHECK(back.learning_rate == 1.0 / 3);
  CHECK(back.normalise);
  CHECK(back.schedule == options.schedule);
  CHECK(back.width == options.width);
  const auto fails = [&](const char* name, const char* text) {
    std::map<std::string, std::string> changed = texts;
    changed[name] = text;
    CHECK_THROWS_WITH(read_options(changed), Contains(std::string("its ") + name + " is"));
  };
  fails("width", "12abc");
  fails("width", "");
  fails("width", "99999999999999999999");
  fails("seed", "-1");
  fails("normalise", "yes");
  fails("dropout", "a tenth");
  texts.erase("width");
  CHECK_THROWS_WITH(read_options(texts), Contains("it has no width"));
}

TEST_CASE("pronounce: the dictionary as it is, and files that are none", "[pronounce]") {
  const moe::test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const auto write = [&](const std::string& text) { std::ofstream(path) << text; };
  std::string words;
  for (char a = 'a'; a <= 'z'; ++a) {
    for (char b = 'a'; b <= 'z'; ++b) words += std::string{a, b} + " AA B\n";
  }
  write(words + "it's IH T S\nread R EH D\nread(2) R IY D\r\nread(3) R EH D\n");
  const Dictionary dictionary = read_dictionary(path);
  CHECK(dictionary.train.size() + dictionary.validation.size() + dictionary.test.size() == 678);
  std::map<std::string, Entry> all;
  for (const auto* part : {&dictionary.train, &dictionary.validation, &dictionary.test}) {
    for (const Entry& entry : *part) all.emplace(entry.word, entry);
  }
  CHECK(all.size() == 678);
  CHECK(all.at("read").pronunciations.size() == 2);  // the same twice is one
  CHECK(all.at("it's").letters.size() == 4);
  const auto fails = [&](const std::string& text, const std::string& message) {
    write(text);
    CHECK_THROWS_WITH(read_dictionary(path), Contains(message));
  };
  fails("word\n", ":1: a word without phonemes");
  fails("a AA\nword W ER QQ\n", ":2: unknown phoneme QQ");
  fails("word W <end>\n", ":1: unknown phoneme <end>");
  fails("w\xc3\xb6rd W ER D\n", ":1: cannot spell");
  fails("", "too few words");
  std::filesystem::remove(path);
  CHECK_THROWS_WITH(read_dictionary(path), Contains("cannot read"));
}
