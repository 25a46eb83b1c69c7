#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"

using namespace moe;
using Catch::Matchers::Contains;

namespace {

enum class Mode { off, on };

/// A module of a user's, with a field of every kind.
struct Own {
  struct Inner {
    float half = 0.5f;
    std::int8_t tiny = -3;

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("half", self.half);
      visit("tiny", self.tiny);
    }
  };
  struct Config {
    Seed seed;
    Inner inner{};
    bool flag = false;
    Mode mode = Mode::off;
    Activation activation = Activation::relu;
    double rate = 0.1;

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("seed", self.seed);
      visit("inner", self.inner);
      visit("flag", self.flag);
      visit("mode", self.mode);
      visit("activation", self.activation);
      visit("rate", self.rate);
    }
  };
  Config own;
  Parameter<float> weight{1, 1};

  const Config& config() const { return own; }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight);
  }
};

std::map<std::string, std::string> own_metadata() {
  return {{"own.config.seed", "7"},           {"own.config.inner.half", "0.5"},
          {"own.config.inner.tiny", "-3"},    {"own.config.flag", "false"},
          {"own.config.mode", "0"},           {"own.config.activation", "relu"},
          {"own.config.rate", "0.1"},         {"own.config", "not one"},
          {"other.config.rate", "something"}, {"own.configs.rate", "something"}};
}

void write_own(const std::string& path, const std::map<std::string, std::string>& metadata) {
  const Matrix<float> weight = Matrix<float>::Constant(1, 1, 4);
  SafetensorsWriter writer;
  writer.add("own.weight", weight);
  for (const auto& [key, text] : metadata) writer.set_metadata(key, text);
  writer.write(path);
}

}  // namespace

TEST_CASE("safetensors config: what is not in the file is passed by", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  const Own::Config config{.seed = 1, .rate = 0.2};
  Own own{config};
  write_own(path, {});
  SafetensorsFile(path).read_module(own, "own.");
  CHECK(own.weight.value(0, 0) == 4);
  auto metadata = own_metadata();
  metadata.erase("own.config.rate");
  write_own(path, metadata);
  SafetensorsFile(path).read_module(own, "own.");
  CHECK_THROWS_WITH(SafetensorsFile(path).config<Own>("own."),
                    Contains("has no metadata \"own.config.rate\""));
  metadata["own.config.heads"] = "8";
  write_own(path, metadata);
  CHECK_THROWS_WITH(SafetensorsFile(path).read_module(own, "own."),
                    Contains("has metadata \"own.config.heads\", a field"));
  metadata = own_metadata();
  metadata["own.config.heads"] = "8";
  write_own(path, metadata);
  CHECK_THROWS_WITH(SafetensorsFile(path).config<Own>("own."),
                    Contains("has metadata \"own.config.heads\", a field"));
}

TEST_CASE("safetensors config: nothing in a file is believed", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  Own own{{.seed = 1}};
  write_own(path, own_metadata());
  SafetensorsFile(path).read_module(own, "own.");
  CHECK(SafetensorsFile(path).config<Own>("own.").seed == 7u);

  const auto fails = [&](const std::string& field, const std::string& text,
                         const std::string& message) {
    INFO(field << " = " << text.substr(0, 200));
    auto metadata = own_metadata();
    metadata["own.config." + field] = text;
    write_own(path, metadata);
    own.weight.value(0, 0) = 9;
    const SafetensorsFile file(path);
    CHECK_THROWS_WITH(file.config<Own>("own."), Contains(message));
    CHECK_THROWS_WITH(file.config<Own>("own."), Contains("\"own.config." + field + "\""));
    CHECK_THROWS_WITH(file.config<Own>("own."), Contains(path));
    CHECK_THROWS_AS(file.config<Own>("own."), std::runtime_error);
    if (field == "seed") return;
    CHECK_THROWS_WITH(file.read_module(own, "own."), Contains(message));
    CHECK(own.weight.value(0, 0) == 9);
  };
  for (const std::string& text : std::vector<std::string>{
           "",      " ",       "nan",   "NaN",  "-nan", "inf",  "-inf", "Infinity",
           "1e400", "-1e400",  "0x1p3", "0.1 ", " 0.1", "+0.1", "0,1",  "0.1f",
           "[0.1]", "\"0.1\"", "true",  "null", "1;",   "1e",   "-",    "."}) {
    fails("rate", text, "is \"" + text + "\", must be a finite number");
  }
  fails("rate", std::string(1000000, '['), "[...\", must be a finite number");
  fails("rate", "-" + std::string(1000000, '['), "[...\", must be a finite number");
  fails("rate", std::string(1000000, '9'), "9...\", must be a finite number");
  fails("rate", std::string("0.1\0", 4), "is \"0.1?\", must be a finite number");
  fails("rate", std::string("0.1\0001", 5), "must be a finite number");
  fails("inner.tiny", std::string("1\0", 2), "must be a whole number");
  fails("inner.half", "1e39", "must be a finite number");
  for (const std::string& text :
       std::vector<std::string>{"", "128", "-129", "1.0", "1e1", " 1", "1 ", "0x1", "one", "--1",
                                "9223372036854775808", "99999999999999999999999"}) {
    fails("inner.tiny", text, "is \"" + text + "\", must be a whole number from -128 to 127");
  }
  for (const std::string& text :
       std::vector<std::string>{"-1", "18446744073709551616", "1.5", ""}) {
    fails("seed", text, "must be a whole number from 0 to 18446744073709551615");
  }
  for (const std::string& text :
       std::vector<std::string>{"True", "1", "0", "", "truely", "\x1b[2J"}) {
    fails("flag", text, "must be true or false");
  }
  for (const std::string& text : std::vector<std::string>{"Relu", "1", "", "relu "}) {
    fails("activation", text,
          "must be one of identity, relu, squared_relu, gelu, gelu_tanh, gelu_sigmoid, silu, "
          "sigmoid, tanh");
  }
  fails("mode", "off", "must be a whole number from -2147483648 to 2147483647");
  fails("mode", "2147483648", "must be a whole number");
  fails("flag", std::string("\x1b[2J\n"), "is \"?[2J?\"");
}

TEST_CASE("safetensors config: numbers as other programs write them", "[io]") {
  const test::TemporaryFolder folder;
  const std::string path = folder.file("a");
  for (const auto& [text, number] :
       std::vector<std::pair<std::string, double>>{{"1", 1},
                                                   {"1.0", 1},
                                                   {"1e-05", 1e-5},
                                                   {"1E+2", 100},
                                                   {"-0.0", 0},
                                                   {"0.1000000000000000055", 0.1}}) {
    auto metadata = own_metadata();
    metadata["own.config.rate"] = text;
    metadata["own.config.mode"] = "1";
    write_own(path, metadata);
    const auto config = SafetensorsFile(path).config<Own>("own.");
    CHECK(config.rate == number);
    CHECK(config.mode == Mode::on);
    Own own{{.seed = 1, .mode = Mode::on, .rate = number}};
    SafetensorsFile(path).read_module(own, "own.");
  }
}

TEST_CASE("safetensors config: a writer that is used wrongly adds nothing", "[io]") {
  const test::TemporaryFolder folder;
  const Own own{{.seed = 1, .rate = std::numeric_limits<double>::infinity()}};
  SafetensorsWriter writer;
  CHECK_THROWS_WITH(writer.add_module(own, "own."),
                    Contains("SafetensorsWriter: own.config.rate = inf, must be finite"));
  const Own good{{.seed = 1}};
  writer.set_metadata("good.config.rate", "5");
  CHECK_THROWS_WITH(writer.add_module(good, "good."),
                    Contains("metadata \"good.config.rate\" is there already"));
  writer.write(folder.file("a"));
  CHECK(SafetensorsFile(folder.file("a")).tensors().empty());
  CHECK(SafetensorsFile(folder.file("a")).metadata().size() == 1);
}
