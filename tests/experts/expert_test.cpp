#include "moe/experts/expert.hpp"

#include "moe/experts/feed_forward.hpp"
#include "passes.hpp"

using namespace moe;
using namespace moe::test;

namespace {

/// A user's network: y = tanh(x·W), keeping y.
template <class Scalar_>
struct TanhMap {
  using Scalar = Scalar_;
  struct Config {
    Index width = 0;
  };

  explicit TanhMap(const Config& config, std::uint64_t seed) : w(config.width, config.width) {
    fill_normal(w.value, Scalar{0.7}, seed);
  }
  Index tape_width() const { return w.value.cols(); }
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar> kept, MatrixView<Scalar> y) const {
    largest_block = std::max(largest_block, x.rows());
    y = (x * w.value).array().tanh().matrix();
    kept = y;
  }
  void evaluate(ConstMatrixView<Scalar> x, MatrixView<Scalar> y) const {
    largest_block = std::max(largest_block, x.rows());
    y = (x * w.value).array().tanh().matrix();
  }
  void backward(ConstMatrixView<Scalar> x, ConstMatrixView<Scalar> kept, ConstMatrixView<Scalar> dy,
                MatrixView<Scalar> dx) {
    const Matrix<Scalar> dpre = dy.cwiseProduct((1 - kept.array().square()).matrix());
    w.gradient() += x.transpose() * dpre;
    dx = dpre * w.value.transpose();
  }
  template <class Self, class Visitor>
  static void visit_parameters(Self& self, Visitor visit) {
    visit("w", self.w);
  }

  Parameter<Scalar> w;
  mutable Index largest_block = 0;
};

template <class Scalar>
struct WithoutBackward : TanhMap<Scalar> {
  using TanhMap<Scalar>::TanhMap;
  void backward(ConstMatrixView<Scalar>, ConstMatrixView<Scalar>, ConstMatrixView<Scalar>,
                MatrixView<Scalar>) = delete;
};
template <class Scalar>
struct WithoutSeed : TanhMap<Scalar> {
  explicit WithoutSeed(const typename TanhMap<Scalar>::Config& config)
      : TanhMap<Scalar>(config, 0) {}
};
template <class Scalar>
struct WithoutWidth : TanhMap<Scalar> {
  struct Config {
    Index size = 0;
  };
  explicit WithoutWidth(const Config&, std::uint64_t) : TanhMap<Scalar>({.width = 1}, 0) {}
};
template <class Scalar>
struct ForwardNotConst : TanhMap<Scalar> {
  using TanhMap<Scalar>::TanhMap;
  void forward(ConstMatrixView<Scalar> x, MatrixView<Scalar> kept, MatrixView<Scalar> y) {
    TanhMap<Scalar>::forward(x, kept, y);
  }
};

static_assert(PlainNetwork<TanhMap<float>> && !FusedNetwork<TanhMap<float>>);
static_assert(FusedNetwork<FeedForward<float>> && !PlainNetwork<FeedForward<float>>);
static_assert(ExpertNetwork<TanhMap<double>> && ExpertNetwork<FeedForward<double>>);
static_assert(!ExpertNetwork<int>);
static_assert(!ExpertNetwork<WithoutBackward<float>>);
static_assert(!ExpertNetwork<WithoutSeed<float>>);
static_assert(!ExpertNetwork<WithoutWidth<float>>);
static_assert(!ExpertNetwork<ForwardNotConst<float>>);
static_assert(std::same_as<Expert<FeedForward>::Scalar, float>);
static_assert(std::same_as<Expert<FeedForward, double>::Scalar, double>);

/// x, dy and the rows of them that an expert gets, some of them twice.
struct Slice {
  static constexpr Index width = 5;
  Slice(Index n, double scale)
      : x(random_matrix(n + 3, width, 31, scale)), dy(random_matrix(n + 3, width, 32)) {
    for (Index i = 0; i < n; ++i) list.push_back((i * i + 1) % (n + 3));
    weight = random_matrix(1, n, 33);
  }
  Index count() const { return static_cast<Index>(list.size()); }
  GatheredRows<double> rows_of_x() const { return {x, list.data(), count()}; }
  Matrix<double> dense_dy() const {
    Matrix<double> rows(count(), width);
    for (Index i = 0; i < count(); ++i) rows.row(i) = dy.row(list[detail::to_size(i)]);
    return rows;
  }

  Matrix<double> x, dy, weight;
  std::vector<Index> list;
};

/// Σ weight·⟨network(x), dy⟩ over the slice.
template <class Expert>
double weighted_sum(const Expert& expert, const Slice& slice) {
  test::Passes<double> passes(expert, slice.rows_of_x());
  return (slice.weight * passes.evaluate(expert).cwiseProduct(slice.dense_dy())).sum();
}

template <class Expert>
void check_gradients(Expert& expert, Slice& slice) {
  zero_gradients(expert);
  test::Passes<double> passes(expert, slice.rows_of_x());
  passes.forward(expert);
  passes.backward(expert, slice.dense_dy(), slice.weight);
  const Index n = slice.count();
  const Matrix<double>& dx = passes.dx;
  const Matrix<double>& dweight = passes.dweight;

  const auto loss = [&] { return weighted_sum(expert, slice); };
  test::check_parameter_gradients(expert, loss);
  CHECK(relative_error(dweight, test::difference_gradient(slice.weight, loss)) < 1e-7);
  Matrix<double> dx_by_token = Matrix<double>::Zero(slice.x.rows(), Slice::width);
  for (Index i = 0; i < n; ++i) dx_by_token.row(slice.list[detail::to_size(i)]) += dx.row(i);
  CHECK(relative_error(dx_by_token, test::difference_gradient(slice.x, loss)) < 1e-7);
}

}  // namespace

TEST_CASE("expert: a plain network is handed its rows of x and nothing else", "[experts]") {
  const Expert<TanhMap, double> expert({.width = Slice::width}, 4);
  const Slice slice(20, 1.0);
  test::Passes<double> passes(expert, slice.rows_of_x());
  const Matrix<double> y = passes.forward(expert);
  const Matrix<double> served = passes.evaluate(expert);
  Matrix<double> expected(20, Slice::width);
  for (Index i = 0; i < 20; ++i) {
    expected.row(i) = (slice.x.row(slice.list[detail::to_size(i)]) * expert.network().w.value)
                          .array()
                          .tanh()
                          .matrix();
  }
  CHECK(relative_error(y, expected) < 1e-14);
  CHECK(same_bits(y, served));
}

TEST_CASE("expert: the gradients of a plain network are those of the weighted sum", "[experts]") {
  for (const Index n : {1, 7}) {
    for (const double scale : {0.01, 1.0}) {
      INFO(n << " rows, x times " << scale);
      Expert<TanhMap, double> expert({.width = Slice::width}, 4);
      Slice slice(n, scale);
      check_gradients(expert, slice);
    }
  }
}

TEST_CASE("expert: the gradients of a fused network are those of the weighted sum", "[experts]") {
  for (const bool gated : {false, true}) {
    Expert<FeedForward, double> expert(
        {.width = Slice::width, .hidden = 6, .activation = Activation::silu, .gated = gated}, 4);
    Slice slice(9, 1.0);
    check_gradients(expert, slice);
  }
}

TEST_CASE("expert: a long slice comes in pieces and changes nothing by it", "[experts]") {
  const Index n = 2 * expert_block_rows + 3;
  Expert<TanhMap, double> expert({.width = Slice::width}, 4);
  Slice slice(n, 1.0);
  test::Passes<double> all(expert, slice.rows_of_x());
  all.forward(expert);
  CHECK(expert.network().largest_block == expert_block_rows);
  const Matrix<double> dy = slice.dense_dy();
  all.backward(expert, dy, slice.weight);
  const Matrix<double> gradient = expert.network().w.gradient();

  // The same, a row at a time.
  zero_gradients(expert);
  for (Index i = 0; i < n; ++i) {
    test::Passes<double> one(expert, slice.rows_of_x().slice(i, 1));
    one.forward(expert);
    one.backward(expert, dy.row(i), slice.weight.middleCols(i, 1));
    REQUIRE(relative_error(one.y, all.y.row(i)) < 1e-14);
    REQUIRE(relative_error(one.dx, all.dx.row(i)) < 1e-13);
    REQUIRE(std::abs(one.dweight(0, 0) - all.dweight(0, i)) < 1e-13);
  }
  CHECK(relative_error(expert.network().w.gradient(), gradient) < 1e-13);
}

TEST_CASE("expert: backward adds to the gradients", "[experts]") {
  Expert<TanhMap, double> expert({.width = Slice::width}, 4);
  const Slice slice(8, 1.0);
  test::Passes<double> passes(expert, slice.rows_of_x());
  passes.forward(expert);
  const auto backward = [&] {
    passes.backward(expert, slice.dense_dy(), slice.weight);
    return Matrix<double>(expert.network().w.gradient());
  };
  const Matrix<double> once = backward();
  CHECK(once.cwiseAbs().minCoeff() > 0);
  CHECK(relative_error(backward(), Matrix<double>(2 * once)) < 1e-15);
}

TEST_CASE("expert: no rows are no work", "[experts]") {
  Expert<TanhMap, double> expert({.width = Slice::width}, 4);
  const Slice slice(0, 1.0);
  test::Passes<double> passes(expert, slice.rows_of_x());
  passes.forward(expert);
  passes.evaluate(expert);
  passes.backward(expert, slice.dense_dy(), slice.weight);
  CHECK(expert.network().largest_block == 0);
  CHECK(expert.network().w.gradient().cwiseAbs().maxCoeff() == 0);
}

TEST_CASE("expert: parameters are the network's", "[experts]") {
  const Expert<TanhMap, double> expert({.width = 3}, 4);
  std::vector<std::string> names;
  for_each_parameter(expert, [&](const std::string& name, const Parameter<double>& parameter) {
    names.push_back(name);
    CHECK(&parameter == &expert.network().w);
  });
  CHECK(names == std::vector<std::string>{"w"});
  CHECK(same_bits(expert.network().w.value, TanhMap<double>({.width = 3}, 4).w.value));
}
