// A user's program: a layer over the ranks of MPI, of which there may be only one.

#include <cstdio>
#include <moe/mpi/environment.hpp>
#include <moe/mpi/expert_parallel.hpp>

int main(int argc, char** argv) {
  return moe::mpi::run(&argc, &argv, [] {
    using Layer = moe::MoELayer<moe::Expert<moe::FeedForward>>;
    const Layer::Config config{
        .width = 8, .expert = {.hidden = 16}, .gate = {.experts = 4, .top_k = 2}, .seed = 1};
    const moe::mpi::Communicator communicator;
    const moe::mpi::ExpertParallel<Layer> layer(config, communicator);
    moe::Matrix<float> x(5, 8);
    moe::fill_normal(x, 1.0f, 2);
    const auto y = layer.evaluate(x);
    const bool same = communicator.size() > 1 || y == Layer(config).evaluate(x);
    std::puts(same ? "spread" : "one rank does not do what one process does");
    return same ? 0 : 1;
  });
}
