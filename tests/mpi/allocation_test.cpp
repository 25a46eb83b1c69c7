// Every allocation of a step fails in turn, on one rank: all ranks must hear of it.

#include <link.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#include "../sanitized.hpp"
#include "errors.hpp"
#include "whole.hpp"

#if defined(__GLIBC__) && !defined(MOE_TEST_SANITIZED)

namespace {

std::atomic<long> until_failure{-1};  ///< below 0: none fails

/// The code whose allocations may fail: this program's, which has Eigen's, and operator new's. MPI's
/// do not, since it ends the program then.
struct Code {
  std::uintptr_t first = 0;
  std::uintptr_t last = 0;
};
Code ours[2];

bool is_ours(void* caller) {
  const auto address = reinterpret_cast<std::uintptr_t>(caller);
  for (const Code& code : ours) {
    if (address >= code.first && address < code.last) return true;
  }
  return false;
}

void find_ours() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void*) {
        const bool is_program = info->dlpi_name[0] == '\0';
        if (!is_program && std::strstr(info->dlpi_name, "libstdc++") == nullptr) return 0;
        Code& code = ours[is_program ? 0 : 1];
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& part = info->dlpi_phdr[i];
          if (part.p_type != PT_LOAD || (part.p_flags & PF_X) == 0) continue;
          code = {info->dlpi_addr + part.p_vaddr, info->dlpi_addr + part.p_vaddr + part.p_memsz};
        }
        return 0;
      },
      nullptr);
}

}  // namespace

extern "C" {
void* __libc_malloc(std::size_t size);

// A program's own malloc takes the place of the C library's, which stays reachable.
void* malloc(std::size_t size) noexcept {
  if (until_failure >= 0 && is_ours(__builtin_return_address(0)) && until_failure-- == 0) {
    return nullptr;
  }
  return __libc_malloc(size);
}
}

using namespace moe;
using mpi::Communicator;
using namespace moe::test;

namespace {

/// Makes the allocations of f() on the last rank fail, one after the other until none does. f() must
/// throw the same Error on all ranks, and works the next time. Returns how many failed.
template <class F>
long fail_each(const Communicator& communicator, F&& f) {
  const int last = communicator.size() - 1;
  for (long failing = 0;; ++failing) {
    if (communicator.rank() == last) until_failure = failing;
    const std::string text = error_of(f);
    const bool is_left = until_failure >= 0;
    until_failure = -1;
    INFO("allocation " << failing << ": " << text);
    if (text != "none") {
      CHECK(text == "rank " + std::to_string(last) + ": " + std::bad_alloc().what());
    }
    double all_well = communicator.rank() == last && is_left ? 1 : 0;
    communicator.sum(std::span<double>(&all_well, 1));
    if (all_well > 0) {
      CHECK(text == "none");
      return failing;
    }
  }
}

template <class Gate>
void check_step(const typename Gate::Config& gate) {
  const Communicator communicator(MPI_COMM_WORLD, 10);
  using Parallel = mpi::ExpertParallel<MoELayer<Expert<FeedForward, double>, Gate>>;
  Parallel layer({.width = 6, .expert = {.hidden = 4}, .gate = gate, .seed = 1}, communicator);
  test::randomize_by_name(layer, 0.5);
  const auto x = random_matrix(9, 6, static_cast<std::uint64_t>(communicator.rank()));
  typename Parallel::Tape expected;
  layer.forward(x, expected, {.step = 1});

  // New tapes each time, so that there is something to allocate.
  typename Parallel::Tape tape;
  CHECK(fail_each(communicator, [&] {
          tape = {};
          layer.forward(x, tape, {.step = 1});
        }) > 10);
  CHECK(same_bits(tape.y, expected.y));
  CHECK(fail_each(communicator, [&] {
          tape = {};
          layer.evaluate(x, tape);
        }) > 10);
  const auto backward = [&](Parallel& trained) {
    return fail_each(communicator, [&] {
      const long held = until_failure.exchange(-1);
      tape = {};
      trained.forward(x, tape, {.step = 1});
      zero_gradients(trained);
      until_failure = held;
      trained.backward(x, tape);
    });
  };
  CHECK(backward(layer) > 5);
  Parallel other({.width = 6, .expert = {.hidden = 4}, .gate = gate, .seed = 1}, communicator);
  test::randomize_by_name(other, 0.5);
  const Matrix<double> dx = tape.dx;
  typename Parallel::Tape again;
  other.forward(x, again, {.step = 1});
  other.backward(x, again);
  CHECK(same_bits(dx, again.dx));
  std::map<std::string, Matrix<double>> gradients;
  for_each_parameter(other,
                     [&](const std::string& name, auto& p) { gradients[name] = p.gradient(); });
  for_each_parameter(layer, [&](const std::string& name, auto& p) {
    INFO(name);
    CHECK(same_bits(p.gradient(), gradients[name]));
  });
}

}  // namespace

TEST_CASE("expert parallel: every allocation that fails on one rank is heard of by all", "[mpi]") {
  find_ours();
  check_step<NoisyTopKGate<double>>({.experts = 5, .top_k = 2});
  check_step<BalancedGate<double>>({.experts = 5, .top_k = 2});
  check_step<ExpertChoiceGate<double>>({.experts = 5, .capacity_factor = 2});
  check_step<SharedExpertGate<HierarchicalGate<double>>>(
      {.shared = 1,
       .gated = true,
       .routed = {.groups = 2, .group_experts = 2, .top_k_groups = 1, .top_k = 1}});
  for (const PlaceOrder order :
       {PlaceOrder::rows, PlaceOrder::first_choices, PlaceOrder::largest_weight}) {
    check_step<TopKGate<double>>({.experts = 5,
                                  .top_k = 2,
                                  .capacity_factor = 1,
                                  .evaluation_capacity_factor = 1,
                                  .place_order = order,
                                  .switch_loss_weight = 0.1});
  }
}

#endif
