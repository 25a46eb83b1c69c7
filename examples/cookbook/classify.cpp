/// Classifies Fashion-MNIST with a mixture of 16 experts, of which a picture uses 2, and with the
/// dense network of equal arithmetic, 2 experts that every picture uses. Arguments: how many pictures
/// to train on (55000), and the folder of the data.

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>

#include "fashion_mnist.hpp"

using Matrix = moe::Matrix<float>;
using Mixture = moe::Residual<moe::MoELayer<moe::Expert<moe::FeedForward>>>;

/// 784 pixels -> 64 numbers -> a mixture that adds to them -> 10 logits.
struct Network {
  moe::Linear<> first{{.inputs = 784, .outputs = 64}, 1};
  Mixture mixture;
  moe::Linear<> last{{.inputs = 64, .outputs = 10}, 2};
  moe::Linear<>::Tape of_first, of_last;
  Mixture::Tape of_mixture;

  explicit Network(const Mixture::Config& config) : mixture(config) {}
  const Matrix& forward(const Matrix& x, std::uint64_t step) {
    const Matrix& h = first.forward(x, of_first);
    return last.forward(mixture.forward(h, of_mixture, {.step = step}), of_last);
  }
  void backward(const Matrix& dlogits) {
    first.backward(mixture.backward(last.backward(dlogits, of_last), of_mixture), of_first);
  }
  Matrix evaluate(const Matrix& x) const {
    return last.evaluate(mixture.evaluate(first.evaluate(x)));
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("first", self.first), visit("mixture", self.mixture), visit("last", self.last);
  }
};

void run(const cookbook::FashionMnist& data, moe::Index count, moe::Index experts) {
  Network network({.width = 64,
                   .expert = {.hidden = 128},
                   .gate = {.experts = experts, .top_k = 2},
                   .seed = 3});
  moe::Adam<float> adam;
  const moe::SoftmaxCrossEntropy<float> loss;
  moe::SoftmaxCrossEntropy<float>::Tape of_loss;
  cookbook::Pictures batch;
  std::uint64_t step = 0;
  for (std::uint64_t epoch = 0; epoch < 5; ++epoch) {
    const double rate = 3e-3 * (1 - static_cast<double>(epoch) / 5);
    for (const auto rows : moe::Batches({.rows = count, .batch_rows = 100, .seed = 4}, epoch)) {
      moe::gather_rows(data.training.pixels, rows, batch.pixels);
      moe::gather_rows(data.training.labels, rows, batch.labels);
      loss.forward(network.forward(batch.pixels, ++step), batch.labels, of_loss);
      moe::zero_gradients(network);
      network.backward(loss.backward(of_loss));
      adam.update(network, rate);
    }
    const Matrix logits = network.evaluate(data.validation.pixels);
    std::printf("%2td experts, epoch %d: %.2f %% of the validation part\n", experts,
                static_cast<int>(epoch + 1), 100 * moe::accuracy(logits, data.validation.labels));
  }
  std::printf("%2td experts, %td weights: %.2f %% of the test part\n%s\n\n", experts,
              moe::parameter_count(network),
              100 * moe::accuracy(network.evaluate(data.test.pixels), data.test.labels),
              to_string(network.of_mixture.balance(), 4).c_str());
}

int main(int count, char** arguments) try {
  const char* folder = count > 2 ? arguments[2] : "/usr/share/datasets/fashion-mnist";
  const moe::Index pictures = count > 1 ? std::atoi(arguments[1]) : 55000;
  if (pictures < 100) throw std::invalid_argument("train on a batch of 100 pictures or more");
  const auto data = cookbook::read_fashion_mnist(folder);
  for (const moe::Index experts : {16, 2}) run(data, pictures, experts);
} catch (const std::exception& error) {
  std::fprintf(stderr, "classify: %s\n", error.what());
  return 1;
}
