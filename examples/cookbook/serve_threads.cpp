/// A trained layer, its weights rounded to 8 bits, answers requests from four threads at once. Every
/// answer has the bits of one that is computed alone, whoever computes it and whatever shares its
/// batch.

#include <atomic>
#include <cstdio>
#include <cstring>
#include <moe/moe.hpp>
#include <moe/weights/serving_layer.hpp>
#include <thread>
#include <vector>

#include "../common/clouds.hpp"

int main() {
  using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
  using Matrix = moe::Matrix<float>;
  using Served = moe::ServingLayer<Layer, moe::Int8>;
  const examples::Clouds clouds;
  Layer layer({.width = examples::Clouds::width,
               .expert = {.hidden = 64},
               .gate = {.experts = 8, .top_k = 2},
               .seed = 1});
  examples::train(layer, clouds, 600);
  const Served served(layer);  // const: what threads share
  std::printf("unexplained: %.2f %% with float weights, %.2f %% with Int8\n",
              100 * examples::unexplained(layer, clouds),
              100 * examples::unexplained(served, clouds));

  std::vector<Matrix> requests(200), answers(200);
  Matrix ignored;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    clouds.draw(static_cast<moe::Index>(1 + i % 7), i, requests[i], ignored);
  }
  std::atomic<std::size_t> next = 0;
  std::vector<std::thread> threads;
  for (int worker = 0; worker < 4; ++worker) {
    threads.emplace_back([&] {
      Served::Tape tape;  // one for each thread; it keeps its memory from request to request
      for (std::size_t i = next++; i < requests.size(); i = next++) {
        answers[i] = served.evaluate(requests[i], tape);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();

  moe::Index tokens = 0;
  moe::Index different = 0;
  for (std::size_t i = 0; i < requests.size(); ++i) {
    for (moe::Index t = 0; t < requests[i].rows(); ++t) {
      const Matrix alone = served.evaluate(requests[i].row(t));
      const Matrix shared = answers[i].row(t);
      const auto bytes = static_cast<std::size_t>(alone.size()) * sizeof(float);
      different += std::memcmp(alone.data(), shared.data(), bytes) != 0;
      ++tokens;
    }
  }
  std::printf("%td of %td tokens have other bits than alone\n", different, tokens);
  return different == 0 ? 0 : 1;
}
