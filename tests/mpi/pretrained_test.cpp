#include "moe/io/pretrained.hpp"

#include <string>

#include "moe/mpi/expert_parallel.hpp"
#include "support.hpp"

using namespace moe;

namespace {

/// Each rank reads its experts of a golden model, and all together compute what transformers did.
template <class Whole>
void check_model(const std::string& name, Index number) {
  INFO(name);
  const std::string folder = std::string(MOE_TEST_PRETRAINED) + "/" + name;
  const mpi::Communicator communicator(MPI_COMM_WORLD, 30);
  const io::Pretrained model = io::open_pretrained(folder);
  mpi::ExpertParallel<Whole> layer(model.layer_config<Whole>(number), communicator);
  model.read_layer(number, layer);
  const SafetensorsFile passes(folder + "/passes.safetensors");
  const Matrix<double> y = passes.matrix<double>("y");
  CHECK((layer.evaluate(passes.matrix<double>("x")) - y).cwiseAbs().maxCoeff() < 1e-10);
}

}  // namespace

TEST_CASE("mpi: a published model is read by several processes, each its own experts", "[mpi]") {
  check_model<io::RoutedLayer<double>>("mixtral", 1);
  check_model<io::RoutedLayer<double>>("granitemoe", 0);
  check_model<io::SharedLayer<double>>("mixtral", 1);
  check_model<io::SharedLayer<double>>("deepseek_v2", 1);
}
