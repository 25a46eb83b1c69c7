#include "moe/io/pretrained/checkpoint.hpp"

#include <filesystem>
#include <string>

#include "changed_model.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

namespace {

const std::string index_name = "model.safetensors.index.json";
const std::string router = "model.layers.1.mlp.gate.weight";

void fails(const ChangedModel& model, const std::string& message) {
  CHECK_THROWS_WITH(io::Checkpoint(model.folder()), Contains(message));
}

}  // namespace

TEST_CASE("checkpoint: tensors are found in one file and in shards", "[io][pretrained]") {
  const io::Checkpoint whole(golden("mixtral"));
  CHECK(whole.has("model.norm.weight"));
  CHECK(!whole.has("lm_head.weight"));
  CHECK(whole.file_of("model.norm.weight").path() == golden("mixtral") + "/model.safetensors");
  CHECK_THROWS_WITH(whole.file_of("lm_head.weight"),
                    Contains("mixtral: has no tensor \"lm_head.weight\""));
  CHECK(whole.names("model.layers.1.block_sparse_moe.").size() == 13);
  CHECK(whole.names("model.layers.1.block_sparse_moe.").front() ==
        "model.layers.1.block_sparse_moe.experts.0.w1.weight");
  CHECK(whole.names("n").empty());

  const io::Checkpoint shards(golden("deepseek_v2"));
  CHECK(shards.names().size() == 41);
  CHECK(shards.file_of(router).path() !=
        shards.file_of("model.layers.1.mlp.experts.0.down_proj.weight").path());
  CHECK(shards.file_of(router).matrix<double>(router).rows() == 6);
}

TEST_CASE("checkpoint: a missing shard, and a folder without a model", "[io][pretrained]") {
  const ChangedModel model("deepseek_v2");
  std::filesystem::remove(model.file("model-00003-of-00006.safetensors"));
  fails(model, "model-00003-of-00006.safetensors: cannot be read: No such file");
  std::filesystem::remove(model.file(index_name));
  fails(model, "has neither model.safetensors nor model.safetensors.index.json");
  CHECK_THROWS_WITH(io::Checkpoint(model.file("nowhere")), Contains("nowhere: has neither"));
}

TEST_CASE("checkpoint: a file that is cut short", "[io][pretrained]") {
  const ChangedModel model("deepseek_v2");
  const std::string shard = "model-00002-of-00006.safetensors";
  std::filesystem::resize_file(model.file(shard),
                               std::filesystem::file_size(model.file(shard)) - 1);
  fails(model, shard + ": tensor \"");
  fails(model, "of data, the file has");
  model.write(shard, "abc");
  fails(model, shard + ": is not a safetensors file: it has 3 bytes");
}

TEST_CASE("checkpoint: an index that is wrong", "[io][pretrained]") {
  const auto with = [](const auto& change, const std::string& message) {
    const ChangedModel model("deepseek_v2");
    model.change_json(index_name, change);
    fails(model, message);
  };
  using Json = nlohmann::json;
  with([](Json& j) { j["weight_map"][router] = "model-00001-of-00006.safetensors"; },
       index_name + ": tensor \"" + router + "\" is listed in ");
  with([](Json& j) { j["weight_map"][router] = "model-00001-of-00006.safetensors"; },
       "model-00001-of-00006.safetensors, which has no tensor of that name");
  with([](Json& j) { j["weight_map"]["more"] = "model-00001-of-00006.safetensors"; },
       "tensor \"more\" is listed in ");
  with([](Json& j) { j["weight_map"][router] = 3; }, "must have the name of a file, a string");
  with([](Json& j) { j["weight_map"] = "a"; }, index_name + ": has no object \"weight_map\"");
  with([](Json& j) { j.erase("weight_map"); }, "has no object \"weight_map\"");
  with([](Json& j) { j = Json::array(); }, "has no object \"weight_map\"");
  const ChangedModel model("deepseek_v2");
  model.write(index_name, "{\"weight_map\": {");
  fails(model, index_name + ": is not JSON: ");
}

TEST_CASE("checkpoint: no name in the index leads out of the folder", "[io][pretrained]") {
  for (const std::string& name :
       {std::string("../model.safetensors"), std::string("/etc/passwd"), std::string("a/b"),
        std::string("..\\a"), std::string("C:a"), std::string(".."), std::string("."),
        std::string(), std::string("a\0b", 3)}) {
    INFO(name);
    const ChangedModel model("deepseek_v2");
    model.change_json(index_name, [&](auto& index) { index["weight_map"][router] = name; });
    fails(model, "which must be the name of a file in the same folder");
  }
}
