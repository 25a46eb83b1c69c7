#include <moe/weights/serving_layer.hpp>
#include <string>
#include <vector>

#include "../../examples/language_model/serving.hpp"
#include "../catch.hpp"

/// \file
/// What --serve evaluates and prints.

using namespace language_model;
using Catch::Matchers::Contains;

namespace {

using Middle = Mixture<moe::NoisyTopKGate<float>>;

constexpr Index vocabulary = 20;

/// With every part that a model can have: projections, norms, two mixtures, and a softmax with two tails.
Model<Middle> small_model() {
  Model<Middle>::Config config{.vocabulary = vocabulary, .width = 40, .memory = 36};
  config.pre_norm = true;
  config.cutoffs = {8, 14};
  config.middle = {.gate = {.experts = 6, .top_k = 2},
                   .hidden = 33,
                   .output = moe::Activation::identity,
                   .gate_deviation = 1};
  config.mixtures = 2;
  config.embedding_deviation = 1;
  config.seed = 4;
  return Model<Middle>(config);
}

std::vector<Index> made_up_stream(std::uint32_t length, std::uint64_t seed) {
  std::vector<Index> stream;
  for (std::uint32_t i = 0; i < length; ++i) {
    stream.push_back(static_cast<Index>(moe::philox({i, 0, 0, 0}, seed)[0] % vocabulary));
  }
  return stream;
}

/// The model in float with the weights that the format rounds to.
template <class Format>
Model<Middle> rounded(Model<Middle> model) {
  int changed = 0;
  moe::for_each_parameter(model, [&](const std::string& name, auto& parameter) {
    const bool is_linear = name.starts_with("softmax.") || name.find(".projection.") < name.size();
    if (!name.ends_with("weight") || !(is_linear || is_of_expert(name))) return;
    parameter.value = moe::NarrowMatrix<Format>(parameter.value).decoded();
    ++changed;
  });
  // Twice six experts of two, the projections of two LSTMs, the head, and two tails of two.
  CHECK(changed == 2 * 6 * 2 + 2 + 1 + 2 * 2);
  return model;
}

}  // namespace

TEMPLATE_TEST_CASE("language model: a served one is the model with rounded weights",
                   "[examples][language_model]", moe::BFloat16, moe::Float16, moe::Int8,
                   moe::Int4) {
  const Model<Middle> model = small_model();
  const std::vector<Index> first = made_up_stream(161, 1), second = made_up_stream(97, 2);
  const Batches validation(first, 4, 8), test(second, 4, 8);
  CHECK(validation.tokens() == 5 * 4 * 8);
  CHECK(test.tokens() == 3 * 4 * 8);
  const Served served = serve(model, {TestType::name}, validation, test, 4);
  const Model<Middle> expected = rounded<TestType>(model);
  // To the last bit, or of formats with scales up to rounding.
  const double most = TestType::scaled ? 1e-6 : 0;
  const auto is_same = [&](double perplexity, double wanted) {
    return std::abs(perplexity / wanted - 1) <= most;
  };
  CHECK(is_same(served.validation.perplexity, evaluate(expected, validation, 4).perplexity));
  CHECK(is_same(served.test.perplexity, evaluate(expected, test, 4).perplexity));
  CHECK(served.test.perplexity != evaluate(model, test, 4).perplexity);
  CHECK(served.test.balance.tokens_per_expert ==
        evaluate(expected, test, 4).balance.tokens_per_expert);
  CHECK(served.tokens_per_second > 0);

  // Everywhere: a word's probabilities are those of the whole softmax.
  const ServedModel<Middle, TestType> narrow(model, {});
  typename ServedModel<Middle, TestType>::Tape narrow_tape;
  Model<Middle>::Tape tape;
  auto narrow_state = narrow.initial_state(1);
  auto state = expected.initial_state(1);
  for (const Index word : {3, 19}) {
    const std::vector<Index> input{word};
    const auto found = narrow.log_probabilities(input, narrow_state, narrow_tape);
    const auto wanted = expected.log_probabilities(input, state, tape);
    CHECK((found - wanted).array().abs().maxCoeff() <= 10 * most);
  }
}

TEST_CASE(
    "language model: rounded activations change little, and are rounded where they are asked for",
    "[examples][language_model]") {
  const Model<Middle> model = small_model();
  const std::vector<Index> stream = made_up_stream(161, 1);
  const Batches text(stream, 4, 8);
  const double trained = serve(model, {trained_format}, text, text, 4).test.perplexity;
  CHECK(trained == evaluate(model, text, 4).perplexity);
  for (const char* format : {"int8", "int4"}) {
    INFO(format);
    const double wide = serve(model, {format}, text, text, 4).test.perplexity;
    const double rounded =
        serve(model, {format, moe::Activations::int8}, text, text, 4).test.perplexity;
    CHECK(rounded != wide);
    CHECK(std::abs(rounded / wide - 1) < 0.01);
    CHECK(std::abs(wide / trained - 1) < 0.05);
  }
}

TEST_CASE("language model: the activations of every part are rounded",
          "[examples][language_model]") {
  using Linear = moe::NarrowLinear<moe::Int8>;
  const moe::NarrowOptions wide{}, rounded{.activations = moe::Activations::int8};
  Matrix x(8, 40);
  moe::fill_normal(x, 1.0f, 1);

  const Recurrent<> recurrent({.width = 40, .hidden = 36}, 1);
  const auto after_lstm = [&](const moe::NarrowOptions& options) -> Matrix {
    const Recurrent<float, Linear> served(recurrent, options);
    auto state = served.initial_state(4);
    Recurrent<float, Linear>::Tape tape;
    return served.evaluate(x, state, tape);
  };
  CHECK(after_lstm(rounded) != after_lstm(wide));

  const Middle mixture({.gate = {.experts = 3, .top_k = 2}, .hidden = 33}, 40, 2);
  const auto after_mixture = [&](const moe::NarrowOptions& options) -> Matrix {
    const Middle::Served<moe::Int8> served(mixture, options);
    Middle::Served<moe::Int8>::State state;
    Middle::Served<moe::Int8>::Tape tape;
    return served.evaluate(x, state, tape);
  };
  CHECK(after_mixture(rounded) != after_mixture(wide));

  // Differences within a range of words are those of its own linear maps.
  const AdaptiveSoftmax<> softmax({.vocabulary = vocabulary, .width = 40, .cutoffs = {8, 14}}, 3);
  const auto differences = [&](const moe::NarrowOptions& options, Index first) -> Matrix {
    const AdaptiveSoftmax<float, Linear> served(softmax, options);
    const Matrix all = served.log_probabilities(x);
    return all.col(first) - all.col(first + 1);
  };
  for (const Index first : {0, 8, 14}) {
    const Matrix expected = differences(wide, first);
    CHECK((differences(rounded, first) - expected).norm() > 1e-4f * expected.norm());
  }
}

TEST_CASE("language model: the bytes of experts in each format", "[examples][language_model]") {
  // Steps are padded to blocks of 32, columns to the packets of the processor: 64 is whole in both.
  Model<Middle>::Config config{.vocabulary = vocabulary, .width = 64, .memory = 4};
  config.middle = {.gate = {.experts = 3, .top_k = 1}, .hidden = 128};
  config.mixtures = GENERATE(Index{1}, Index{2});
  const Model<Middle> model(config);
  const std::vector<Index> stream = made_up_stream(33, 1);
  const Batches text(stream, 2, 4);
  const auto bytes = [&](const char* format) {
    return serve(model, {format}, text, text, 2).weight_bytes;
  };
  const Index weights = config.mixtures * 3 * 2 * 64 * 128;
  CHECK(bytes("float32") == weights * 4);
  CHECK(bytes("bfloat16") == weights * 2);
  CHECK(bytes("float16") == weights * 2);
  CHECK(bytes("int8") == weights + weights / 32 * 2);
  CHECK(bytes("int4") == weights / 2 + weights / 32 * 2);
}

TEST_CASE("language model: a weight that cannot be rounded is named",
          "[examples][language_model]") {
  Model<Middle> model = small_model();
  moe::for_each_parameter(model, [](const std::string& name, auto& parameter) {
    if (name == "middle.experts.2.down.weight") parameter.value(1, 3) = 7e4f;
  });
  const std::vector<Index> stream = made_up_stream(33, 1);
  const Batches text(stream, 2, 4);
  CHECK_THROWS_WITH(serve(model, {"float16"}, text, text, 2),
                    Contains("experts.2.down.weight(1, 3) = 70000 is too large for float16"));
  CHECK(serve(model, {"bfloat16"}, text, text, 2).test.perplexity > 1);
}

TEST_CASE("language model: the ways to serve", "[examples][language_model]") {
  CHECK(serving_choices() ==
        std::vector<std::string>{"bfloat16", "float16", "int8", "int4", "all"});
  const auto rows = [](const char* choice) {
    std::string text;
    for (const Serving& serving : servings_of(choice)) {
      text += serving.format + "/" + name_of(serving.activations) + " ";
    }
    return text;
  };
  CHECK(rows("bfloat16") == "float32/float32 bfloat16/float32 ");
  CHECK(rows("int4") == "float32/float32 int4/float32 int4/int8 ");
  CHECK(rows("all") ==
        "float32/float32 bfloat16/float32 float16/float32 int8/float32 int8/int8 int4/float32 "
        "int4/int8 ");
}

TEST_CASE("language model: a row of the table of served models", "[examples][language_model]") {
  Served trained{.serving = {"float32"}};
  trained.validation.perplexity = 4;
  trained.test.perplexity = 5;
  Served served{.serving = {"int8", moe::Activations::int8},
                .weight_bytes = 1234567,
                .tokens_per_second = 54321.4};
  served.validation.perplexity = 4.01;
  served.test.perplexity = 4.999;
  CHECK(
      served_row(served, trained) ==
      "| int8     | int8        |          1234567 |     4.0100 | 1.00250 |  4.9990 | 0.99980 |    "
      "54321 |");
}
