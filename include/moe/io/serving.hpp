#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "moe/io/safetensors.hpp"
#include "moe/weights/serving_layer.hpp"

/// \file
/// Files of layers with narrow weights. A plain file can be read by other programs too. Its tensors, with the
/// names of the layer's parameters:
///
///     bfloat16   experts.0.up.weight BF16 [K,N]
///     float16    experts.0.up.weight F16 [K,N]
///     int8       experts.0.up.weight I8 [K,N], experts.0.up.weight.scale F16 [ceil(K/32),N]
///     int4       experts.0.up.weight U8 [ceil(K/2),N], two successive rows in a byte, the first
///                in its low half, stored as q + 8; the scale as in int8
///
/// A packed file has the weights in their layout in memory (U8 in one dimension). If that is the layout of
/// this machine, the file is mapped: opening it reads only the header, the gate and the biases.
///
/// The metadata has the configuration, "serving.format", and in a packed file "serving.layout".

namespace moe {

/// The layout of weights in a file.
enum class Packing {
  plain,  ///< for other programs too
  packed  ///< as in memory, so that the file can be mapped
};

/// What is checked of the weights of a mapped file when it is opened.
enum class MappedCheck {
  none,     ///< nothing, so that nothing of them is read
  weights,  ///< every weight and scale, which reads the whole file
};

namespace detail {

inline constexpr std::string_view packed_version = "version 1, lanes ";
/// The layout of a machine with packets of `lanes` floats, as text in a packed file.
inline std::string packed_layout(Index lanes) {
  return std::string(packed_version) + std::to_string(lanes);
}

/// The element type of plain codes.
template <class Format>
constexpr std::string_view code_type() {
  if constexpr (std::is_same_v<Format, BFloat16>) return "BF16";
  if constexpr (std::is_same_v<Format, Float16>) return "F16";
  if constexpr (std::is_same_v<Format, Int8>) return "I8";
  if constexpr (std::is_same_v<Format, Int4>) return "U8";
}
/// The number of successive rows whose codes share one element of a plain file.
template <class Format>
inline constexpr Index codes_in_element = std::is_same_v<Format, Int4> ? 2 : 1;

inline std::vector<std::uint64_t> shape_of(Index rows, Index columns) {
  return {static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(columns)};
}
template <class Format>
std::vector<std::uint64_t> code_shape(Index rows, Index columns) {
  constexpr Index together = codes_in_element<Format>;
  return shape_of((rows + together - 1) / together, columns);
}
template <class Format>
std::vector<std::uint64_t> scale_shape(Index rows, Index columns) {
  return shape_of(narrow_blocks<Format>(rows), columns);
}

template <class Format>
std::vector<std::byte> plain_codes(const NarrowMatrix<Format>& weights) {
  using Code = typename Format::Code;
  constexpr Index together = codes_in_element<Format>;
  const Index elements = (weights.rows() + together - 1) / together;
  std::vector<std::byte> bytes(to_size(elements * weights.cols()) * sizeof(Code));
  for (Index i = 0; i < elements; ++i) {
    for (Index j = 0; j < weights.cols(); ++j) {
      std::byte* to = bytes.data() + to_size(i * weights.cols() + j) * sizeof(Code);
      if constexpr (together == 2) {
        const int low = weights.code(2 * i, j) + 8;
        const int high = 2 * i + 1 < weights.rows() ? weights.code(2 * i + 1, j) + 8 : 8;
        *to = static_cast<std::byte>(low | high << 4);
      } else {
        const Code code = weights.code(i, j);
        std::memcpy(to, &code, sizeof(code));
      }
    }
  }
  return bytes;
}

template <class Format>
std::vector<std::byte> plain_scales(const NarrowMatrix<Format>& weights) {
  std::vector<std::byte> bytes;
  for (Index k = 0; k < weights.rows(); k += Format::block) {
    for (Index j = 0; j < weights.cols(); ++j) {
      std::byte two[2];
      store_half(weights.scale(k, j), two);
      bytes.insert(bytes.end(), two, two + 2);
    }
  }
  return bytes;
}

/// The bytes of a tensor, which must have this type and shape.
inline std::vector<std::byte> checked_bytes(const SafetensorsFile& file, const std::string& name,
                                            std::string_view type,
                                            const std::vector<std::uint64_t>& shape) {
  const auto& tensor = file.tensor(name);
  if (tensor.type != type || tensor.shape != shape) {
    fail_file(file.path(), tensor_named(name), " is ", plain(tensor.type), " ",
              detail::to_string(tensor.shape), ", must be ", type, " ", detail::to_string(shape));
  }
  std::vector<std::byte> bytes(tensor.end - tensor.begin);
  file.read_bytes(name, 0, bytes);
  return bytes;
}

/// Whether a code stands for a weight of the format.
template <class Format>
bool is_code(typename Format::Code code) {
  if constexpr (Format::scaled) return code != -128;  // every 4-bit code of Int4 is valid
  return std::isfinite(Format::decode(code, 1));
}

/// Throws for a code or a scale that is not valid in the format; `row` is the row of the code, or the block
/// of rows of the scale.
template <class Format>
[[noreturn]] void refuse_weight(const SafetensorsFile& file, const std::string& name, Index row,
                                Index column, const char* what, float value) {
  fail_file(file.path(), tensor_named(name), " has ", what, value, " at [", row, ",", column,
            "], which is not valid in ", Format::name);
}
template <class Format>
typename Format::Code checked_code(const SafetensorsFile& file, const std::string& name, Index row,
                                   Index column, typename Format::Code code) {
  if (!is_code<Format>(code)) {
    refuse_weight<Format>(file, name, row, column, "", Format::decode(code, 1));
  }
  return code;
}
template <class Format>
float checked_scale(const SafetensorsFile& file, const std::string& name, Index block, Index column,
                    float scale) {
  if (!std::isfinite(scale)) {
    refuse_weight<Format>(file, name, block, column, "the scale ", scale);
  }
  return scale;
}

/// Throws std::runtime_error, with file and tensor, if a packed matrix has a code or a scale that no weight
/// is packed to.
template <class Format>
void check_packed(const NarrowMatrix<Format>& matrix, const SafetensorsFile& file,
                  const std::string& name) {
  for (Index k = 0; k < matrix.rows(); ++k) {
    for (Index j = 0; j < matrix.cols(); ++j) {
      if (Format::scaled && k % Format::block == 0) {
        checked_scale<Format>(file, name, k / Format::block, j, matrix.scale(k, j));
      }
      checked_code<Format>(file, name, k, j, matrix.code(k, j));
    }
  }
}

/// Throws std::runtime_error if a code or a scale gives a weight that is not finite, or a code is not valid
/// in the format.
template <class Format>
NarrowMatrix<Format> read_plain(const SafetensorsFile& file, const std::string& name, Index rows,
                                Index columns) {
  using Code = typename Format::Code;
  const std::vector<std::byte> codes =
      checked_bytes(file, name, code_type<Format>(), code_shape<Format>(rows, columns));
  std::vector<std::byte> scales;
  const std::string scale_name = name + ".scale";
  if constexpr (Format::scaled) {
    scales = checked_bytes(file, scale_name, "F16", scale_shape<Format>(rows, columns));
  }
  return NarrowMatrix<Format>(
      rows, columns,
      [&](Index k, Index j) {
        if constexpr (codes_in_element<Format> == 2) {
          const int both = std::to_integer<int>(codes[to_size(k / 2 * columns + j)]);
          return static_cast<Code>((both >> (k % 2 * 4) & 15) - 8);
        } else {
          Code code = 0;
          std::memcpy(&code, codes.data() + to_size(k * columns + j) * sizeof(Code), sizeof(code));
          return checked_code<Format>(file, name, k, j, code);
        }
      },
      [&](Index block, Index j) {
        return checked_scale<Format>(file, scale_name, block, j,
                                     load_half(scales.data() + 2 * to_size(block * columns + j)));
      });
}

/// A packed tensor. If `mapped` is not null and the layout is that of this machine, it refers to the mapped
/// file and is checked only with MappedCheck::weights. Throws as check_packed() does.
template <class Format>
NarrowMatrix<Format> read_packed(const SafetensorsFile& file, const std::string& name, Index rows,
                                 Index columns, Index lanes,
                                 const std::shared_ptr<const std::byte>& mapped,
                                 MappedCheck check) {
  const auto size = static_cast<std::uint64_t>(narrow_bytes<Format>(rows, columns, lanes));
  const std::vector<std::uint64_t> shape{(size + 63) / 64 * 64};
  if (mapped && lanes == lane_count) {
    const auto& tensor = file.tensor(name);
    if (tensor.type == "U8" && tensor.shape == shape) {
      NarrowMatrix<Format> matrix(rows, columns, {mapped, mapped.get() + file.place_of(name)});
      if (check == MappedCheck::weights) check_packed(matrix, file, name);
      return matrix;
    }
  }
  const std::vector<std::byte> bytes = checked_bytes(file, name, "U8", shape);
  const auto place = [&](Index k, Index j) {
    return narrow_place<Format>(rows, columns, k, j, lanes);
  };
  return NarrowMatrix<Format>(
      rows, columns,
      [&](Index k, Index j) {
        const NarrowPlace at = place(k, j);
        return checked_code<Format>(file, name, k, j, Format::get(bytes.data() + at.lane, at.step));
      },
      [&](Index b, Index j) {
        return checked_scale<Format>(file, name, b, j,
                                     load_half(bytes.data() + place(b * Format::block, j).scale));
      });
}

/// The number of lanes of the machine that packed a file; 0 for a plain file.
inline Index packed_lanes(const SafetensorsFile& file) {
  const auto found = file.metadata().find("serving.layout");
  if (found == file.metadata().end()) return 0;
  for (const Index lanes : {1, 2, 4, 8, 16, 32}) {
    if (found->second == packed_layout(lanes)) return lanes;
  }
  fail_file(file.path(), "has the layout \"", plain(found->second), "\", must be \"",
            packed_layout(lane_count), '"');
}

}  // namespace detail

/// Saves a layer with narrow weights. Throws as SafetensorsWriter::write() does, and std::runtime_error, with
/// nothing written, if the layer's weights are in a mapped file that has changed.
template <class Layer, class Format>
void save_serving(const std::string& path, const ServingLayer<Layer, Format>& layer,
                  Packing packing = Packing::plain) {
  layer.check_weights();
  SafetensorsWriter writer;
  detail::SafetensorsMetadata config;
  detail::write_config(layer.config(), "config.", config);
  for (const auto& [key, text] : config) writer.set_metadata(key, text);
  writer.set_metadata("serving.format", Format::name);
  if (packing == Packing::packed) {
    writer.set_metadata("serving.layout", detail::packed_layout(detail::lane_count));
  }
  writer.add_parameters(layer);
  Index e = 0;
  for (const auto& expert : layer.experts()) {
    const std::string prefix = "experts." + std::to_string(e++) + ".";
    NarrowFeedForward<Format>::visit_weights(
        expert.network(), [&](std::string_view part, const auto& weight) {
          const NarrowMatrix<Format>& matrix = weight.matrix;
          const std::string name = prefix + std::string(part);
          if (packing == Packing::packed) {
            writer.add_aligned_bytes(name, {matrix.data(), detail::to_size(matrix.bytes())});
            return;
          }
          writer.add_made_bytes(name, detail::code_type<Format>(),
                                detail::code_shape<Format>(matrix.rows(), matrix.cols()),
                                [&matrix] { return detail::plain_codes(matrix); });
          if constexpr (Format::scaled) {
            writer.add_made_bytes(name + ".scale", "F16",
                                  detail::scale_shape<Format>(matrix.rows(), matrix.cols()),
                                  [&matrix] { return detail::plain_scales(matrix); });
          }
        });
  }
  writer.write(path);
}

/// Loads a layer with narrow weights from its file. It can also load the file of a layer of floats
/// (save_module()), and rounds its experts one after the other, so that only one expert of floats is in
/// memory at a time:
///
///     using Served = moe::ServingLayer<Layer, moe::Int8>;
///     const auto served = moe::load_serving<Served>("layer.safetensors");
///
/// A packed file is mapped if the system supports that: its weights are used in place, and experts that
/// get no tokens are not read. Their weights are not checked unless `check` is MappedCheck::weights: the
/// scales are among the codes, so a check of them alone would read as many pages. If such a file is written
/// to or cut while it is in use, the next pass throws std::runtime_error, but a pass that is running may end
/// the program by a signal. So replace a file (as the library's writer does) instead of writing over it.
///
/// Throws std::runtime_error, which names the file and, if one is the cause, the tensor or field,
/// if the file cannot be read or is damaged, if a tensor is missing, has another type or shape or a
/// value that is not a weight of the format, if a field of the configuration is missing, has a text
/// that is not a value of its type or is not in Serving::Config, or if the file is in another
/// format; and std::invalid_argument if a weight cannot be rounded, the configuration is out of
/// range, or the format does not support the activations of `options`.
template <class Serving>
Serving load_serving(const std::string& path, const NarrowOptions& options = {},
                     MappedCheck check = MappedCheck::none) {
  static_assert(detail::is_serving<Serving>,
                "load_serving makes a moe::ServingLayer<Layer, Format>: name that, not the Layer");
  detail::require(check == MappedCheck::none || check == MappedCheck::weights,
                  "load_serving: check = ", static_cast<int>(check), " is no MappedCheck");
  using Format = typename Serving::Format;
  using Config = typename Serving::Config;
  using Gate = typename Serving::Gate;
  using Expert = typename Serving::Expert;
  using Network = typename Expert::Network;
  static_assert(detail::is_all_named<typename Gate::Config>(),
                "a layer is made from the configuration in its file: write visit_fields for the "
                "gate's Config");
  auto file = std::make_shared<const SafetensorsFile>(path);
  auto config = detail::config_to_fill<Config>();
  const std::string config_prefix = "config.";
  if (!file->metadata().contains("config.width")) {
    detail::fail_file(
        path,
        "has no metadata \"config.width\": load_serving() reads the file of one "
        "layer, saved by save_module() or save_serving(), not that of a model around it");
  }
  detail::SavedConfig(path, file->metadata(), config_prefix).read(config);
  const auto said = file->metadata().find("serving.format");
  const bool is_wide = said == file->metadata().end();
  if (!is_wide && said->second != Format::name) {
    detail::fail_file(path, "has weights in ", detail::plain(said->second), ", must be ",
                      Format::name);
  }
  const Index lanes = detail::packed_lanes(*file);
  const std::shared_ptr<const std::byte> mapped = lanes > 0 ? file->map() : nullptr;

  Gate gate(config.gate, detail::gate_seed(config.seed));
  file->read_parameters(gate, "gate.");
  std::vector<Expert> experts;
  for (Index e = 0; e < gate.experts() - config.identity_experts; ++e) {
    const std::string prefix = "experts." + std::to_string(e) + ".";
    if (is_wide) {
      auto wide = FeedForward<float>::zeros(config.expert);
      file->read_parameters(wide, prefix);
      experts.emplace_back(Network(wide, options, prefix), config.width);
      continue;
    }
    const auto weight = [&](std::string_view part, Index rows, Index columns) {
      const std::string name = prefix + std::string(part);
      return lanes > 0
                 ? detail::read_packed<Format>(*file, name, rows, columns, lanes, mapped, check)
                 : detail::read_plain<Format>(*file, name, rows, columns);
    };
    const auto bias = [&](std::string_view part, Index size) {
      Matrix<float> values(1, size);
      file->read(prefix + std::string(part), values);
      return values;
    };
    experts.emplace_back(Network(config.expert, options, weight, bias), config.width);
  }
  std::function<void()> unchanged;
  if (mapped) unchanged = [file] { file->check_unchanged(); };
  return Serving(config, std::move(gate), std::move(experts), options, std::move(unchanged));
}

}  // namespace moe
