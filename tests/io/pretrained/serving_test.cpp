#include <string>

#include "../../support.hpp"
#include "../../weights/formats.hpp"
#include "changed_model.hpp"
#include "golden.hpp"
#include "moe/io/pretrained_serving.hpp"

using namespace moe;
using namespace moe::test;
using Catch::Matchers::Contains;

namespace {

/// A layer that is narrowed as it is read has the bits of one that was read and then narrowed.
template <class Layer, class Format>
void check_serving(const std::string& name, Index number) {
  INFO(name << " in " << Format::name);
  using Serving = ServingLayer<Layer, Format>;
  const io::Pretrained model = io::open_pretrained(golden(name));
  const auto layer = model.load_layer<Layer>(number);
  const auto served = io::load_serving<Serving>(model, number);
  const auto x = random_matrix<float>(30, layer.config().width, 1);
  CHECK(same_bits(served.evaluate(x), Serving(layer).evaluate(x)));
  CHECK(relative_error(served.evaluate(x), layer.evaluate(x)) < 0.3);
}

}  // namespace

TEMPLATE_TEST_CASE("pretrained: a layer is narrowed as it is read", "[io][pretrained]",
                   MOE_TEST_FORMATS) {
  using Routed = io::RoutedLayer<float>;
  using Shared = io::SharedLayer<float>;
  check_serving<Routed, TestType>("mixtral", 1);
  check_serving<Routed, TestType>("granitemoe", 0);
  check_serving<Routed, TestType>("switch_transformers", 3);
  check_serving<Routed, TestType>("gpt_oss", 0);
  check_serving<Shared, TestType>("mixtral", 1);
  check_serving<Shared, TestType>("qwen2_moe", 1);
  check_serving<Shared, TestType>("deepseek_v3", 1);
  check_serving<Shared, TestType>("llama4", 1);
}

TEST_CASE("pretrained: what cannot be narrowed as it is read is refused", "[io][pretrained]") {
  const io::Pretrained model = io::open_pretrained(golden("mixtral"));
  using Routed = ServingLayer<io::RoutedLayer<float>, BFloat16>;
  CHECK_THROWS_WITH(io::load_serving<Routed>(model, 1, {.activations = Activations::int8}),
                    Contains("NarrowOptions.activations"));
  CHECK_THROWS_WITH(io::load_serving<Routed>(model, 77), Contains("layer 77 is not a mixture"));
  const ChangedModel changed("mixtral");
  changed.set("num_experts_per_tok", 5);
  CHECK_THROWS_WITH(io::load_serving<Routed>(io::open_pretrained(changed.folder()), 1),
                    Contains("config.json: layer 1: ") && Contains("top_k = 5"));
  const io::Pretrained deepseek = io::open_pretrained(golden("deepseek_v2"));
  CHECK_THROWS_WITH(io::load_serving<Routed>(deepseek, 1), Contains("SharedLayer"));
}

TEST_CASE("pretrained: a served layer takes batches of any number of sequences",
          "[io][pretrained]") {
  using Serving = ServingLayer<io::RoutedLayer<float>, BFloat16>;
  const io::Pretrained model = io::open_pretrained(golden("switch_transformers"));
  const auto served = io::load_serving<Serving>(model, 3);
  const auto x = random_matrix<float>(30, model.mixture(3).width, 1);
  Serving::Tape batch;
  Serving::Tape one;
  for (const Index sequences : {2, 3}) {
    const Matrix<float> y = served.evaluate(x, batch, {.sequences = sequences});
    const Index length = 30 / sequences;
    for (Index first = 0; first < 30; first += length) {
      CHECK(same_bits(y.middleRows(first, length),
                      served.evaluate(x.middleRows(first, length), one)));
    }
  }
}

TEST_CASE("pretrained: a layer that is narrowed as it is read may keep all tokens",
          "[io][pretrained]") {
  using Layer = io::RoutedLayer<float>;
  using Serving = ServingLayer<Layer, BFloat16>;
  const io::Pretrained model = io::open_pretrained(golden("switch_transformers"));
  const auto x = random_matrix<float>(30, model.mixture(3).width, 1);
  auto config = model.layer_config<Layer>(3);
  REQUIRE(config.gate.evaluation_capacity == 1);
  config.gate.capacity = 0;
  config.gate.evaluation_capacity = 0;
  const auto served = io::load_serving<Serving>(model, 3, config);
  Layer layer(config);
  model.read_layer(3, layer);
  CHECK(same_bits(served.evaluate(x), Serving(layer).evaluate(x)));
  CHECK(served.evaluate(x) != io::load_serving<Serving>(model, 3).evaluate(x));
}
