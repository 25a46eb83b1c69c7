#include "../../examples/cookbook/fashion_mnist.hpp"
#include "../support.hpp"
#include "../temporary_folder.hpp"

using Catch::Matchers::Contains;
using cookbook::pictures_of;

TEST_CASE("cookbook: pictures are where the headers end", "[examples][cookbook]") {
  const std::size_t size = 784;
  // Three pictures of one grey each; 0xFF must not become negative.
  const std::string pixels = std::string(16, 'h') + std::string(size, '\x00') +
                             std::string(size, '\x33') + std::string(size, '\xFF');
  const std::string labels = std::string(8, 'h') + std::string("\x07\x00\x09", 3);
  const auto last = pictures_of(pixels, labels, {1, 2});
  CHECK(last.labels == std::vector<moe::Index>{0, 9});
  REQUIRE(last.pixels.rows() == 2);
  CHECK(last.pixels.row(0) == moe::Matrix<float>::Constant(1, 784, 0.2f));
  CHECK(last.pixels.row(1) == moe::Matrix<float>::Constant(1, 784, 1.0f));
  CHECK(pictures_of(pixels, labels, {0, 1}).pixels.isZero(0));
  CHECK(pictures_of(pixels, labels, {0, 0}).labels.empty());
  CHECK_THROWS_WITH(
      pictures_of(pixels, labels, {2, 2}),
      "Fashion-MNIST: 2368 bytes of pixels and 11 of labels are too few for 4 pictures");
  CHECK_THROWS_WITH(pictures_of(pixels.substr(1), labels, {0, 3}),
                    Contains("2367 bytes of pixels"));
  CHECK_THROWS_WITH(pictures_of(pixels, labels.substr(1), {0, 3}), Contains("10 of labels"));
}

TEST_CASE("cookbook: a file that is missing, or is no gzip, names the package",
          "[examples][cookbook]") {
  const moe::test::TemporaryFolder folder;
  const std::string path = folder.file("train-images-idx3-ubyte.gz");
  const std::string where = path.substr(0, path.rfind('/'));
  CHECK_THROWS_WITH(cookbook::read_fashion_mnist(where),
                    "cannot read " + path + " (Debian: apt-get install dataset-fashion-mnist)");
  std::ofstream(path) << "no gzip";
  CHECK_THROWS_WITH(cookbook::read_fashion_mnist(where),
                    Contains("gzip cannot read " + path) && Contains("dataset-fashion-mnist"));
}
