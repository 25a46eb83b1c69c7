/// A training that is interrupted in the middle of an epoch goes on in a second run from one file, with
/// model, optimizer and position, and ends with the bits of a run without a break. Argument: the file.

#include <cstdint>
#include <cstdio>
#include <moe/io/safetensors.hpp>
#include <moe/moe.hpp>
#include <string>

#include "../common/clouds.hpp"

using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
constexpr moe::Index rows_of_data = 1000, rows_of_batch = 64;
constexpr std::uint64_t batches_of_epoch = 16;  // 15 of 64 rows, and one of 40

/// Updates first, ..., last, counted from 1. All randomness is a function of seeds and the number of the
/// update, so there is no generator whose state would have to be saved.
void train(Layer& layer, moe::Adam<float>& adam, std::uint64_t first, std::uint64_t last) {
  moe::Matrix<float> all_x, all_y, x, y;
  examples::Clouds().draw(rows_of_data, 1, all_x, all_y);
  Layer::Tape tape;
  const moe::Batches::Config order{.rows = rows_of_data, .batch_rows = rows_of_batch, .seed = 2};
  moe::Batches epoch(order, (first - 1) / batches_of_epoch);
  for (std::uint64_t step = first; step <= last; ++step) {
    const std::uint64_t number = (step - 1) % batches_of_epoch;
    if (number == 0) epoch = moe::Batches(order, (step - 1) / batches_of_epoch);
    const auto batch = epoch[static_cast<moe::Index>(number)];
    moe::gather_rows(all_x, batch, x);
    moe::gather_rows(all_y, batch, y);
    const moe::Matrix<float> dy = layer.forward(x, tape, {.step = step}) - y;
    moe::zero_gradients(layer);
    layer.backward(dy / static_cast<float>(x.rows()), tape);
    adam.update(layer, 1e-2);
  }
}

int main(int count, char** arguments) {
  const std::string path = count > 1 ? arguments[1] : "resume.safetensors";
  const Layer::Config config{.width = examples::Clouds::width,
                             .expert = {.hidden = 16},
                             .gate = {.experts = 8, .top_k = 2},
                             .seed = 1};
  Layer unbroken(config);
  moe::Adam<float> unbroken_adam;
  train(unbroken, unbroken_adam, 1, 60);

  {  // the first run: 25 updates, of which the last 9 are the beginning of an epoch
    Layer layer(config);
    moe::Adam<float> adam;
    train(layer, adam, 1, 25);
    moe::SafetensorsWriter writer;
    writer.add_module(layer, "layer.");
    writer.add_optimizer(adam, layer, "adam.");
    writer.set_metadata("step", "25");
    writer.write(path);
  }
  // The second run knows nothing but the file.
  const moe::SafetensorsFile file(path);
  Layer layer(file.config<Layer>("layer."));
  moe::Adam<float> adam;
  file.read_module(layer, "layer.");
  file.read_optimizer(adam, layer, "adam.");
  train(layer, adam, std::stoull(file.metadata("step")) + 1, 60);

  moe::Matrix<float> x, y;
  examples::Clouds().draw(500, 3, x, y);
  const bool equal = layer.evaluate(x) == unbroken.evaluate(x);
  std::printf("after 60 updates both layers give %s numbers\n", equal ? "the same" : "OTHER");
  return equal ? 0 : 1;
}
