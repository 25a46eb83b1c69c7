#include "../allocation.hpp"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <memory>
#include <new>

#include "../naive_layer.hpp"
#include "../sanitized.hpp"
#include "moe/gates/hierarchical_gate.hpp"
#include "moe/gates/product_key_gate.hpp"

namespace {

std::atomic<std::size_t> allocations{0};

}  // namespace

// clang's OpenMP library takes memory for the regions of a program, which is not told from the rest.
#if defined(__clang__) && defined(_OPENMP)
#define MOE_TEST_COUNTS_NOTHING
#endif

std::size_t moe::test::allocation_count() {
#ifdef MOE_TEST_COUNTS_NOTHING
  return 0;
#else
  return allocations;
#endif
}

namespace {

std::atomic<long> until_failure{-1};  ///< below 0: none fails

/// Whether this allocation is the one that is to fail.
[[maybe_unused]] bool is_to_fail() { return until_failure >= 0 && until_failure-- == 0; }

}  // namespace

void moe::test::fail_allocation_after(std::size_t count) {
  until_failure = static_cast<long>(count);
}
void moe::test::fail_no_allocation() { until_failure = -1; }
bool moe::test::can_fail_allocations() {
#if !defined(MOE_TEST_SANITIZED) && defined(__GLIBC__)
  return true;
#else
  return false;
#endif
}

#if defined(MOE_TEST_SANITIZED)

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             std::size_t),
                                                         void (*free_hook)(const volatile void*));
namespace {
const int hooks_installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, std::size_t) { ++allocations; }, [](const volatile void*) {});
}  // namespace

#elif defined(__GLIBC__)

// A program's own malloc takes the place of the C library's, which stays reachable.
extern "C" {
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* old, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

void* malloc(std::size_t size) noexcept {
  ++allocations;
  if (is_to_fail()) return nullptr;
  return __libc_malloc(size);
}
void* calloc(std::size_t count, std::size_t size) noexcept {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* old, std::size_t size) noexcept {
  ++allocations;
  return __libc_realloc(old, size);
}
void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  ++allocations;
  return __libc_memalign(alignment, size);
}
int posix_memalign(void** result, std::size_t alignment, std::size_t size) noexcept {
  ++allocations;
  *result = __libc_memalign(alignment, size);
  return *result == nullptr ? ENOMEM : 0;
}
}

#else

void* operator new(std::size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

#endif

using namespace moe;
using test::allocations_in;
using test::random_matrix;

namespace {

/// A user's network that takes no memory itself: y = x ⊙ w.
template <class Scalar_>
struct Scale {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };
  explicit Scale(const Config& config, std::uint64_t) : w(1, config.width) { w.value.setOnes(); }
  Index tape_width() const { return 0; }
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar>, MatrixView<Scalar> y) const {
    evaluate(x, y);
  }
  void evaluate(ConstMatrixView<Scalar> x, MatrixView<Scalar> y) const {
    for (Index i = 0; i < x.rows(); ++i) y.row(i) = x.row(i).cwiseProduct(w.value.row(0));
  }
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar>, ConstMatrixView<Scalar> dy,
                MatrixView<Scalar> dx) {
    for (Index i = 0; i < x.rows(); ++i) {
      w.gradient().row(0) += x.row(i).cwiseProduct(dy.row(i));
      dx.row(i) = dy.row(i).cwiseProduct(w.value.row(0));
    }
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("w", self.w);
  }
  Parameter<Scalar> w;
};

/// The first pass may send every token to the same experts; the next ones spread them out, so
/// nothing may depend on how full an expert was.
template <class Layer>
void check(const typename Layer::Config& config) {
  using Scalar = typename Layer::Scalar;
  const Index tokens = 600;
  Layer layer(config);
  for_each_parameter(layer, [](const std::string& name, Parameter<Scalar>& parameter) {
    const bool scores = name.starts_with("gate.") && name.ends_with(".weight");
    if (scores) fill_normal(parameter.value, Scalar{20}, 5);
  });
  const Matrix<Scalar> same = random_matrix<Scalar>(1, config.width, 1).replicate(tokens, 1);
  const Matrix<Scalar> spread = random_matrix<Scalar>(tokens, config.width, 2);
  const Matrix<Scalar> dy = random_matrix<Scalar>(tokens, config.width, 3);
  typename Layer::Tape training;
  typename Layer::Tape serving;
  const auto pass = [&](const Matrix<Scalar>& x, std::uint64_t step) {
    layer.forward(x, training, {.step = step});
    layer.backward(dy, training);
    layer.evaluate(x, serving);
  };
  pass(same, 0);
  REQUIRE(training.balance().unused_experts() > 0);
  const std::size_t count = allocations_in([&] {
    for (std::uint64_t step = 1; step < 6; ++step) pass(step % 2 == 0 ? same : spread, step);
  });
  CHECK(count == 0);
  REQUIRE(serving.balance().unused_experts() == 0);

  // One tape for both kinds of pass.
  layer.evaluate(spread, training);
  const std::size_t mixed = allocations_in([&] {
    for (std::uint64_t step = 6; step < 9; ++step) {
      layer.forward(spread, training, {.step = step});
      layer.backward(dy, training);
      layer.evaluate(spread, training);
    }
  });
  CHECK(mixed == 0);
}

}  // namespace

#ifndef MOE_TEST_COUNTS_NOTHING
TEST_CASE("allocation: the counter sees all ways to the heap", "[allocation]") {
  CHECK(allocations_in([] {}) == 0);
  const void* volatile seen = nullptr;  // save the compiler from leaving memory out
  CHECK(allocations_in([&] {
          const auto number = std::make_unique<int>(3);
          seen = number.get();
        }) == 1);
  CHECK(allocations_in([&] {
          const std::vector<double> numbers(100);
          seen = numbers.data();
        }) == 1);
#if defined(MOE_TEST_SANITIZED) || defined(__GLIBC__)
  CHECK(allocations_in([&] {
          const Matrix<float> matrix(10, 10);
          seen = matrix.data();
        }) == 1);
#endif
}
#endif

TEMPLATE_TEST_CASE("allocation: a layer takes no memory after its first call", "[allocation]",
                   float, double) {
  using Layer = MoELayer<Expert<FeedForward, TestType>>;
  for (const int count : {1, 3}) {
    const test::Threads threads(count);
    for (const bool gated : {false, true}) {
      INFO(count << " threads, gated " << gated);
      check<Layer>({.width = 16,
                    .expert = {.hidden = 24, .gated = gated},
                    .gate = {.experts = 12, .top_k = 2},
                    .output = gated ? Activation::sigmoid : Activation::identity,
                    .seed = 3});
    }
  }
}

TEMPLATE_TEST_CASE(
    "allocation: a layer behind a hierarchical gate or product keys takes none either",
    "[allocation]", float, double) {
  for (const int count : {1, 3}) {
    const test::Threads threads(count);
    check<MoELayer<Expert<FeedForward, TestType>, HierarchicalGate<TestType>>>(
        {.width = 16,
         .expert = {.hidden = 24},
         .gate = {.groups = 4, .group_experts = 3, .top_k_groups = 1, .top_k = 2},
         .seed = 3});
    check<MoELayer<Expert<FeedForward, TestType>, ProductKeyGate<TestType>>>(
        {.width = 16,
         .expert = {.hidden = 24},
         .gate = {.row_keys = 4, .column_keys = 3, .top_k = 2},
         .seed = 3});
  }
}

TEMPLATE_TEST_CASE("allocation: a layer of a user's network takes none of its own", "[allocation]",
                   float, double) {
  for (const int count : {1, 3}) {
    const test::Threads threads(count);
    check<MoELayer<Expert<Scale, TestType>>>(
        {.width = 16, .gate = {.experts = 12, .top_k = 2}, .seed = 3});
  }
}
