/// Opens a published model, lists its mixtures and routes rows through one of them. See README.md beside
/// this file.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <moe/io/pretrained.hpp>
#include <moe/moe.hpp>
#include <string>
#include <vector>

#include "../common/help.hpp"
#include "../common/terminal.hpp"
#include "../common/threads.hpp"
#include "formats.hpp"
#include "routes.hpp"

namespace inspect {

struct Options {
  std::string folder;
  Index layer = -1;
  Index tokens = 512;
  std::uint64_t seed = 1;
  std::string rows;
  std::string tensor = "x";
  Index show = 8;
  std::vector<std::string> formats = all_formats();
  int threads = 0;
};

void list(const moe::io::Pretrained& model) {
  std::printf("%s: %zu mixtures\n", model.model_type().c_str(), model.mixtures().size());
  std::printf("layer  experts  chosen  shared  width  hidden  parameters\n");
  for (const moe::io::Mixture& m : model.mixtures()) {
    const Index maps = m.gated ? 3 : 2;
    const Index parameters = (m.gate.experts + m.shared) * maps * m.width * m.hidden;
    std::printf("%5td  %7td  %6td  %6td  %5td  %6td  %8.1f M\n", m.layer, m.gate.experts,
                m.gate.top_k, m.shared, m.width, m.hidden, static_cast<double>(parameters) / 1e6);
  }
}

moe::Matrix<float> rows_of(const Options& o, Index width) {
  if (!o.rows.empty()) return moe::SafetensorsFile(o.rows).matrix<float>(o.tensor);
  moe::Matrix<float> x(o.tokens, width);
  moe::fill_normal(x, 1.0f, o.seed);
  return x;
}

void route(const moe::io::Pretrained& model, const moe::io::Mixture& mixture, const Options& o) {
  using Layer = moe::io::SharedLayer<>;  // opens every model
  const double start = examples::seconds_now();
  const auto layer = model.load_layer<Layer>(mixture.layer);
  std::printf("\nlayer %td, read in %.2f s\n", mixture.layer, examples::seconds_now() - start);

  const moe::Matrix<float> x = rows_of(o, mixture.width);
  Layer::Tape tape;
  layer.evaluate(x, tape);
  const moe::Routing<float>& routing = tape.routing();
  std::printf("\n token  experts and weights\n");
  for (Index t = 0; t < std::min(o.show, x.rows()); ++t) {
    std::printf("%6td  %s\n", t, route_of(routing, t, mixture.shared).c_str());
  }
  std::printf("\nexpert  tokens   share  mean weight\n");
  const auto of_experts = shares(routing);
  for (const Share& share : of_experts) {
    if (share.tokens == 0) break;
    const auto tokens = static_cast<double>(share.tokens);
    std::printf("%6s  %6td  %5.1f %%  %11.3f\n", expert_name(share.expert, mixture.shared).c_str(),
                share.tokens, 100 * tokens / static_cast<double>(x.rows()), share.weight / tokens);
  }
  const auto& balance = tape.balance();
  std::printf("\n%td of %td routed experts without a token, CV(load) %.2f\n",
              balance.unused_experts(), mixture.gate.experts,
              static_cast<double>(balance.cv_load()));

  std::printf("\n%td tokens in each format of the weights\n", x.rows());
  std::printf("format         MB         ms   tokens/s  change of y\n");
  for (const std::string& format : o.formats) {
    const Served served = serve(format, layer, x, tape.y);
    if (served.refusal.empty()) {
      std::printf("%-9s  %7.1f  %9.2f  %9.0f  %11.1e\n", format.c_str(),
                  static_cast<double>(served.bytes) / 1e6, 1e3 * served.seconds,
                  static_cast<double>(x.rows()) / served.seconds, served.difference);
    } else {
      std::printf("%-9s  %s\n", format.c_str(), served.refusal.c_str());
    }
    std::fflush(stdout);
  }
}

void run(const Options& o) {
  const moe::io::Pretrained model = moe::io::open_pretrained(o.folder);
  list(model);
  if (model.mixtures().empty()) return;
  const moe::io::Mixture& mixture = o.layer < 0 ? model.mixtures().front() : model.mixture(o.layer);
  route(model, mixture, o);
}

}  // namespace inspect

int main(int argc, char** argv) {
  CLI::App app(
      "Opens a published mixture-of-experts model, lists its mixtures, and routes a batch of rows "
      "through one of them: who went where, with what weight, and how fast in each format of the "
      "weights.");
  app.footer(
      "A model is a folder with config.json and safetensors files, as huggingface.co has them:\n"
      "  hf download allenai/OLMoE-1B-7B-0924 --local-dir OLMoE\n"
      "  inspect OLMoE --layer 3\n"
      "One layer is read, as floats: 1.6 GB of OLMoE, 5.6 GB of Mixtral 8x7B.");
  inspect::Options o;
  app.add_option("folder", o.folder, "of the model")->required();
  app.add_option("--layer", o.layer, "of the model, the first mixture if left out")
      ->check(CLI::Range(0.0, 1e6));
  app.add_option("--tokens", o.tokens, "random normal rows")
      ->check(CLI::Range(1.0, 1e7))
      ->capture_default_str();
  app.add_option("--seed", o.seed, "of the random rows")->capture_default_str();
  app.add_option("--rows", o.rows, "a safetensors file with rows to take instead");
  app.add_option("--tensor", o.tensor, "their name in it")->capture_default_str();
  app.add_option("--show", o.show, "tokens to print one by one")
      ->check(CLI::Range(0.0, 1e7))
      ->capture_default_str();
  app.add_option("--formats", o.formats,
                 "of the weights to serve the rows in; +int8: the rows are rounded too")
      ->check(CLI::IsMember(inspect::all_formats()))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->capture_default_str();
  app.add_option("--threads", o.threads, "all cores if left out")->check(CLI::Range(1.0, 1024.0));
  examples::set_help(app, {"--layer", "--tokens", "--seed", "--rows", "--tensor", "--show",
                           "--formats", "--threads"});
  CLI11_PARSE(app, argc, argv);
  if (o.threads > 0) examples::use_threads(o.threads);
  try {
    inspect::run(o);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "inspect: %s\n", error.what());
    return 1;
  }
}
