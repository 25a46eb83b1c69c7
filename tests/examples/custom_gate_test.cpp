#include "../../examples/custom_gate/nearest_gate.hpp"
#include "../support.hpp"

using namespace moe;
using custom_gate::NearestGate;
using test::random_matrix;
using test::relative_error;
using Layer = MoELayer<Expert<FeedForward, double>, NearestGate<double>>;

TEST_CASE("custom gate: three tokens and two experts worked by hand", "[examples][custom_gate]") {
  NearestGate<double> gate({.width = 2, .experts = 2}, 1);
  for_each_parameter(gate, [](const std::string& name, Parameter<double>& centre) {
    CHECK(name == "centre");
    centre.value = Matrix<double>{{0, 0}, {2, 0}};
  });
  NearestGate<double>::Tape tape;
  const Matrix<double> x{{0, 1}, {2, 0}, {1, 0}};
  gate.forward(x, tape, {.step = 0});
  // Squared distances 1 and 5, 4 and 0, 1 and 1; a tie goes to the lower expert.
  CHECK(tape.routing.expert == std::vector<Index>{0, 1, 0});
  CHECK(tape.routing.token_offsets == std::vector<Index>{0, 1, 2, 3});
  const double w = std::exp(-0.5);
  CHECK(relative_error(Eigen::Map<const Vector<double>>(tape.routing.weight.data(), 3),
                       Vector<double>{{w, 1, w}}) < 1e-15);
  // ∂w/∂c = w·(x - c) for D = 2.
  Matrix<double> dx = Matrix<double>::Zero(3, 2);
  gate.backward(x, std::vector<double>{1, 5, 2}, tape, dx);
  for_each_parameter(gate, [&](const std::string&, Parameter<double>& centre) {
    CHECK(relative_error(centre.gradient(), Matrix<double>{{2 * w, w}, {0, 0}}) < 1e-15);
  });
  CHECK(relative_error(dx, Matrix<double>{{0, -w}, {0, 0}, {-2 * w, 0}}) < 1e-15);
}

TEST_CASE("custom gate: gradients of a layer agree with differences", "[examples][custom_gate]") {
  Layer layer({.width = 3,
               .expert = {.hidden = 4, .activation = Activation::gelu},
               .gate = {.experts = 4},
               .seed = 1});
  Matrix<double> x = random_matrix(6, 3, 2);
  const Matrix<double> r = random_matrix(6, 3, 3);
  Layer::Tape tape;
  layer.forward(x, tape, {.step = 0});
  const Matrix<double> dx = layer.backward(r, tape);
  const auto loss = [&] { return layer.evaluate(x).cwiseProduct(r).sum(); };
  CHECK(relative_error(dx, test::difference_gradient(x, loss)) < 1e-7);
  test::check_parameter_gradients(layer, loss);
}

TEST_CASE("custom gate: NaN goes through, and no expert is too few", "[examples][custom_gate]") {
  Layer layer({.width = 3, .expert = {.hidden = 4}, .gate = {.experts = 4}, .seed = 0});
  Matrix<double> x = random_matrix(3, 3, 2);
  x(1, 0) = std::nan("");
  const Matrix<double> y = layer.evaluate(x);
  CHECK(y.row(1).array().isNaN().all());
  CHECK(y.row(0).array().isFinite().all());
  CHECK(layer.evaluate(Matrix<double>(0, 3)).rows() == 0);
  CHECK_THROWS_AS(NearestGate<double>({.width = 3, .experts = 0}, 1), std::invalid_argument);
}
