#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "moe/io/safetensors.hpp"
#include "moe/moe.hpp"

/// The program of docs/experts.md, and what it leaves in a file.

using namespace moe;

TEST_CASE("example: experts are copied, removed and added while a layer is trained",
          "[examples][change]") {
  using Layer = MoELayer<Expert<FeedForward>>;
  Layer layer(
      {.width = 12, .expert = {.hidden = 16}, .gate = {.experts = 8, .top_k = 2}, .seed = 1});
  Layer& model = layer;
  Adam<float> adam;
  const auto x = test::random_matrix<float>(64, 12, 2);
  const Matrix<float> target = x.rowwise().reverse();
  const auto train = [&](Layer& trained, Adam<float>& optimizer, std::uint64_t first, int updates) {
    Layer::Tape tape;
    double loss = 0;
    for (int i = 0; i < updates; ++i) {
      zero_gradients(trained);
      const auto step = first + static_cast<std::uint64_t>(i);
      const Matrix<float> difference = trained.forward(x, tape, {.step = step}) - target;
      loss = difference.squaredNorm() / 64;
      trained.backward(difference / 32, tape);
      optimizer.update(trained, 0.01);
    }
    return loss;
  };
  const double early = train(layer, adam, 0, 60);

  moe::ExpertChange change = layer.copy_experts({3, 5}, {.noise_stddev = 0.01, .seed = 7});
  adam.follow(model, layer, change);
  change = layer.remove_experts({0, 2});
  adam.follow(model, layer, change);
  change = layer.add_experts(4, 8);
  adam.follow(model, layer, change);

  CHECK(layer.config().gate.experts == 12);
  CHECK(train(layer, adam, 60, 60) < early);

  const test::TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  SafetensorsWriter writer;
  writer.add_module(layer, "layer.");
  writer.add_optimizer(adam, layer, "adam.");
  writer.write(path);
  const SafetensorsFile file(path);
  Layer loaded(
      {.width = 12, .expert = {.hidden = 16}, .gate = {.experts = 12, .top_k = 2}, .seed = 1});
  Adam<float> resumed;
  file.read_module(loaded, "layer.");
  file.read_optimizer(resumed, loaded, "adam.");
  CHECK(train(loaded, resumed, 120, 3) == train(layer, adam, 120, 3));
  CHECK(test::same_bits(loaded.evaluate(x), layer.evaluate(x)));
}
