#include <filesystem>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "../../naive_layer.hpp"
#include "changed_model.hpp"
#include "moe/io/pretrained.hpp"

using namespace moe;
using Catch::Matchers::Contains;
using namespace moe::test;

// Layers under the names of a family, so that transformers reads them.

namespace {

using Routed = io::RoutedLayer<double>;
using Shared = io::SharedLayer<double>;

/// The tensors of one mixture in the files of a golden model, but how they were narrowed.
std::map<std::string, Matrix<double>> stored_tensors(const std::string& model,
                                                     const std::string& prefix) {
  const io::Checkpoint checkpoint(golden(model));
  std::map<std::string, Matrix<double>> tensors;
  for (const std::string& name : checkpoint.names(prefix)) {
    tensors[name] = checkpoint.file_of(name).matrix<double>(name);
  }
  return tensors;
}

/// What is saved has the names, the shapes and the numbers that transformers wrote.
template <class Layer>
void check_saved(const std::string& model, Index number, const std::string& prefix) {
  INFO(model);
  const TemporaryFolder folder;
  const io::Pretrained opened = io::open_pretrained(golden(model));
  const auto layer = opened.load_layer<Layer>(number);
  SafetensorsWriter writer;
  io::add_layer(writer, opened.mixture(number), layer);
  writer.write(folder.file("model.safetensors"));
  const SafetensorsFile file(folder.file("model.safetensors"));
  const auto expected = stored_tensors(model, prefix);
  CHECK(file.tensors().size() == expected.size());
  for (const auto& [name, value] : expected) {
    INFO(name);
    CHECK(file.tensor(name).shape == opened.checkpoint().file_of(name).tensor(name).shape);
    CHECK(file.matrix<double>(name) == value);
  }
}

/// What is saved is loaded again.
template <class Layer>
void check_loaded_again(const std::string& model, Index number) {
  INFO(model);
  const TemporaryFolder folder;
  const io::Pretrained opened = io::open_pretrained(golden(model));
  auto layer = opened.load_layer<Layer>(number);
  randomize(layer, 3);
  SafetensorsWriter writer;
  io::add_layer(writer, opened.mixture(number), layer);
  writer.write(folder.file("model.safetensors"));
  std::filesystem::copy(golden(model) + "/config.json", folder.file("config.json"));
  const auto loaded = io::open_pretrained(folder.file("")).load_layer<Layer>(number);
  CHECK(values_of(loaded) == values_of(layer));
}

}  // namespace

TEST_CASE("pretrained: a layer is saved as transformers saves it", "[io][pretrained]") {
  check_saved<Routed>("mixtral", 1, "model.layers.1.block_sparse_moe.");
  check_saved<Routed>("olmoe", 0, "model.layers.0.mlp.");
  check_saved<Routed>("granitemoe", 0, "model.layers.0.block_sparse_moe.");
  check_saved<Routed>("switch_transformers", 1, "encoder.block.1.layer.1.mlp.");
  check_saved<Routed>("switch_transformers", 2, "decoder.block.0.layer.2.mlp.");
  check_saved<Shared>("mixtral", 1, "model.layers.1.block_sparse_moe.");
  check_saved<Shared>("qwen2_moe", 1, "model.layers.1.mlp.");
  check_saved<Shared>("deepseek_v2", 1, "model.layers.1.mlp.");
  check_saved<Shared>("glm4_moe", 1, "model.layers.1.mlp.");
  check_saved<Shared>("llama4", 1, "language_model.model.layers.1.feed_forward.");
}

TEST_CASE("pretrained: a saved layer of any family is loaded again, to the bit",
          "[io][pretrained]") {
  check_loaded_again<Routed>("mixtral", 0);
  check_loaded_again<Routed>("olmoe", 1);
  check_loaded_again<Routed>("qwen3_moe", 0);
  check_loaded_again<Routed>("gpt_oss", 0);
  check_loaded_again<Routed>("granitemoe", 1);
  check_loaded_again<Routed>("switch_transformers", 3);
  check_loaded_again<Shared>("gpt_oss", 0);
  check_loaded_again<Shared>("qwen2_moe", 1);
  check_loaded_again<Shared>("deepseek_v2", 1);
  check_loaded_again<Shared>("deepseek_v3", 1);
  check_loaded_again<Shared>("glm4_moe", 1);
  check_loaded_again<Shared>("llama4", 1);
}

TEST_CASE("pretrained: several layers go into one file", "[io][pretrained]") {
  const TemporaryFolder folder;
  const io::Pretrained opened = io::open_pretrained(golden("mixtral"));
  const auto first = opened.load_layer<Routed>(0);
  const auto second = opened.load_layer<Routed>(1);
  SafetensorsWriter writer;
  io::add_layer(writer, opened.mixture(0), first);
  io::add_layer(writer, opened.mixture(1), second);
  CHECK_THROWS_WITH(io::add_layer(writer, opened.mixture(1), first), Contains("is there already"));
  writer.write(folder.file("model.safetensors"));
  CHECK(SafetensorsFile(folder.file("model.safetensors")).tensors().size() == 26);
}

TEST_CASE("pretrained: a layer that is not of the mixture's shape is not saved",
          "[io][pretrained]") {
  const io::Pretrained opened = io::open_pretrained(golden("mixtral"));
  auto config = opened.layer_config<Routed>(0);
  config.expert.hidden = 3;
  SafetensorsWriter writer;
  const Routed narrow(config);
  CHECK_THROWS_WITH(io::add_layer(writer, opened.mixture(0), narrow),
                    Contains("parameter experts.0.gate.weight of the layer is 6 x 3"));
  config = opened.layer_config<Routed>(0);
  io::Mixture more = opened.mixture(0);
  more.bias = true;
  const Routed unbiased(config);
  CHECK_THROWS_WITH(io::add_layer(writer, more, unbiased),
                    Contains("the layer has 13 parameters, the mixture 25"));
  more.layouts.clear();
  CHECK_THROWS_WITH(io::add_layer(writer, more, unbiased),
                    Contains("add_layer: Mixture.layouts is empty"));
}
