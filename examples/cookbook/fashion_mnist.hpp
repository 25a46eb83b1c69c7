#pragma once

#include <cstddef>
#include <iterator>
#include <moe/moe.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/gzip_file.hpp"

namespace cookbook {

/// Pictures of clothes, one a row, and what each shows.
struct Pictures {
  moe::Matrix<float> pixels;       ///< N x 784, from 0 to 1
  std::vector<moe::Index> labels;  ///< N, from 0 to 9
};

struct FashionMnist {
  Pictures training;    ///< the first 55,000 of the published training part
  Pictures validation;  ///< its last 5,000
  Pictures test;        ///< 10,000
};

/// Pictures `range` of the contents of a pair of files, which begin with headers of 16 and 8 bytes. Throws
/// std::runtime_error where they end before.
inline Pictures pictures_of(const std::string& pixels, const std::string& labels,
                            moe::Range range) {
  const moe::Index size = 28 * 28;
  const moe::Index end = range.first + range.count;
  if (std::ssize(pixels) < 16 + end * size || std::ssize(labels) < 8 + end) {
    throw std::runtime_error("Fashion-MNIST: " + std::to_string(pixels.size()) +
                             " bytes of pixels and " + std::to_string(labels.size()) +
                             " of labels are too few for " + std::to_string(end) + " pictures");
  }
  const auto byte = [](const std::string& bytes, moe::Index at) {
    return static_cast<unsigned char>(bytes[static_cast<std::size_t>(at)]);
  };
  Pictures pictures{moe::Matrix<float>(range.count, size), {}};
  for (moe::Index i = 0; i < range.count * size; ++i) {
    pictures.pixels.data()[i] = static_cast<float>(byte(pixels, 16 + range.first * size + i)) / 255;
  }
  for (moe::Index i = 0; i < range.count; ++i) {
    pictures.labels.push_back(byte(labels, 8 + range.first + i));
  }
  return pictures;
}

/// Reads Fashion-MNIST (H. Xiao, K. Rasul, R. Vollgraf, 2017, arXiv 1708.07747) as Debian's package
/// dataset-fashion-mnist has it. Throws std::runtime_error, which names the package, where a file cannot be
/// read, and another where one is cut short.
inline FashionMnist read_fashion_mnist(const std::string& folder) {
  const auto read = [&](const char* name) {
    try {
      return examples::read_gzip(folder + "/" + name);
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(error.what()) +
                               " (Debian: apt-get install dataset-fashion-mnist)");
    }
  };
  const std::string pixels = read("train-images-idx3-ubyte.gz");
  const std::string labels = read("train-labels-idx1-ubyte.gz");
  return {pictures_of(pixels, labels, {0, 55000}), pictures_of(pixels, labels, {55000, 5000}),
          pictures_of(read("t10k-images-idx3-ubyte.gz"), read("t10k-labels-idx1-ubyte.gz"),
                      {0, 10000})};
}

}  // namespace cookbook
