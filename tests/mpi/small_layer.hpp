#pragma once

#include <span>
#include <string>

#include "errors.hpp"
#include "moe/mpi/expert_parallel.hpp"
#include "whole.hpp"

/// \file
/// A small layer over ranks, and errors that all of them must throw.

namespace moe::test {

template <class Gate, class Scalar = double>
using Layer = MoELayer<Expert<FeedForward, Scalar>, Gate>;

using Small = mpi::ExpertParallel<Layer<NoisyTopKGate<double>>>;
inline const Small::Config small{
    .width = 6, .expert = {.hidden = 4}, .gate = {.experts = 4, .top_k = 2}, .seed = 1};

/// Every rank must throw an Error with this text from f(), and the same one.
template <class F>
void check_error(const mpi::Communicator& communicator, F&& f, const std::string& part) {
  std::string text = error_of(f);
  INFO(text);
  CHECK(text.find(part) != std::string::npos);
  std::string root = text;
  root.resize(300, ' ');
  text = root;
  communicator.broadcast(std::span<char>(root), 0);
  CHECK(root == text);
}

}  // namespace moe::test
