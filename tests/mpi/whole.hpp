#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "moe/moe.hpp"
#include "moe/mpi/expert_parallel.hpp"
#include "support.hpp"

/// \file
/// An expert-parallel layer beside the layer of one process that it must equal. Every rank has all of
/// the latter.

namespace moe::test {

/// Values that depend on a parameter's name alone, not on the rank.
template <class Module>
void randomize_by_name(Module& module, double scale, std::uint64_t seed = 0) {
  visit_each(module, [&](const std::string& name, auto& parameter) {
    using Scalar = typename std::remove_cvref_t<decltype(parameter.value)>::Scalar;
    fill_normal(parameter.value, static_cast<Scalar>(scale),
                derive_seed(std::hash<std::string>{}(name), seed));
    if (!parameter.trained) parameter.value *= Scalar(0.1);
  });
}

/// How many rows each rank has, in several ways.
inline std::vector<std::vector<Index>> ways_to_share(Index tokens, int ranks) {
  const auto count = static_cast<std::size_t>(ranks);
  std::vector<std::vector<Index>> ways;
  std::vector<Index> even(count);
  for (std::size_t r = 0; r < count; ++r) {
    const auto i = static_cast<Index>(r);
    even[r] = tokens * (i + 1) / ranks - tokens * i / ranks;
  }
  ways.push_back(even);
  for (const std::size_t owner : {std::size_t{0}, count - 1}) {  // the others have none
    std::vector<Index> one(count, 0);
    one[owner] = tokens;
    ways.push_back(one);
  }
  std::vector<Index> uneven(count, 1);
  uneven.back() = tokens - static_cast<Index>(count) + 1;
  ways.push_back(uneven);
  return ways;
}

/// Which rows are tokens, in several ways: two of three; none of the first rank that has rows; a
/// different number on each rank; the last one only; none.
inline std::vector<std::vector<std::uint8_t>> ways_to_pad(const std::vector<Index>& share) {
  const auto rows = static_cast<std::size_t>(std::accumulate(share.begin(), share.end(), Index{0}));
  std::vector<std::vector<std::uint8_t>> ways(5, std::vector<std::uint8_t>(rows, 1));
  std::size_t row = 0;
  for (std::size_t r = 0; r < share.size(); ++r) {
    for (Index i = 0; i < share[r]; ++i, ++row) {
      ways[0][row] = row % 3 != 1;
      ways[1][row] = row >= static_cast<std::size_t>(*std::find_if(share.begin(), share.end(),
                                                                   [](Index n) { return n > 0; }));
      ways[2][row] = static_cast<std::size_t>(i) >= r;
      ways[3][row] = row + 1 == rows;
      ways[4][row] = 0;
    }
  }
  return ways;
}

template <class Layer>
class Beside {
 public:
  using Scalar = typename Layer::Scalar;
  using Parallel = mpi::ExpertParallel<Layer>;

  Beside(const typename Layer::Config& config, const mpi::Communicator& communicator,
         double scale = 0.5)
      : communicator_(communicator), whole(config), parallel(config, communicator) {
    randomize_by_name(whole, scale);
    randomize_by_name(parallel, scale);
  }

  /// Checks two training passes that add up, and evaluate(), of rows shared among the ranks.
  /// key.valid is that of all rows; of those that are padding x is NaN.
  void check(const std::vector<Index>& share, double tolerance, const Pass& key = {.step = 3}) {
    const auto rank = static_cast<std::size_t>(communicator_.rank());
    const Index rows = std::accumulate(share.begin(), share.end(), Index{0});
    const Index first =
        std::accumulate(share.begin(), share.begin() + communicator_.rank(), Index{0});
    const auto own = [&](const Matrix<Scalar>& m) {
      return Matrix<Scalar>(m.middleRows(first, share[rank]));
    };
    auto x = random_matrix<Scalar>(rows, whole.config().width, 5);
    const auto dy = random_matrix<Scalar>(rows, whole.config().width, 6);
    const std::span<const std::uint8_t> valid = key.valid;
    const auto own_valid = valid.empty() ? valid
                                         : valid.subspan(static_cast<std::size_t>(first),
                                                         static_cast<std::size_t>(share[rank]));
    const auto tokens_before = [&](Index row) {
      if (valid.empty()) return row;
      return static_cast<Index>(row -
                                std::count(valid.begin(), valid.begin() + row, std::uint8_t{0}));
    };
    for (Index row = 0; row < rows && !valid.empty(); ++row) {
      if (valid[static_cast<std::size_t>(row)] == 0) {
        x.row(row).setConstant(std::numeric_limits<Scalar>::quiet_NaN());
      }
    }
    zero_gradients(whole);
    zero_gradients(parallel);
    typename Layer::Tape expected;
    typename Parallel::Tape tape;
    for (int pass = 0; pass < 2; ++pass) {
      Pass next = key;
      next.step = key.step + static_cast<std::uint64_t>(pass);
      INFO("pass " << pass << ", rank " << rank << " of " << communicator_.size() << " with "
                   << share[rank] << " of " << rows << " rows");
      whole.forward(x, expected, next);
      Pass of_rank = next;
      of_rank.valid = own_valid;
      parallel.forward(own(x), tape, of_rank);
      CHECK(relative_error(tape.y, own(expected.y)) < tolerance);
      check_balance(tape.balance(), expected.balance(), tolerance);
      CHECK(tape.exchange.batch.rows == rows);
      CHECK(tape.exchange.batch.first_row == first);
      CHECK(tape.exchange.batch.tokens == tokens_before(rows));
      CHECK(tape.exchange.batch.first_token == tokens_before(first));
      whole.backward(dy, expected);
      const Matrix<Scalar>& dx = parallel.backward(own(dy), tape);
      CHECK(&dx == &tape.dx);
      CHECK(relative_error(dx, own(expected.dx)) < tolerance);
      check_gradients(tolerance);
    }
    whole.evaluate(x, expected, {.valid = valid, .sequences = key.sequences});
    parallel.evaluate(own(x), tape, {.valid = own_valid, .sequences = key.sequences});
    CHECK(relative_error(tape.y, own(expected.y)) < tolerance);
    check_balance(tape.balance(), expected.balance(), tolerance);
  }

 private:
  const mpi::Communicator& communicator_;

 public:
  Layer whole;
  Parallel parallel;

 private:
  static void check_balance(const Balance<Scalar>& actual, const Balance<Scalar>& expected,
                            double tolerance) {
    CHECK(std::abs(actual.loss - expected.loss) <= tolerance * (1 + std::abs(expected.loss)));
    CHECK(relative_error(actual.importance, expected.importance) < tolerance);
    CHECK(relative_error(actual.load, expected.load) < tolerance);
    CHECK(actual.tokens_per_expert == expected.tokens_per_expert);
  }

  /// Every parameter of a rank is one of the whole layer, and the ranks together have all of them.
  void check_gradients(double tolerance) {
    std::map<std::string, Matrix<Scalar>> expected;
    visit_each(whole, [&](const std::string& name, auto& p) { expected[name] = p.gradient(); });
    std::vector<Index> found(expected.size(), 0);
    visit_each(parallel, [&](const std::string& name, auto& p) {
      INFO("parameter " << name);
      const auto place = expected.find(name);
      REQUIRE(place != expected.end());
      CHECK(relative_error(p.gradient(), place->second) < tolerance);
      found[static_cast<std::size_t>(std::distance(expected.begin(), place))] = 1;
    });
    communicator_.sum(std::span<Index>(found));
    std::size_t i = 0;
    for (const auto& [name, gradient] : expected) {
      INFO("parameter " << name);
      CHECK(found[i++] == (name.starts_with("gate") ? communicator_.size() : 1));
    }
  }
};

}  // namespace moe::test
