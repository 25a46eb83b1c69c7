#include "moe/optim/parameter_blocks.hpp"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "../support.hpp"

using namespace moe;
using detail::optimizer_block;
using detail::optimizer_lanes;

namespace {

/// Parameters of the given numbers of scalars.
struct Module {
  explicit Module(const std::vector<Index>& sizes) {
    for (const Index size : sizes) parameters.emplace_back(1, size);
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("p", self.parameters);
  }
  std::vector<Parameter<float>> parameters;
};

struct Block {
  Index index;
  Index first;
  Index count;
  bool operator==(const Block&) const = default;
};

/// The blocks of each lane in the order of the calls.
std::map<Index, std::vector<Block>> blocks_of(Module& module, Updates updates) {
  std::map<Index, std::vector<Block>> blocks;
  std::mutex mutex;
  detail::for_each_parameter_block(
      module, updates, [&](Index lane, Index index, Parameter<float>&, Index first, Index count) {
        const std::lock_guard lock(mutex);
        blocks[lane].push_back({index, first, count});
      });
  return blocks;
}

}  // namespace

TEST_CASE("parameter blocks: dealt to the lanes one after the other", "[optim][parameter_blocks]") {
  Module module({optimizer_block + 1, 0, 3});
  const auto blocks = blocks_of(module, Updates::dense);
  REQUIRE(blocks.size() == 3);
  CHECK(blocks.at(0) == std::vector<Block>{{0, 0, optimizer_block}});
  CHECK(blocks.at(1) == std::vector<Block>{{0, optimizer_block, 1}});
  CHECK(blocks.at(2) == std::vector<Block>{{2, 0, 3}});
}

TEST_CASE("parameter blocks: the same lanes, in order, on any number of threads",
          "[optim][parameter_blocks]") {
  Module module({40 * optimizer_block, 1, 7 * optimizer_block - 1, 5});
  std::map<Index, std::vector<Block>> one;
  {
    const test::Threads threads(1);
    one = blocks_of(module, Updates::dense);
  }
  Index scalars = 0;
  for (const auto& [lane, blocks] : one) {
    CHECK(lane < optimizer_lanes);
    for (std::size_t i = 1; i < blocks.size(); ++i) {
      CHECK(std::tie(blocks[i - 1].index, blocks[i - 1].first) <
            std::tie(blocks[i].index, blocks[i].first));
    }
    for (const Block& block : blocks) scalars += block.count;
  }
  CHECK(scalars == 47 * optimizer_block + 5);
  for (const int count : {2, 3, 8}) {
    const test::Threads threads(count);
    CHECK(blocks_of(module, Updates::dense) == one);
  }
}

TEST_CASE("parameter blocks: a parameter that is passed by moves no other to another lane",
          "[optim][parameter_blocks]") {
  Module module({2 * optimizer_block, 3 * optimizer_block, 4});
  detail::track_gradients(module);
  module.parameters[0].stored.state = detail::GradientState::added_to;
  module.parameters[2].stored.state = detail::GradientState::added_to;
  auto all = blocks_of(module, Updates::dense);
  REQUIRE(all.size() == 6);
  all.erase(2);
  all.erase(3);
  all.erase(4);
  CHECK(blocks_of(module, Updates::lazy) == all);

  module.parameters[2].trained = false;
  all.erase(5);
  CHECK(blocks_of(module, Updates::lazy) == all);
}

TEST_CASE("parameter blocks: a gradient of another shape is named before the first call",
          "[optim][parameter_blocks]") {
  Module module({4, 3});
  module.parameters[1].gradient().resize(1, 2);
  Index calls = 0;
  CHECK_THROWS_WITH(
      detail::for_each_parameter_block(
          module, Updates::dense, [&](Index, Index, Parameter<float>&, Index, Index) { ++calls; }),
      "moe: p.1 is 1 x 3, its gradient 1 x 2");
  CHECK(calls == 0);
}

TEST_CASE("parameter blocks: whole parameters come once each, if chosen and not idle",
          "[optim][parameter_blocks]") {
  std::vector<Index> sizes(300, 1000);
  sizes[7] = 0;
  sizes[9] = 5;
  Module module(sizes);
  module.parameters[11].trained = false;
  std::vector<int> expected(300, 1);
  for (const std::size_t left_out : {7u, 9u, 11u}) expected[left_out] = 0;
  for (const int count : {1, 2, 5}) {
    const test::Threads threads(count);
    std::vector<int> calls(300, 0);
    std::mutex mutex;
    detail::prepare_gradients(module, Updates::dense);
    detail::for_each_whole_parameter(
        module, Updates::dense, [](const auto& parameter) { return parameter.size() != 5; },
        [&](Index index, Parameter<float>& parameter, Index) {
          const std::lock_guard lock(mutex);
          ++calls[detail::to_size(index)];
          CHECK(&parameter == &module.parameters[detail::to_size(index)]);
        });
    CHECK(calls == expected);
  }
}
