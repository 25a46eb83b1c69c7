#include "moe/io/serving.hpp"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <limits>

#include "../support.hpp"
#include "../temporary_folder.hpp"
#include "../weights/formats.hpp"
#include "moe/gates/top_k_gate.hpp"

using namespace moe;
using namespace moe::test;  // NOLINT(google-build-using-namespace)
using Catch::Matchers::Contains;

namespace {

using Layer = MoELayer<Expert<FeedForward>, TopKGate<float>>;
template <class Format>
using Served = ServingLayer<Layer, Format>;

/// Widths that are no multiples of a block, a packet or two.
Layer make_layer() {
  Layer layer(
      {.width = 37,
       .expert = {.hidden = 71, .activation = Activation::silu, .gated = true, .bias = true},
       .gate = {.experts = 3, .top_k = 2},
       .seed = 1});
  std::uint64_t seed = 10;
  for_each_parameter(layer, [&](const std::string&, auto& p) {
    p.value = random_matrix<float>(p.value.rows(), p.value.cols(), ++seed, 0.3);
  });
  return layer;
}

/// A file with one tensor replaced, or left out where it has no bytes.
void change_tensor(const std::string& from, const std::string& to, const std::string& name,
                   const std::string& type, const std::vector<std::uint64_t>& shape,
                   const std::vector<std::byte>& bytes) {
  const SafetensorsFile file(from);
  SafetensorsWriter writer;
  for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
  for (const auto& [of, tensor] : file.tensors()) {
    if (of != name) {
      std::vector<std::byte> same(tensor.end - tensor.begin);
      file.read_bytes(of, 0, same);
      writer.add_made_bytes(of, tensor.type, tensor.shape, [same] { return same; });
    } else if (!bytes.empty()) {
      writer.add_made_bytes(name, type, shape, [bytes] { return bytes; });
    }
  }
  writer.write(to);
}

}  // namespace

TEMPLATE_TEST_CASE("served files: saved and loaded to the same bits", "[io][weights]",
                   MOE_TEST_FORMATS) {
  const auto packing = GENERATE(Packing::plain, Packing::packed);
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const Served<TestType> served(make_layer());
  save_serving(path, served, packing);
  const auto loaded = load_serving<Served<TestType>>(path);
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(loaded.evaluate(x), served.evaluate(x)));
  CHECK(loaded.config().expert.activation == Activation::silu);
  // Copies, and what outlives the file's name.
  const Served<TestType> copy = loaded;
  std::filesystem::remove(path);
  CHECK(same_bits(copy.evaluate(x), served.evaluate(x)));
}

TEMPLATE_TEST_CASE("served files: straight from a wide one", "[io][weights]", MOE_TEST_FORMATS) {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const Layer layer = make_layer();
  save_module(path, layer);
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(load_serving<Served<TestType>>(path).evaluate(x),
                  Served<TestType>(layer).evaluate(x)));
}

TEST_CASE("served files: of layers with identity experts", "[io][weights]") {
  const auto packing = GENERATE(Packing::plain, Packing::packed);
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const Layer layer({.width = 37,
                     .expert = {.hidden = 71},
                     .gate = {.experts = 4, .top_k = 2},
                     .identity_experts = 1,
                     .seed = 1});
  const Served<Int4> served(layer);
  save_serving(path, served, packing);
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(load_serving<Served<Int4>>(path).evaluate(x), served.evaluate(x)));
}

TEMPLATE_TEST_CASE("served files: the rounded activations are the reader's choice", "[io][weights]",
                   MOE_TEST_SCALED_FORMATS) {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const Served<TestType> served(make_layer(), {.activations = Activations::int8});
  save_serving(path, served);
  const auto loaded = load_serving<Served<TestType>>(path, {.activations = Activations::int8});
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(loaded.evaluate(x), served.evaluate(x)));
}

TEMPLATE_TEST_CASE("served files: packed on a machine with other packets", "[io][weights]",
                   MOE_TEST_FORMATS) {
  // The bytes such a machine would write, from what a layout says: every code and scale in its place.
  const Index lanes = GENERATE(1, 4, 8, 16);
  const TemporaryFolder folder;
  const Served<TestType> served(make_layer());
  const std::string path = folder.file("packed.safetensors");
  save_serving(path, served, Packing::packed);
  std::string from = path;
  Index number = 0;
  for (Index e = 0; e < 3; ++e) {
    Served<TestType>::Expert::Network::visit_weights(
        served.experts()[detail::to_size(e)].network(), [&](std::string_view part, const auto& w) {
          const auto& m = w.matrix;
          std::vector<std::byte> bytes(static_cast<std::size_t>(m.rows() + 32) * 4 *
                                       static_cast<std::size_t>(m.cols() + 64));
          std::size_t end = 0;
          for (Index k = 0; k < m.rows(); ++k) {
            for (Index j = 0; j < m.cols(); ++j) {
              const auto at = detail::narrow_place<TestType>(m.rows(), m.cols(), k, j, lanes);
              TestType::set(bytes.data() + at.lane, at.step, m.code(k, j));
              if constexpr (TestType::scaled) {
                const auto half = static_cast<Eigen::half>(m.scale(k, j));
                std::memcpy(bytes.data() + at.scale, &half.x, 2);
              }
              end = std::max(end, static_cast<std::size_t>(at.lane));
            }
          }
          const Index block = (TestType::scaled ? 2 * lanes : 0) +
                              TestType::block / TestType::group * TestType::group_bytes * lanes;
          const auto size =
              static_cast<std::size_t>((m.rows() + TestType::block - 1) / TestType::block * block *
                                       ((m.cols() + lanes - 1) / lanes));
          CHECK(end < size);
          bytes.resize((size + 63) / 64 * 64);
          const std::string to = folder.file(std::to_string(number++) + ".safetensors");
          change_tensor(from, to, "experts." + std::to_string(e) + "." + std::string(part), "U8",
                        {bytes.size()}, bytes);
          from = to;
        });
  }
  SafetensorsWriter writer;
  const SafetensorsFile file(from);
  for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
  writer.set_metadata("serving.layout", "version 1, lanes " + std::to_string(lanes));
  for (const auto& [of, tensor] : file.tensors()) {
    std::vector<std::byte> same(tensor.end - tensor.begin);
    file.read_bytes(of, 0, same);
    writer.add_made_bytes(of, tensor.type, tensor.shape, [same] { return same; });
  }
  const std::string other = folder.file("other.safetensors");
  writer.write(other);
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(load_serving<Served<TestType>>(other).evaluate(x), served.evaluate(x)));

  // What is packed anew is checked.
  if (lanes == detail::lane_count || std::is_same_v<TestType, Int4>) return;
  const std::string name = "experts.2.up.weight";
  std::vector<std::byte> bytes(file.tensor(name).end - file.tensor(name).begin);
  file.read_bytes(name, 0, bytes);
  const auto at = detail::narrow_place<TestType>(37, 71, 36, 70, lanes);
  const int code = std::is_same_v<TestType, Int8> ? -128 : 0x7F80;
  TestType::set(bytes.data() + at.lane, at.step, static_cast<typename TestType::Code>(code));
  const std::string bad = folder.file("bad.safetensors");
  change_tensor(other, bad, name, "U8", {bytes.size()}, bytes);
  CHECK_THROWS_WITH(load_serving<Served<TestType>>(bad),
                    Contains("at [36,70], which is not valid in "));
}

TEST_CASE("served files: plain ones are what they say", "[io][weights]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const Served<Int4> served(make_layer());
  save_serving(path, served);
  const SafetensorsFile file(path);
  CHECK(file.metadata("serving.format") == "int4");
  const auto& weight = file.tensor("experts.1.down.weight");
  CHECK(weight.type == "U8");
  CHECK(weight.shape == std::vector<std::uint64_t>{36, 37});
  const auto& scale = file.tensor("experts.1.down.weight.scale");
  CHECK(scale.type == "F16");
  CHECK(scale.shape == std::vector<std::uint64_t>{3, 37});
  const auto scales = file.matrix<float>("experts.1.down.weight.scale");
  std::vector<std::byte> bytes(36 * 37);
  file.read_bytes("experts.1.down.weight", 0, bytes);
  Served<Int4>::Expert::Network::visit_weights(
      served.experts()[1].network(), [&](std::string_view part, const auto& w) {
        if (part != "down.weight") return;
        for (Index k = 0; k < 71; ++k) {
          for (Index j = 0; j < 37; ++j) {
            const int both = std::to_integer<int>(bytes[static_cast<std::size_t>(k / 2 * 37 + j)]);
            const int q = (k % 2 == 0 ? both & 15 : both >> 4) - 8;
            REQUIRE(static_cast<float>(q) * scales(k / 32, j) == w.matrix.decoded()(k, j));
          }
        }
      });
}

TEST_CASE("served files: what is wrong is named", "[io][weights]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const std::string bad = folder.file("bad.safetensors");
  const std::string name = "experts.1.up.weight";
  const Served<Int8> served(make_layer());
  save_serving(path, served);
  const auto refused = [&](const char* why) {
    CHECK_THROWS_WITH(load_serving<Served<Int8>>(bad), Contains(why));
  };
  const auto bytes_of = [&](const std::string& tensor) {
    const SafetensorsFile file(path);
    std::vector<std::byte> bytes(file.tensor(tensor).end - file.tensor(tensor).begin);
    file.read_bytes(tensor, 0, bytes);
    return bytes;
  };
  change_tensor(path, bad, name, "", {}, {});
  refused("has no tensor \"experts.1.up.weight\"");
  {
    SafetensorsWriter writer;
    const auto layer = make_layer();
    writer.add_module(layer, "mixture.");
    writer.write(bad);
    refused("load_serving() reads the file of one layer");
  }
  change_tensor(path, bad, name + ".scale", "", {}, {});
  refused("has no tensor \"experts.1.up.weight.scale\"");
  change_tensor(path, bad, name + ".scale", "F16", {1, 71}, std::vector<std::byte>(142));
  refused("\"experts.1.up.weight.scale\" is F16 [1,71], must be F16 [2,71]");
  change_tensor(path, bad, name, "U8", {37, 71}, bytes_of(name));
  refused("\"experts.1.up.weight\" is U8 [37,71], must be I8 [37,71]");
  auto codes = bytes_of(name);
  codes[71 * 3 + 5] = std::byte{0x80};
  change_tensor(path, bad, name, "I8", {37, 71}, codes);
  refused("\"experts.1.up.weight\" has -128 at [3,5], which is not valid in int8");
  auto scales = bytes_of(name + ".scale");
  scales[2 * (71 + 4)] = std::byte{0x00};
  scales[2 * (71 + 4) + 1] = std::byte{0x7C};
  change_tensor(path, bad, name + ".scale", "F16", {2, 71}, scales);
  refused("\"experts.1.up.weight.scale\" has the scale inf at [1,4], which is not valid in int8");
  CHECK_THROWS_WITH(load_serving<Served<Int4>>(path),
                    Contains("has weights in int8, must be int4"));
  CHECK_THROWS_WITH(load_serving<Served<Int8>>(folder.file("none")), Contains("cannot be read"));

  const Served<BFloat16> halves(make_layer());
  save_serving(path, halves);
  auto infinite = bytes_of(name);
  infinite[0] = std::byte{0x80};
  infinite[1] = std::byte{0x7F};
  change_tensor(path, bad, name, "BF16", {37, 71}, infinite);
  CHECK_THROWS_WITH(load_serving<Served<BFloat16>>(bad),
                    Contains("has inf at [0,0], which is not valid in bfloat16"));

  save_serving(path, served, Packing::packed);
  {
    const SafetensorsFile file(path);
    SafetensorsWriter writer;
    for (const auto& [key, text] : file.metadata()) writer.set_metadata(key, text);
    writer.set_metadata("serving.layout", "version 7, lanes 16");
    writer.write(bad);
  }
  refused("has the layout \"version 7, lanes 16\", must be \"version 1, lanes ");
  change_tensor(path, bad, name, "U8", {64}, std::vector<std::byte>(64));
  refused("\"experts.1.up.weight\" is U8 [64], must be U8 [");
  // Cut off.
  std::filesystem::copy_file(path, bad, std::filesystem::copy_options::overwrite_existing);
  std::filesystem::resize_file(bad, std::filesystem::file_size(bad) - 64);
  refused("the file has");
}

TEMPLATE_TEST_CASE("served files: packed weights are checked when asked", "[io][weights]",
                   MOE_TEST_FORMATS) {
  using Loaded = Served<TestType>;
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  const std::string bad = folder.file("bad.safetensors");
  const std::string name = "experts.1.up.weight";
  const Loaded served(make_layer());
  save_serving(path, served, Packing::packed);
  const auto x = random_matrix<float>(20, 37, 2);
  CHECK(same_bits(load_serving<Loaded>(path, {}, MappedCheck::weights).evaluate(x),
                  served.evaluate(x)));
  const SafetensorsFile file(path);
  std::vector<std::byte> good(file.tensor(name).end - file.tensor(name).begin);
  file.read_bytes(name, 0, good);
  const auto refused = [&](const std::vector<std::byte>& bytes, const std::string& why) {
    change_tensor(path, bad, name, "U8", {bytes.size()}, bytes);
    if (load_serving<Loaded>(path).is_mapped()) CHECK_NOTHROW(load_serving<Loaded>(bad));
    CHECK_THROWS_WITH(load_serving<Loaded>(bad, {}, MappedCheck::weights),
                      Contains("\"experts.1.up.weight\" has " + why));
  };
  // Of 37 x 71 weights the last one, and the scale of the last block.
  const auto at = detail::narrow_place<TestType>(37, 71, 36, 70);
  auto bytes = good;
  if constexpr (TestType::scaled) {
    for (const auto& [half, text] : {std::pair{0x7C00, "inf"}, std::pair{0x7E00, "nan"}}) {
      bytes[detail::to_size(at.scale)] = std::byte{0};
      bytes[detail::to_size(at.scale + 1)] = static_cast<std::byte>(half >> 8);
      refused(bytes, std::string("the scale ") + text + " at [1,70], which is not valid in " +
                         TestType::name);
    }
  }
  if constexpr (!std::is_same_v<TestType, Int4>) {
    bytes = good;
    const int code = std::is_same_v<TestType, Int8>       ? -128
                     : std::is_same_v<TestType, BFloat16> ? 0x7F80
                                                          : 0x7C00;
    TestType::set(bytes.data() + at.lane, at.step, static_cast<typename TestType::Code>(code));
    refused(bytes, std::string(code < 0 ? "-128" : "inf") + " at [36,70], which is not valid in " +
                       TestType::name);
  }
  CHECK_THROWS_WITH(load_serving<Loaded>(path, {}, static_cast<MappedCheck>(7)),
                    Contains("check = 7 is no MappedCheck"));
}

#if MOE_HAS_POSIX_FILES
TEST_CASE("served files: a mapped one that is cut or written to gives an error", "[io][weights]") {
  const TemporaryFolder folder;
  const std::string path = folder.file("layer.safetensors");
  save_serving(path, Served<Int8>(make_layer()), Packing::packed);
  const auto size = std::filesystem::file_size(path);
  const auto x = random_matrix<float>(20, 37, 2);
  {
    const auto served = load_serving<Served<Int8>>(path);
    const Matrix<float> y = served.evaluate(x);
    std::filesystem::resize_file(path, size / 2);
    CHECK_THROWS_WITH(served.evaluate(x), Contains("was changed while it is in use: it had"));
  }
  save_serving(path, Served<Int8>(make_layer()), Packing::packed);
  {
    const auto served = load_serving<Served<Int8>>(path);
    // Replaced by its writer: the file that was opened stays what it was.
    const Matrix<float> y = served.evaluate(x);
    save_serving(path, Served<Int8>(make_layer()), Packing::packed);
    CHECK(same_bits(served.evaluate(x), y));
  }
  const auto served = load_serving<Served<Int8>>(path);
  const auto before = std::filesystem::last_write_time(path);
  std::fstream(path, std::ios::in | std::ios::out | std::ios::binary).seekp(200).put('x');
  std::filesystem::last_write_time(path, before + std::chrono::seconds(3));
  CHECK_THROWS_WITH(served.evaluate(x), Contains("was written to"));
  // Nor are its weights saved to another file.
  CHECK_THROWS_WITH(save_serving(folder.file("copy"), served), Contains("was written to"));
  CHECK(!std::filesystem::exists(folder.file("copy")));
}
#endif

TEST_CASE("safetensors writer: bytes that do not fit their shape", "[io]") {
  SafetensorsWriter writer;
  CHECK_THROWS_WITH(writer.add_made_bytes("w", "F99", {2}, [] { return std::vector<std::byte>(); }),
                    Contains("type F99 is not known"));
  CHECK_THROWS_WITH(writer.add_made_bytes("w", "F4", {3}, [] { return std::vector<std::byte>(); }),
                    Contains("does not take a whole number of bytes"));
  writer.add_made_bytes("w", "I8", {3}, [] { return std::vector<std::byte>(2); });
  const TemporaryFolder folder;
  CHECK_THROWS_WITH(writer.write(folder.file("file")),
                    Contains("takes 3 bytes, make() returned 2 bytes"));
}
