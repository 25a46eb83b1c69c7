// Takes a layer from the library and evaluates it.

#include <cstdio>
#include <thing.hpp>

int main() {
  const thing::Layer layer = thing::make_layer();
  const moe::Matrix<float> y = layer.evaluate(moe::Matrix<float>::Ones(5, 8));
  std::printf("%td x %td\n", y.rows(), y.cols());
  return y.rows() == 5 && y.cols() == 8 && y.allFinite() ? 0 : 1;
}
