#include <cstdint>

#include "moe/mpi/environment.hpp"
#include "whole.hpp"

// The program of docs/expert_parallel.md, compiled with what stands around it.

namespace {

struct Config {};

template <class Layer>
class Model {
 public:
  Model(const Config&, const moe::mpi::Communicator& communicator)
      : layer_({.width = 4, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 1},
               communicator) {}
  void train(const moe::Matrix<float>& x, const moe::Pass& pass) {
    layer_.backward(layer_.forward(x, tape_, pass), tape_);
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("layer", self.layer_);
  }

 private:
  Layer layer_;
  typename Layer::Tape tape_;
};

const Config config;
const std::uint64_t updates = 2;
const double rate = 0.01;

moe::Matrix<float> my_tokens(std::uint64_t step) {
  return moe::test::random_matrix<float>(8, 4, step);
}

// It begins and ends MPI, which the tests' own program does.
#define main documents_main
#include "expert_parallel_1.inc"
#undef main

}  // namespace

TEST_CASE("documents: expert_parallel.md compiles", "[mpi][documents]") {
  int (*const program)(int, char**) = documents_main;
  CHECK(program != nullptr);
}
