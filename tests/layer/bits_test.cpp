#include <array>
#include <thread>
#include <vector>

#include "layers.hpp"
#include "user_parts.hpp"

using namespace moe;
using namespace moe::test;
template <class Scalar>
using Config = test::LayerConfig<Scalar>;

TEST_CASE("layer: several passes in flight do not disturb each other", "[layer]") {
  Layer<double> layer(
      {.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 5, .top_k = 2}, .seed = 6});
  test::randomize(layer, 4, 0.5);
  const Matrix<double> x1 = random_matrix(10, 3, 1);
  const Matrix<double> x2 = random_matrix(7, 3, 2);
  const Everything<double> first(layer, x1, x1);
  const Everything<double> second(layer, x2, x2);
  Layer<double>::Tape tape1;
  Layer<double>::Tape tape2;
  zero_gradients(layer);
  layer.forward(x1, tape1, {.step = 2});
  layer.forward(x2, tape2, {.step = 2});
  layer.evaluate(x2);
  CHECK(same_bits(layer.backward(x1, tape1), first.dx));
  CHECK(same_bits(layer.backward(x2, tape2), second.dx));
  Named sum = first.gradients;
  for (auto& [name, gradient] : sum) gradient += second.gradients.at(name);
  CHECK(gradient_error(test::gradients_of(layer), sum) < 1e-13);
}

TEMPLATE_TEST_CASE("layer: has the same bits on any number of threads", "[layer]", float, double) {
  using S = TestType;
  for (const bool overloaded : {false, true}) {
    for (const bool gated : {false, true}) {
      // Hidden rows of several panels, so that every way of splitting the work happens.
      const Index hidden = overloaded ? 2 * detail::panel_columns<S> + 5 : Index{70};
      Layer<S> layer({.width = 40,
                      .expert = {.hidden = hidden,
                                 .gated = gated,
                                 .bias = !gated || overloaded,
                                 .weighted_input = overloaded,
                                 .recompute = gated && overloaded},
                      .gate = {.experts = 6, .top_k = 2},
                      .output = gated ? Activation::sigmoid : Activation::identity,
                      .seed = 5});
      test::randomize(layer, 7, 0.1);
      if (overloaded) collapse(layer, 3);
      const Matrix<S> x = with_positive_first_entry(random_matrix<S>(700, 40, 1));
      const Matrix<S> r = random_matrix<S>(700, 40, 2);
      const auto run = [&](int count) {
        const Threads threads(count);
        return std::pair{Everything<S>(layer, x, r), layer.evaluate(x)};
      };
      const auto one = run(1);
      for (const int count : {2, 3, 8}) {
        INFO(count << " threads, overloaded " << overloaded << ", gated " << gated);
        const auto several = run(count);
        CHECK(several.first.same_as(one.first));
        CHECK(same_bits(several.second, one.second));
      }
      if (overloaded) {
        typename Layer<S>::Tape tape;
        layer.forward(x, tape, {.step = 0});
        CHECK(tape.dispatch.slots_of(3) == 700);
      }
    }
  }
}

TEMPLATE_TEST_CASE("layer: a token has the same bits alone and in a batch", "[layer]", float,
                   double) {
  using S = TestType;
  for (const bool gated : {false, true}) {
    Layer<S> layer({.width = 21,
                    .expert = {.hidden = 35, .activation = Activation::gelu, .gated = gated},
                    .gate = {.experts = 4, .top_k = 2},
                    .output = Activation::tanh,
                    .seed = 5});
    test::randomize(layer, 7, 0.3);
    const Matrix<S> x = random_matrix<S>(700, 21, 1);
    const Matrix<S> whole = layer.evaluate(x);
    for (const Index t : {0, 1, 63, 64, 350, 699}) {
      CHECK(same_bits(layer.evaluate(x.row(t)), whole.row(t)));
    }
    CHECK(same_bits(layer.evaluate(x.middleRows(100, 333)), whole.middleRows(100, 333)));
  }
}

TEMPLATE_TEST_CASE("layer: a training batch in two halves has the bits of the whole", "[layer]",
                   float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 21, .expert = {.hidden = 35}, .gate = {.experts = 4, .top_k = 2}, .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> x = random_matrix<S>(700, 21, 1);
  typename Layer<S>::Tape tape;
  const Matrix<S> whole = layer.forward(x, tape, {.step = 8});
  for (const Index split : {1, 313}) {
    typename Layer<S>::Tape top;
    typename Layer<S>::Tape bottom;
    CHECK(same_bits(layer.forward(x.topRows(split), top, {.step = 8}), whole.topRows(split)));
    CHECK(same_bits(layer.forward(x.bottomRows(700 - split), bottom,
                                  {.step = 8, .first_token = static_cast<std::uint32_t>(split)}),
                    whole.bottomRows(700 - split)));
  }
  typename Layer<S>::Tape other;
  CHECK_FALSE(same_bits(layer.forward(x, other, {.step = 9}), whole));
}

TEMPLATE_TEST_CASE("layer: a pass replays and a used tape is as good as a new one", "[layer]",
                   float, double) {
  using S = TestType;
  Layer<S> layer({.width = 5,
                  .expert = {.hidden = 6},
                  .gate = {.experts = 4, .top_k = 2},
                  .output = Activation::sigmoid,
                  .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> x = random_matrix<S>(50, 5, 1);
  const Everything<S> fresh(layer, x, x);
  typename Layer<S>::Tape tape;
  layer.forward(random_matrix<S>(80, 5, 2), tape, {.step = 1});
  layer.backward(random_matrix<S>(80, 5, 3), tape);
  layer.evaluate(random_matrix<S>(20, 5, 2), tape);
  zero_gradients(layer);
  CHECK(same_bits(layer.forward(x, tape, {.step = 2}), fresh.y));
  CHECK(same_bits(layer.backward(x, tape), fresh.dx));
  CHECK(gradient_error(test::gradients_of(layer), fresh.gradients) == 0);
}

TEMPLATE_TEST_CASE("layer: takes rows of a wider matrix as they are", "[layer]", float, double) {
  using S = TestType;
  Layer<S> layer(
      {.width = 5, .expert = {.hidden = 6}, .gate = {.experts = 4, .top_k = 2}, .seed = 5});
  test::randomize(layer, 7, 0.3);
  const Matrix<S> wide = random_matrix<S>(50, 13, 1);
  const Matrix<S> x = wide.middleCols(4, 5);
  const Matrix<S> r = wide.rightCols(5);
  const Everything<S> compact(layer, x, r);
  zero_gradients(layer);
  typename Layer<S>::Tape tape;
  CHECK(same_bits(layer.forward(wide.middleCols(4, 5), tape, {.step = 2}), compact.y));
  CHECK(same_bits(layer.backward(wide.rightCols(5), tape), compact.dx));
  CHECK(gradient_error(test::gradients_of(layer), compact.gradients) == 0);
  CHECK(same_bits(layer.evaluate(wide.middleCols(4, 5)), layer.evaluate(x)));
}

TEST_CASE("layer: a const layer serves and trains in several threads at once", "[layer]") {
  Layer<float> layer(
      {.width = 9, .expert = {.hidden = 12}, .gate = {.experts = 6, .top_k = 2}, .seed = 1});
  test::randomize(layer, 1);
  const Layer<float>& shared = layer;
  const Matrix<float> x = test::random_matrix<float>(70, 9, 2);
  Layer<float>::Tape tape;
  const Matrix<float> served = shared.evaluate(x);
  const Matrix<float> trained = shared.forward(x, tape, {.step = 3});

  std::array<bool, 4> same{};
  std::vector<std::thread> threads;
  for (bool& mine : same) {
    threads.emplace_back([&] {
      Layer<float>::Tape own;
      mine = true;
      for (int i = 0; i < 5; ++i) {
        mine = mine && same_bits(shared.evaluate(x), served) &&
               same_bits(shared.forward(x, own, {.step = 3}), trained);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(same == std::array{true, true, true, true});
}

namespace {

/// y = x·W by Eigen's own product, as a user would write it.
template <class S>
class OwnProduct {
 public:
  using Scalar = S;
  struct Config {
    Index width = 0;
  };
  explicit OwnProduct(const Config& config, std::uint64_t seed)
      : weight_(config.width, config.width) {
    fill_uniform(weight_.value, S{1}, seed);
  }
  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<S> x, MatrixView<S>, MatrixView<S> y) const { evaluate(x, y); }
  void evaluate(ConstMatrixView<S> x, MatrixView<S> y) const { y.noalias() = x * weight_.value; }
  void backward(ConstMatrixView<S> x, ConstMatrixView<S>, ConstMatrixView<S> dy, MatrixView<S> dx) {
    weight_.gradient().noalias() += x.transpose() * dy;
    dx.noalias() = dy * weight_.value.transpose();
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("weight", self.weight_);
  }

 private:
  Parameter<S> weight_;
};

}  // namespace

TEST_CASE("layer: forward and backward may run on different numbers of threads", "[layer]") {
  Layer<float> layer(
      {.width = 5, .expert = {.hidden = 8}, .gate = {.experts = 9, .top_k = 2}, .seed = 0});
  test::randomize(layer, 1);
  const Matrix<float> x = random_matrix<float>(90, 5, 2);
  const auto gradients = [&](int forward_threads, int backward_threads) {
    Layer<float>::Tape tape;
    zero_gradients(layer);
    {
      const Threads threads(forward_threads);
      layer.forward(x, tape, {.step = 0});
    }
    const Threads threads(backward_threads);
    return Matrix<float>(layer.backward(x, tape));
  };
  CHECK(same_bits(gradients(1, 8), gradients(1, 1)));
}

TEST_CASE("layer: a plain network gets the same rows together on any number of threads",
          "[layer]") {
  // So many slots of so long rows that one worker takes them in several groups and two in one.
  MoELayer<Expert<SineMap>> layer({.width = 512, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  test::randomize(layer, 3, 0.1);
  const Matrix<float> x = random_matrix<float>(1500, 512, 2);
  const auto gradients = [&](int count) {
    const Threads threads(count);
    MoELayer<Expert<SineMap>>::Tape tape;
    zero_gradients(layer);
    layer.forward(x, tape, {.step = 0});
    layer.backward(x, tape);
    return test::gradients_of(layer);
  };
  const test::Named one = gradients(1);
  for (const int count : {2, 3, 8}) {
    for (const auto& [name, gradient] : gradients(count)) {
      INFO(name << ", " << count << " threads");
      CHECK(same_bits(gradient, one.at(name)));
    }
  }
}

TEST_CASE("layer: a plain network's bits do not depend on the threads", "[layer]") {
  // Wide enough that Eigen would split its product, and one expert, so that there is one task.
  MoELayer<Expert<OwnProduct>> layer({.width = 640, .gate = {.experts = 1, .top_k = 1}, .seed = 1});
  const Matrix<float> x = random_matrix<float>(100, 640, 2);
  const auto run = [&](int count) {
    const Threads threads(count);
    MoELayer<Expert<OwnProduct>>::Tape tape;
    zero_gradients(layer);
    const Matrix<float> y = layer.forward(x, tape, {.step = 0});
    const Matrix<float> dx = layer.backward(x, tape);
    return std::array{y, dx, layer.evaluate(x)};
  };
  const auto expected = run(1);
  for (const int count : {2, 3, 8}) {
    const auto actual = run(count);
    for (std::size_t i = 0; i < 3; ++i) CHECK(same_bits(actual[i], expected[i]));
  }
}
