// What libFuzzer makes of SafetensorsFile: any bytes are a file that is read whole or refused with
// std::runtime_error, and nothing else happens (tests/fuzz/run.sh).

#include "moe/io/safetensors.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <stdexcept>
#include <string>

#include "moe/kernels/activations.hpp"

namespace {

/// A module whose configuration has a field of every kind.
struct Fields {
  struct Config {
    moe::Index whole = 0;
    double real = 0;
    float single = 0;
    bool flag = false;
    moe::Activation name = moe::Activation::identity;
    moe::Seed seed = 0;

    template <class Self, class Visitor>
    static constexpr void visit_fields(Self& self, Visitor visit) {
      visit("whole", self.whole);
      visit("real", self.real);
      visit("single", self.single);
      visit("flag", self.flag);
      visit("name", self.name);
      visit("seed", self.seed);
    }
  };
  Config own;

  const Config& config() const { return own; }
  template <class Self, class Visitor>
  static void visit_parameters(Self&, Visitor) {}
};

void require(bool condition) {
  if (!condition) std::abort();
}

template <class Scalar>
void read_matrix(const moe::SafetensorsFile& file, const std::string& name,
                 const moe::SafetensorsFile::Tensor& tensor) {
  if (tensor.type != moe::detail::element_type<Scalar>() || tensor.shape.size() != 2) return;
  // Sizes beside a zero can be anything.
  if (tensor.begin == tensor.end) return;
  moe::Matrix<Scalar> matrix(static_cast<moe::Index>(tensor.shape[0]),
                             static_cast<moe::Index>(tensor.shape[1]));
  file.read(name, matrix);
}

/// Any tensor of a type that can be widened, whole and in blocks.
void read_any(const moe::SafetensorsFile& file, const std::string& name,
              const moe::SafetensorsFile::Tensor& tensor) {
  // Sizes beside a zero can be more than a matrix has.
  if (!moe::detail::is_widened(tensor.type) || tensor.begin == tensor.end) return;
  const moe::Matrix<double> whole = file.matrix<double>(name);
  std::uint64_t count = 0;
  file.for_each_block<double>(name, [&](std::uint64_t first, std::span<const double> numbers) {
    require(first == count);
    for (const double number : numbers) {
      const double same = whole.data()[count++];
      require(number == same || (std::isnan(number) && std::isnan(same)));
    }
  });
  require(count == static_cast<std::uint64_t>(whole.size()));
}

void read_file(const std::string& path, std::size_t size) {
  const moe::SafetensorsFile file(path);
  std::uint64_t bytes = 0;
  for (const auto& [name, tensor] : file.tensors()) {
    require(tensor.begin <= tensor.end && tensor.end <= size);
    bytes += tensor.end - tensor.begin;
    read_matrix<float>(file, name, tensor);
    read_matrix<double>(file, name, tensor);
    read_any(file, name, tensor);
    if (tensor.type == "I64" && tensor.shape.size() == 1) {
      std::vector<moe::Index> numbers(tensor.shape[0]);
      file.read(name, numbers);
    }
  }
  require(bytes + 8 + 2 <= size);
  if (!file.metadata().empty()) {
    Fields fields{file.config<Fields>()};
    require(std::isfinite(fields.own.real) && std::isfinite(fields.own.single));
    require(fields.own.name <= moe::Activation::tanh);
    file.read_module(fields);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const int descriptor = memfd_create("safetensors", 0);
  static const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
  require(ftruncate(descriptor, 0) == 0);
  require(pwrite(descriptor, data, size, 0) == static_cast<ssize_t>(size));
  try {
    read_file(path, size);
  } catch (const std::runtime_error&) {
  }
  return 0;
}
