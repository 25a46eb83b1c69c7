#include "moe/io/pretrained/model_config.hpp"

#include <fstream>
#include <string>
#include <vector>

#include "../../temporary_folder.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

namespace {

io::ModelConfig config_of(const TemporaryFolder& folder, const std::string& text) {
  std::ofstream(folder.file("config.json")) << text;
  return io::ModelConfig(folder.file("config.json"));
}

}  // namespace

TEST_CASE("model config: values, defaults and parts", "[io][pretrained]") {
  const TemporaryFolder folder;
  const io::ModelConfig config = config_of(
      folder, R"({"width": 7, "none": null, "scale": 2.5, "whole": 3, "yes": true, "name": "a",
                  "list": [0, 4], "act": "gelu_new", "inside": {"width": 8, "bad": "x"}})");
  CHECK(config.count("width") == 7);
  CHECK(config.count("width", 1) == 7);
  CHECK(config.count("none", 1) == 1);
  CHECK(!config.has("none"));
  CHECK(config.has("width"));
  CHECK(config.number("scale", 1) == 2.5);
  CHECK(config.number("scale") == 2.5);
  CHECK(config.number("whole", 1) == 3);
  CHECK(config.number("none", 1) == 1);
  CHECK(config.flag("yes", false));
  CHECK(config.flag("none", true));
  CHECK(config.text("name") == "a");
  CHECK(config.text("none", "b") == "b");
  CHECK(config.is_text("name"));
  CHECK(!config.is_text("width"));
  CHECK(!config.is_text("none"));
  CHECK(config.counts("list") == std::vector<Index>{0, 4});
  CHECK(config.counts("none").empty());
  CHECK(config.activation("act") == Activation::gelu_tanh);
  CHECK(config.part("inside").count("width") == 8);
  CHECK(config.part("inside").keys() == std::vector<std::string>{"bad", "width"});
  CHECK_THROWS_WITH(config.part("inside").count("bad"),
                    Contains("\"inside.bad\" is \"x\", must be"));
}

TEST_CASE("model config: what is empty", "[io][pretrained]") {
  const TemporaryFolder folder;
  const io::ModelConfig config =
      config_of(folder, R"({"none": null, "list": [], "object": {}, "full": [0], "flag": false})");
  for (const char* key : {"missing", "none", "list", "object"}) CHECK(config.is_empty(key));
  CHECK(!config.is_empty("full"));
  CHECK(!config.is_empty("flag"));
  CHECK_THROWS_WITH(config.number("missing"), Contains("has no \"missing\""));
  CHECK_THROWS_WITH(config.number("flag"), Contains("\"flag\" is false, must be a number"));
}

TEST_CASE("model config: activations by their names", "[io][pretrained]") {
  const TemporaryFolder folder;
  const auto named = [&](const std::string& name) {
    return config_of(folder, R"({"act": ")" + name + "\"}").activation("act");
  };
  CHECK(named("silu") == Activation::silu);
  CHECK(named("swish") == Activation::silu);
  CHECK(named("relu") == Activation::relu);
  CHECK(named("gelu") == Activation::gelu);
  CHECK(named("gelu_pytorch_tanh") == Activation::gelu_tanh);
  CHECK_THROWS_WITH(named("mish"), Contains("\"act\" is \"mish\", must be silu, relu, gelu"));
}

TEST_CASE("model config: each error names the file, the key and the value", "[io][pretrained]") {
  const TemporaryFolder folder;
  const auto fails = [&](const std::string& text, auto&& read, const std::string& message) {
    CHECK_THROWS_WITH(read(config_of(folder, text)), Contains("config.json") && Contains(message));
  };
  const auto count = [](const io::ModelConfig& c) { c.count("a"); };
  const auto list = [](const io::ModelConfig& c) { c.counts("a"); };
  fails("{}", count, "has no \"a\"");
  fails(R"({"a": null})", count, "has no \"a\"");
  fails(R"({"a": -1})", count, "\"a\" is -1, must be a whole number from 0 to 1000000");
  fails(R"({"a": 1000001})", count, "\"a\" is 1000001, must be");
  fails(R"({"a": 18446744073709551615})", count, "must be a whole number");
  fails(R"({"a": 2.5})", count, "\"a\" is 2.5, must be");
  fails(R"({"a": "2"})", count, "\"a\" is \"2\", must be");
  fails(R"({"a": 2})", list, "\"a\" is 2, must be a list");
  fails(R"({"a": [2, "b"]})", list, "\"a\" is \"b\", must be a whole number");
  fails(R"({"a": "x"})", [](const io::ModelConfig& c) { c.number("a", 0); }, "must be a number");
  fails(R"({"a": 1})", [](const io::ModelConfig& c) { c.flag("a", false); },
        "\"a\" is 1, must be true or false");
  fails(R"({"a": 1})", [](const io::ModelConfig& c) { c.text("a"); },
        "\"a\" is 1, must be a string");
  fails(R"({"a": 1})", [](const io::ModelConfig& c) { c.part("a"); },
        "\"a\" is 1, must be an object");
  fails("[]", count, "is not an object");
  fails("{\"a\": ", count, "is not JSON: ");
  CHECK_THROWS_WITH(io::ModelConfig(folder.file("none.json")),
                    Contains("none.json: cannot be read: No such file"));
}
