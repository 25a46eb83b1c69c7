#include <dlfcn.h>
#include <torch/custom_class.h>  // first: clang cannot compile 1.13's torch.h in C++20 otherwise
#include <torch/torch.h>
#include <torch/version.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "loop.hpp"
#include "torch_layer.hpp"

/// \file
/// A MoELayer in PyTorch: the same numbers as a loop over experts, training by PyTorch's optimizer, and
/// a table of times.

namespace {

using torch::Tensor;
using Tensors = std::vector<Tensor>;

template <class Scalar>
using Layer = moe::MoELayer<moe::Expert<moe::FeedForward, Scalar>, moe::TopKGate<Scalar>>;

struct Shape {
  std::int64_t width = 512;
  std::int64_t hidden = 1024;
  std::int64_t experts = 8;
  std::int64_t top_k = 2;
};

/// A layer among PyTorch's tensors, and its parameters.
template <class Scalar>
struct Ours {
  using Bound = examples::TorchLayer<Layer<Scalar>>;
  c10::intrusive_ptr<Bound> layer;
  Tensors parameters;
  std::uint64_t step = 0;

  explicit Ours(const Shape& shape) {
    layer = c10::make_intrusive<Bound>(Layer<Scalar>(
        {.width = shape.width,
         .expert = {.hidden = shape.hidden},
         .gate = {.experts = shape.experts, .top_k = shape.top_k, .renormalise = true},
         .seed = 1}));
    for (const auto& item : layer->parameters()) parameters.push_back(item.value());
  }
  Tensor operator()(const Tensor& x) {
    return Bound::apply(layer, ++step, x, torch::TensorList(parameters));
  }
};

Tensors copies(const Tensors& tensors) {
  Tensors result;
  for (const Tensor& tensor : tensors) result.push_back(tensor.detach().clone().requires_grad_());
  return result;
}

/// The largest difference of y, dx or a gradient from those of the loop, as a share of the largest entry.
template <class Scalar>
double difference_from_loop() {
  const Shape shape = {.width = 12, .hidden = 10, .experts = 5, .top_k = 2};
  Ours<Scalar> ours(shape);
  torch::manual_seed(1);
  const auto type = c10::CppTypeToScalarType<Scalar>::value;
  {
    const torch::NoGradGuard no_graph;
    for (Tensor& parameter : ours.parameters) parameter.normal_();
  }
  const Tensor x = torch::randn({20, shape.width}, type);
  const Tensor dy = torch::randn({20, shape.width}, type);
  const auto pass = [&](const Tensors& parameters, auto&& forward) {
    const Tensor leaf = x.clone().requires_grad_();
    const Tensor y = forward(leaf);
    y.backward(dy);
    Tensors results = {y.detach(), leaf.grad()};
    for (const Tensor& parameter : parameters) results.push_back(parameter.grad());
    return results;
  };
  const Tensors plain = copies(ours.parameters);
  const Tensors expected = pass(plain, [&](const Tensor& leaf) {
    return examples::loop_over_experts(leaf, plain, shape.top_k);
  });
  const Tensors got = pass(ours.parameters, ours);
  double worst = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    worst = std::max(
        worst,
        ((got[i] - expected[i]).abs().max() / expected[i].abs().max()).template item<double>());
  }
  return worst;
}

/// Learns y = |x|.
void train() {
  Ours<float> ours({.width = 8, .hidden = 16, .experts = 4, .top_k = 2});
  torch::manual_seed(2);
  const Tensor x = torch::randn({64, 8});
  torch::optim::Adam adam(ours.parameters, torch::optim::AdamOptions(1e-2));
  std::printf("\nupdate   loss, of torch::optim::Adam in the layer's memory\n");
  for (int update = 0; update <= 200; ++update) {
    for (Tensor& parameter : ours.parameters) parameter.mutable_grad().reset();
    const Tensor loss = torch::mse_loss(ours(x), x.abs());
    loss.backward();
    adam.step();
    if (update % 50 == 0) std::printf("%6d %6.3f\n", update, loss.item<double>());
  }
}

/// The medians of milliseconds that `first` and `second` take, in turns.
template <class First, class Second>
std::pair<double, double> medians(int repetitions, First&& first, Second&& second) {
  const auto milliseconds = [](auto&& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
        .count();
  };
  const auto median = [](std::vector<double> times) {
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  };
  std::vector<double> times[2];
  for (int i = 0; i <= repetitions; ++i) {
    const double of_first = milliseconds(first);
    const double of_second = milliseconds(second);
    if (i == 0) continue;  // memory is taken
    times[0].push_back(of_first);
    times[1].push_back(of_second);
  }
  return {median(times[0]), median(times[1])};
}

/// Two rows, in place of the bar.
void compare_times(const Shape& shape, std::int64_t tokens_per_expert, int threads, int repetitions,
                   examples::ProgressBar& progress) {
  torch::set_num_threads(threads);
  torch::manual_seed(3);
  Ours<float> ours(shape);
  Tensors plain = copies(ours.parameters);
  const std::int64_t tokens = tokens_per_expert * shape.experts / shape.top_k;
  Tensor x = torch::randn({tokens, shape.width}).requires_grad_();
  const Tensor dy = torch::randn({tokens, shape.width});
  const auto loop = [&](const Tensor& rows) {
    return examples::loop_over_experts(rows, plain, shape.top_k);
  };
  const auto step = [&](Tensors& parameters, auto&& forward) {
    for (Tensor& parameter : parameters) parameter.mutable_grad().reset();
    x.mutable_grad().reset();
    forward(x).backward(dy);
  };
  const auto print = [&](const char* pass, const std::pair<double, double>& times) {
    progress.clear();
    std::printf("| %-7s | %7d | %3d | %16d | %8.2f | %8.2f | %6.2f x |\n", pass, threads,
                static_cast<int>(shape.experts), static_cast<int>(tokens_per_expert), times.first,
                times.second, times.second / times.first);
    std::fflush(stdout);
  };
  {
    const torch::NoGradGuard no_graph;
    print("forward",
          medians(
              repetitions, [&] { ours.layer->evaluate(x, ours.parameters); }, [&] { loop(x); }));
  }
  print("step", medians(
                    repetitions, [&] { step(ours.parameters, ours); }, [&] { step(plain, loop); }));
}

/// What multiplies: Debian's libtorch takes whatever libblas.so.3 is.
std::string products() {
  using Config = char* (*)();
  if (void* config = dlsym(RTLD_DEFAULT, "openblas_get_config"))
    return reinterpret_cast<Config>(config)();
  return at::hasMKL() ? "MKL" : "no OpenBLAS and no MKL: its products are slow";
}

int run(int argc, char** argv) {
  Shape shape;
  std::vector<std::int64_t> experts = {8, 64};
  std::vector<std::int64_t> tokens = {4, 32, 128};
  std::vector<int> threads = {1};
  int repetitions = 9;
  CLI::App app("A MoELayer in PyTorch's autograd, compared with a loop over experts.");
  app.option_defaults()->always_capture_default();
  app.add_option("--width", shape.width, "D")->check(CLI::PositiveNumber);
  app.add_option("--hidden", shape.hidden, "H")->check(CLI::PositiveNumber);
  app.add_option("--experts", experts, "E of the table's rows")->check(CLI::PositiveNumber);
  app.add_option("--top-k", shape.top_k, "K")->check(CLI::PositiveNumber);
  app.add_option("--tokens", tokens, "tokens an expert of the table's rows")
      ->check(CLI::PositiveNumber);
  app.add_option("--threads", threads, "threads of the table's rows")->check(CLI::PositiveNumber);
  app.add_option("--repetitions", repetitions, "of which each time is the median")
      ->check(CLI::PositiveNumber);
  examples::set_help(app, {"--width", "--hidden", "--experts", "--top-k", "--tokens", "--threads",
                           "--repetitions"});
  CLI11_PARSE(app, argc, argv);
  examples::catch_interrupts();

  const double in_double = difference_from_loop<double>();
  const double in_float = difference_from_loop<float>();
  std::printf(
      "y, dx and all gradients differ from the loop's by at most %.1e in double, %.1e in float\n",
      in_double, in_float);
  if (!(in_double < 1e-12 && in_float < 1e-4)) throw std::runtime_error("that is too much");
  train();

  std::printf("\nlibtorch %s, %s\nwidth %d, hidden %d, top %d, float\n\n", TORCH_VERSION,
              products().c_str(), static_cast<int>(shape.width), static_cast<int>(shape.hidden),
              static_cast<int>(shape.top_k));
  std::printf("| pass    | threads |   E | tokens an expert |   moe ms |  loop ms | loop/moe |\n");
  std::printf("| ------- | ------: | --: | ---------------: | -------: | -------: | -------: |\n");
  examples::ProgressBar progress;
  const std::size_t shapes = threads.size() * experts.size() * tokens.size();
  for (std::size_t i = 0; i < shapes && !examples::interrupted; ++i) {
    progress.draw(static_cast<double>(i) / static_cast<double>(shapes),
                  std::to_string(i) + "/" + std::to_string(shapes) + " shapes");
    shape.experts = experts[i / tokens.size() % experts.size()];
    compare_times(shape, tokens[i % tokens.size()], threads[i / (tokens.size() * experts.size())],
                  repetitions, progress);
  }
  progress.clear();
  if (examples::interrupted) std::printf("\ninterrupted: the rows above are whole\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "pytorch: %s\n", error.what());
    return 1;
  }
}
