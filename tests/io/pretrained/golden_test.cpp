#include "golden.hpp"

#include <string>
#include <vector>

#include "../../naive_layer.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// One layer of a golden model computes what transformers did with a batch of this number of sequences, forward
/// and backward.
template <class Layer>
void check_golden(const std::string& model, Index number, Index sequences = 0) {
  INFO(model << ", layer " << number);
  const io::Pretrained opened = io::open_pretrained(golden(model));
  Layer layer = opened.load_layer<Layer>(number);
  const Matrix<double> x = golden_rows(model, "x");
  const Matrix<double> y = golden_rows(model, "y");
  CHECK(y.cwiseAbs().maxCoeff() > 0.1);
  typename Layer::Tape tape;
  CHECK(largest_difference(layer.evaluate(x, tape, {.sequences = sequences}), y) < 1e-10);
  CHECK(largest_difference(layer.forward(x, tape, {.step = 1, .sequences = sequences}), y) < 1e-10);
  CHECK(largest_difference(layer.backward(golden_rows(model, "dy"), tape),
                           golden_rows(model, "dx")) < 1e-10);

  // The gradients are stored as a model of the same names.
  const Layer expected =
      io::open_pretrained(golden(model) + "/gradients").load_layer<Layer>(number);
  const Named gradients = values_of(expected);
  Index compared = 0;
  for_each_parameter(layer, [&](const std::string& name, auto& parameter) {
    INFO(name);
    const Matrix<double>& gradient = gradients.at(name);
    if (!parameter.trained) return;
    CHECK(largest_difference(parameter.gradient(), gradient) < 1e-10);
    if (gradient.cwiseAbs().maxCoeff() > 1e-3) ++compared;
  });
  CHECK(compared > 4);
}

}  // namespace

TEST_CASE("pretrained: golden models of routed experts", "[io][pretrained]") {
  using Layer = io::RoutedLayer<double>;
  check_golden<Layer>("mixtral", 1);
  check_golden<Layer>("olmoe", 0);
  check_golden<Layer>("qwen3_moe", 0);
  check_golden<Layer>("granitemoe", 0);
  check_golden<Layer>("gpt_oss", 0);
}

TEST_CASE("pretrained: Switch Transformer drops the tokens of a sequence that find no place",
          "[io][pretrained]") {
  using Layer = io::RoutedLayer<double>;
  const auto config = io::open_pretrained(golden("switch_transformers")).layer_config<Layer>(3);
  CHECK(config.gate.capacity == 1);
  CHECK(config.gate.evaluation_capacity == 1);
  check_golden<Layer>("switch_transformers", 3, 2);
  check_golden<io::SharedLayer<double>>("switch_transformers", 3, 2);
  // The fourth token of the first sequence.
  const Matrix<double> y = golden_rows("switch_transformers", "y");
  CHECK(y.row(3).cwiseAbs().maxCoeff() == 0);
  CHECK(y.row(2).cwiseAbs().maxCoeff() > 0);
}

TEST_CASE("pretrained: golden models in the type for any mixture", "[io][pretrained]") {
  using Layer = io::SharedLayer<double>;
  check_golden<Layer>("mixtral", 1);
  check_golden<Layer>("granitemoe", 0);
  check_golden<Layer>("gpt_oss", 0);
  check_golden<Layer>("qwen2_moe", 1);
  check_golden<Layer>("deepseek_v2", 1);
  check_golden<Layer>("deepseek_v3", 1);
  check_golden<Layer>("glm4_moe", 1);
  check_golden<Layer>("llama4", 1);
  check_golden<Layer>("llama4_fp8", 1);
}
