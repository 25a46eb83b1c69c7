/// Trains a small mixture on points of the plane and draws which expert owns which region, at six moments.
/// See README.md beside this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "network.hpp"
#include "picture.hpp"

namespace routing_map {

constexpr std::size_t cells = 48;

/// A spiral of three arms.
float target_of(float x, float y) {
  return std::sin(3 * std::atan2(y, x) + 6 * std::sqrt(x * x + y * y));
}

Matrix targets_of(const Matrix& x) {
  Matrix y(x.rows(), 1);
  for (Index t = 0; t < x.rows(); ++t) y(t, 0) = target_of(x(t, 0), x(t, 1));
  return y;
}

/// The centres of the cells of [-1, 1] x [-1, 1], row by row from above.
Matrix centres() {
  const auto side = static_cast<Index>(cells);
  const auto place = [&](Index i) {
    return (2 * static_cast<float>(i) + 1) / static_cast<float>(side) - 1;
  };
  Matrix x(side * side, 2);
  for (Index i = 0; i < x.rows(); ++i) x.row(i) << place(i % side), -place(i / side);
  return x;
}

/// Points drawn evenly, others for every update.
void draw_points(std::uint64_t step, Matrix& x) {
  for (Index t = 0; t < x.rows(); ++t) {
    const auto words = moe::philox({static_cast<std::uint32_t>(t), 0, 0, 0}, step);
    x.row(t) << 2 * moe::uniform(words[0]) - 1, 2 * moe::uniform(words[1]) - 1;
  }
}

/// The expert of each token that has the largest weight.
std::vector<std::size_t> owners(const moe::Routing<float>& routing) {
  std::vector<std::size_t> owner;
  for (Index t = 0; t < routing.tokens(); ++t) {
    const moe::Range slots = routing.slots_of_token(t);
    Index best = slots.first;
    for (Index s = slots.first; s < slots.first + slots.count; ++s) {
      if (routing.weight[s] > routing.weight[best]) best = s;
    }
    owner.push_back(static_cast<std::size_t>(routing.expert[best]));
  }
  return owner;
}

/// Expert e of `experts`: hues evenly around the circle, every other one darker.
std::string colour_of(std::size_t e, std::size_t experts) {
  const double hue = 6.0 * static_cast<double>(e) / static_cast<double>(experts);
  const double light = e % 2 == 0 ? 0.9 : 0.65;
  const auto channel = [&](double shift) {
    const double distance = std::fabs(std::fmod(hue + shift, 6.0) - 3);
    const double value = light * (0.25 + 0.75 * std::clamp(distance - 1, 0.0, 1.0));
    return static_cast<unsigned>(std::lround(255 * value));
  };
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", channel(0), channel(4), channel(2));
  return text;
}

/// -1 is black, 1 white, in 16 steps.
std::string grey_of(float value) {
  const double level = std::clamp((static_cast<double>(value) + 1) / 2, 0.0, 1.0);
  const auto grey = static_cast<unsigned>(std::lround(15 * level)) * 17;
  char text[8];
  std::snprintf(text, sizeof text, "#%02x%02x%02x", grey, grey, grey);
  return text;
}

std::vector<std::string> greys_of(const Matrix& y) {
  std::vector<std::string> greys;
  for (Index t = 0; t < y.rows(); ++t) greys.push_back(grey_of(y(t, 0)));
  return greys;
}

struct Options {
  Network::Config network;
  std::uint64_t updates = 4000;
  Index points = 512;
  std::string file = "routing_map.svg";
};

void run(const Options& o) {
  Network network(o.network);
  Network::Tape tape;
  Network::Tape served;
  moe::Adam<float> adam;
  Picture picture(cells);
  const Matrix grid = centres();
  const Matrix grid_targets = targets_of(grid);

  examples::ProgressBar progress;
  const auto draw = [&](std::uint64_t step) {
    progress.clear();
    const Matrix y = network.evaluate(grid, served);
    const double error = (y - grid_targets).squaredNorm() / static_cast<double>(y.rows());
    const auto& balance = served.mixture.balance();
    std::printf("%8ju  %12.4f  %12td  %10.2f\n", static_cast<std::uintmax_t>(step), error,
                balance.unused_experts(), static_cast<double>(balance.cv_load()));
    std::fflush(stdout);
    std::vector<std::string> colours;
    for (const std::size_t e : owners(served.mixture.routing())) {
      colours.push_back(colour_of(e, static_cast<std::size_t>(o.network.experts)));
    }
    picture.add(0, {"after " + std::to_string(step) + " updates", colours});
    picture.add(1, {"", greys_of(y)});
  };

  std::printf("  update  square error  unused experts  CV(load)\n");
  Matrix x(o.points, 2);
  const std::uint64_t moments[] = {0, 1, 4, 16, 64, 128};  // of 128
  const std::uint64_t* moment = moments;
  for (std::uint64_t step = 0; step <= o.updates && !examples::interrupted; ++step) {
    if (step == *moment * o.updates / 128) {
      draw(step);
      ++moment;
    }
    if (step == o.updates) break;
    draw_points(step, x);
    const Matrix error = network.forward(x, tape, {.step = step}) - targets_of(x);
    moe::zero_gradients(network);
    network.backward(error * (2 / static_cast<float>(o.points)), tape);
    const double done = static_cast<double>(step) / static_cast<double>(o.updates);
    adam.update(network, 1e-2 * (1 - done));
    if (progress.is_due()) progress.draw(done, std::to_string(step) + " updates");
  }
  progress.clear();
  if (examples::interrupted) std::puts("interrupted: the picture ends with the last row above");
  picture.add(1, {"the target", greys_of(grid_targets)});
  picture.write(o.file);
  std::printf("the picture is in %s\n", o.file.c_str());
}

}  // namespace routing_map

int main(int argc, char** argv) {
  CLI::App app(
      "Trains a small mixture of experts on points of the plane and draws, at six moments, which "
      "expert owns which region, and what the network computes there.");
  routing_map::Options o;
  const auto at_least_one = CLI::Range(1.0, 1e9);
  app.add_option("--experts", o.network.experts, "experts E")
      ->check(at_least_one)
      ->capture_default_str();
  app.add_option("--top-k", o.network.top_k, "experts K used for a point")
      ->check(at_least_one)
      ->capture_default_str();
  app.add_option("--hidden", o.network.hidden, "hidden width of an expert")
      ->check(at_least_one)
      ->capture_default_str();
  app.add_option("--updates", o.updates, "updates, of 512 points each")
      ->check(CLI::Range(128.0, 1e9))
      ->capture_default_str();
  app.add_option("--seed", o.network.seed, "of the weights and the noise")->capture_default_str();
  app.add_option("--file", o.file, "where the picture goes")->capture_default_str();
  examples::set_help(app, {"--experts", "--top-k", "--hidden", "--updates", "--seed", "--file"});
  CLI11_PARSE(app, argc, argv);
  examples::catch_interrupts();
  try {
    routing_map::run(o);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "routing_map: %s\n", error.what());
    return 1;
  }
}
