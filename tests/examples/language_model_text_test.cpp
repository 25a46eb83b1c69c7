#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "../../examples/common/live_plot.hpp"
#include "../../examples/language_model/contexts.hpp"
#include "../../examples/language_model/corpus.hpp"
#include "../../examples/language_model/mixture.hpp"
#include "../../examples/language_model/model.hpp"
#include "../catch.hpp"
#include "../temporary_folder.hpp"

/// \file
/// What the language model reads and shows.

using namespace language_model;
using moe::test::TemporaryFolder;

namespace {

std::vector<std::string> units_of(Unit unit, const std::string& text) {
  std::vector<std::string> units;
  for_each_unit(unit, text, [&](const std::string& u) { units.push_back(u); });
  return units;
}

const char* const dictionary =
    "\n00-database-short\n   The Collaborative Dictionary\n\n"
    "Abbot \\Ab\"bot\\, n. [AS. abbod, F. abb['e].]\n"
    "   1. The superior of an abbey; -- so called.  --Encyc. Brit.\n"
    "      [1913 Webster]\n\n"
    "Ab'bey ([a^]b\"b[y^]), n. (Eccl.)\n   A {monastery}.\n   [WordNet 1.5]\n";

}  // namespace

TEST_CASE("language model: characters of UTF-8 and words", "[examples][language_model]") {
  CHECK(units_of(Unit::word, "It's A b\xc3\xa9ret, 3x.") ==
        std::vector<std::string>{"it", "s", "a", "b\xc3\xa9ret", "x"});
  CHECK(units_of(Unit::character, "Ab \xc3\xa9\xe2\x82\xac.") ==
        std::vector<std::string>{"A", "b", " ", "\xc3\xa9", "\xe2\x82\xac", "."});
  // What is no UTF-8 is not lost.
  CHECK(units_of(Unit::character, "\xbf\xc3") == std::vector<std::string>{"\xbf", "\xc3"});
  CHECK(units_of(Unit::character, "").empty());
}

TEST_CASE("language model: a vocabulary has the most frequent units, ties by the alphabet",
          "[examples][language_model]") {
  const Document a{1, "cab"}, b{2, "acb!"};
  const Vocabulary vocabulary(Unit::character, {&a, &b}, 5);
  CHECK(vocabulary.size() == 5);
  CHECK(vocabulary.id("a") == 2);
  CHECK(vocabulary.id("b") == 3);
  CHECK(vocabulary.id("c") == 4);
  CHECK(vocabulary.id("!") == Vocabulary::unknown);
  CHECK(vocabulary.written(3, "|") == "b");
  CHECK(vocabulary.written(Vocabulary::end, "|") == "|");
  const Vocabulary words(Unit::word, {&a, &b}, 9);
  CHECK(words.written(words.id("cab"), ";") == " cab");
}

TEST_CASE("language model: entries of the dictionary are cleaned", "[examples][language_model]") {
  CHECK(clean("Abbot \\Ab\"bot\\, n. [AS. abbod.] --Encyc. Brit. [1913 Webster] End") ==
        "abbot, n. as. abbod. brit. end");
  CHECK(clean("Muster ([a^]b`c(d)), v. (Mil.) 1. To {pass}; -- also  self-made") ==
        "muster, v. mil.. to pass; -- also self-made");
  // Marks that do not end are text.
  CHECK(clean("a \\b") == "a b");
  CHECK(clean("a [Webster") == "a webster");
  CHECK(clean("a (b*") == "a b");
  CHECK(clean("a --B") == "a --b");
  CHECK(clean("\t 12 [1913 Webster]").empty());
}

TEST_CASE("language model: the dictionary is read by entries, compressed or not at all",
          "[examples][language_model]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("it's a.dict");
  std::ofstream(path, std::ios::binary) << dictionary;
  CHECK_THROWS_WITH(read_gcide(path), "gzip cannot read " + path);
  CHECK_THROWS_WITH(read_gcide(path + ".dz"), "cannot read " + path + ".dz");
  REQUIRE(std::system(("gzip -S .dz \"" + path + "\"").c_str()) == 0);
  const std::vector<Document> entries = read_gcide(path + ".dz");
  REQUIRE(entries.size() == 2);
  CHECK(entries[0].text ==
        "abbot, n. as. abbod, f. abb e.. the superior of an abbey; -- so called. brit.");
  CHECK(entries[1].text == "ab bey, n. eccl. a monastery.");
  CHECK(entries[0].hash == hash_of("abbot"));
  CHECK(entries[1].hash == hash_of("ab"));
}

TEST_CASE("language model: contexts are those of the experts that were asked",
          "[examples][language_model]") {
  // All experts are used for all tokens, so each gets every context, by its weight.
  using Middle = Mixture<moe::NoisyTopKGate<float>>;
  Model<Middle>::Config config{.vocabulary = 4, .width = 4, .memory = 4};
  config.middle = {.gate = {.experts = 2, .top_k = 2}, .hidden = 3};
  const Model<Middle> model(config);
  const Document document{1, "ab"};
  const Vocabulary vocabulary(Unit::character, {&document}, 4);
  // a is 2 and b is 3: "a a a b" again and again.
  std::vector<Index> stream;
  for (int i = 0; i < 40; ++i) stream.push_back(i % 4 == 3 ? 3 : 2);
  const Batches batches(stream, 1, 4);
  // Both experts have the same contexts, so one of them is enough to see.
  const std::vector<Contexts> contexts = typical_contexts(model, batches, vocabulary, 1, 9, 2);
  REQUIRE(contexts.size() == 1);
  CHECK((contexts[0].expert == 0 || contexts[0].expert == 1));
  // Of 36 characters read the last four are, by turns, aaab, aaba, abaa and baaa, but for the first
  // three, which have read less: a, aa and aaa.
  REQUIRE(contexts[0].endings.size() == 5);
  double sum = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    const Ending& ending = contexts[0].endings[i];
    CHECK(ending.text.size() == 4);
    CHECK(std::count(ending.text.begin(), ending.text.end(), 'b') == 1);
    CHECK(ending.share > 0.15);
    sum += ending.share;
  }
  CHECK(sum < 1);
  CHECK(contexts[0].share == 0.5);
  // All weights are a half, so the first three texts stay: what was read, the token, what follows.
  REQUIRE(contexts[0].strongest.size() == 3);
  CHECK(contexts[0].strongest[0].text == "[a]a");
  CHECK(contexts[0].strongest[1].text == "a[a]a");
  CHECK(contexts[0].strongest[2].text == "aa[a]b");
  CHECK(contexts[0].strongest[0].weight == 0.5);
  CHECK(typical_contexts(model, batches, vocabulary, 1, 9, 0).empty());
}

TEST_CASE("language model: the contexts of the largest weights are kept, each once",
          "[examples][language_model]") {
  std::vector<Surrounded> kept;
  int made = 0;
  const auto add = [&](double weight, const std::string& text) {
    keep_strongest(kept, 2, weight, [&] {
      ++made;
      return text;
    });
  };
  const auto texts = [&] {
    std::string all;
    for (const Surrounded& one : kept) all += one.text;
    return all;
  };
  add(0.5, "a");
  add(0.7, "b");
  CHECK(texts() == "ba");
  add(0.5, "c");  // not more than the last one
  CHECK(made == 2);
  add(0.6, "b");  // known, with a larger weight, which it keeps
  CHECK(texts() == "ba");
  CHECK(kept[0].weight == 0.7);
  add(0.9, "a");
  CHECK(texts() == "ab");
  add(0.8, "d");
  CHECK(texts() == "ad");
  CHECK(kept[1].weight == 0.8);
}

TEST_CASE("language model: the last words or characters of what was read",
          "[examples][language_model]") {
  CHECK(last_units(" one two three", Unit::word, 1) == "three");
  CHECK(last_units(" one two three", Unit::word, 2) == "two three");
  CHECK(last_units(" one two three", Unit::word, 9) == "one two three");
  CHECK(last_units("", Unit::word, 2).empty());
  CHECK(last_units("abcdef", Unit::character, 4) == "cdef");
  CHECK(last_units("ab", Unit::character, 4) == "ab");
  CHECK(last_units("", Unit::character, 4).empty());
  CHECK(last_units("ab", Unit::character, 0).empty());
  // Characters of two, three and four bytes.
  CHECK(last_units("\u00e9", Unit::character, 1) == "\u00e9");
  CHECK(last_units("a\u00e9\u20ac\U0001f600", Unit::character, 1) == "\U0001f600");
  CHECK(last_units("a\u00e9\u20ac\U0001f600", Unit::character, 3) == "\u00e9\u20ac\U0001f600");
  CHECK(last_units("a\u00e9\u20acb", Unit::character, 9) == "a\u00e9\u20acb");
  // Not UTF-8.
  CHECK(last_units("\x80\x80", Unit::character, 1) == "\x80\x80");
  CHECK(in_cell(" a|b`c\n") == "`a/b'c\u00b6`");
}

TEST_CASE("examples: a plot has its highest value above and later curves in front", "[examples]") {
  examples::LivePlot plot({{"one", '.'}, {"two", '#'}}, false);
  CHECK(plot.drawn().empty());
  plot.add(0, 0, 4);
  CHECK(plot.drawn().empty());  // no range yet
  plot.add(0, 0.5, 3);
  plot.add(1, 0.5, 3);
  plot.add(1, 1, 2);
  plot.add(1, 0.9, std::numeric_limits<double>::quiet_NaN());
  const std::string text = plot.drawn();
  CHECK(std::count(text.begin(), text.end(), '\n') == 12);
  CHECK(text.starts_with("  4.000 |."));
  const std::size_t last = text.rfind("  2.000 |");
  REQUIRE(last != std::string::npos);
  CHECK(text[last + 9 + 63] == '#');
  CHECK(text.find("  . one\n") < text.find("  # two\n"));
  CHECK(std::count(text.begin(), text.end(), '.') == 1 + 2 + 1);  // the point, labels, the legend
}
