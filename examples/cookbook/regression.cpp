/// Predicts a number from a table of 8 columns. The made-up function has four pieces, chosen by the
/// signs of two columns, with another linear formula on each: the kind of task that experts divide
/// among themselves.

#include <cstdint>
#include <cstdio>
#include <limits>
#include <moe/moe.hpp>

using Matrix = moe::Matrix<float>;
using Layer = moe::Residual<moe::MoELayer<moe::Expert<moe::FeedForward>>>;

struct Table {
  Matrix x;  ///< rows x 8, normal
  Matrix y;  ///< rows x 1, with noise of standard deviation 0.1
};

Table made_up(moe::Index rows, std::uint64_t seed) {
  Table table{Matrix(rows, 8), Matrix(rows, 1)};
  moe::fill_normal(table.x, 1.0f, seed);
  moe::fill_normal(table.y, 0.1f, seed + 1);
  Matrix slopes(4, 8);
  moe::fill_normal(slopes, 1.0f, 7);
  for (moe::Index i = 0; i < rows; ++i) {
    const moe::Index piece = (table.x(i, 0) < 0 ? 0 : 1) + (table.x(i, 1) < 0 ? 0 : 2);
    table.y(i, 0) += slopes.row(piece).dot(table.x.row(i));
  }
  return table;
}

double mean_square(const Matrix& error) {
  return static_cast<double>(error.squaredNorm()) / static_cast<double>(error.rows());
}

int main() {
  const Table training = made_up(20000, 1);
  const Table validation = made_up(2000, 3);
  const Table test = made_up(4000, 5);

  Layer layer(
      {.width = 8, .expert = {.hidden = 32}, .gate = {.experts = 8, .top_k = 2}, .seed = 1});
  moe::Linear<> head({.inputs = 8, .outputs = 1}, 2);
  Layer best_layer = layer;
  moe::Linear<> best_head = head;
  Layer::Tape tape;
  moe::Linear<>::Tape head_tape;
  moe::Adam<float> adam, head_adam;
  Matrix x, y;
  std::uint64_t step = 0;
  double best = std::numeric_limits<double>::infinity();
  for (std::uint64_t epoch = 0; epoch < 20; ++epoch) {
    const double rate = 3e-3 * (1 - static_cast<double>(epoch) / 20);
    for (const auto rows : moe::Batches({.rows = 20000, .batch_rows = 100, .seed = 3}, epoch)) {
      moe::gather_rows(training.x, rows, x);
      moe::gather_rows(training.y, rows, y);
      const Matrix error = head.forward(layer.forward(x, tape, {.step = ++step}), head_tape) - y;
      moe::zero_gradients(layer);
      moe::zero_gradients(head);
      layer.backward(head.backward(error * (2.0f / 100), head_tape), tape);
      adam.update(layer, rate);
      head_adam.update(head, rate);
    }
    const double now = mean_square(head.evaluate(layer.evaluate(validation.x)) - validation.y);
    if (epoch % 5 == 4)
      std::printf("epoch %2d: validation %.4f\n", static_cast<int>(epoch + 1), now);
    if (now < best) best = now, best_layer = layer, best_head = head;
  }
  const double left = mean_square(best_head.evaluate(best_layer.evaluate(test.x)) - test.y);
  std::printf("test: mean square %.4f of %.4f; the noise is 0.01\n", left, mean_square(test.y));
  return left < 0.05 * mean_square(test.y) ? 0 : 1;
}
