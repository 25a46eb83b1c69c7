#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "moe/io/pretrained/model_config.hpp"
#include "moe/io/safetensors/messages.hpp"
#include "moe/io/safetensors/reader.hpp"

namespace moe::io {

/// The tensors in a folder in which transformers saved a model: all in model.safetensors, or in several files
/// (shards) that are listed in model.safetensors.index.json.
///
/// The constructor opens every file and checks its header. It throws std::runtime_error, which
/// names the file and, if one is the cause, the tensor, if the folder has neither file, the index
/// or a file of tensors is damaged, a shard is missing, a name in the index leads out of the
/// folder, or a tensor is not in the file that the index names. Tensors of a shard that are not in
/// the index are ignored. const members may be called by several threads at once.
class Checkpoint {
 public:
  /// Opens the files of a folder.
  explicit Checkpoint(const std::string& folder) : folder_(folder) {
    const std::string whole = inside("model.safetensors");
    const std::string index = inside("model.safetensors.index.json");
    if (std::filesystem::exists(index)) {
      read_index(index);
    } else if (std::filesystem::exists(whole)) {
      files_.emplace_back(whole);
      for (const auto& [name, tensor] : files_[0].tensors()) file_of_[name] = 0;
    } else {
      detail::fail_file(folder, "has neither model.safetensors nor model.safetensors.index.json");
    }
  }

  const std::string& folder() const { return folder_; }  ///< as given to the constructor
  bool has(const std::string& name) const {
    return file_of_.contains(name);
  }  ///< whether there is a tensor of this name

  /// The file of a tensor. Throws std::runtime_error if there is no tensor of this name.
  const SafetensorsFile& file_of(const std::string& name) const {
    const auto found = file_of_.find(name);
    if (found == file_of_.end()) {
      detail::fail_file(folder_, "has no ", detail::tensor_named(name));
    }
    return files_[found->second];
  }

  /// All names that begin with `prefix`, sorted.
  std::vector<std::string> names(const std::string& prefix = {}) const {
    std::vector<std::string> names;
    for (auto named = file_of_.lower_bound(prefix);
         named != file_of_.end() && named->first.starts_with(prefix); ++named) {
      names.push_back(named->first);
    }
    return names;
  }

 private:
  std::string inside(const std::string& name) const {
    return (std::filesystem::path(folder_) / name).string();
  }

  void read_index(const std::string& path) {
    const nlohmann::json index = detail::read_json(path);
    const auto map = index.is_object() ? index.find("weight_map") : index.end();
    if (map == index.end() || !map->is_object()) {
      detail::fail_file(path, "has no object \"weight_map\"");
    }
    std::map<std::string, std::size_t> opened;
    for (const auto& [name, value] : map->items()) {
      if (!value.is_string()) {
        detail::fail_file(path, detail::tensor_named(name),
                          " must have the name of a file, a string");
      }
      const std::string file = value.get<std::string>();
      // Only a plain name cannot lead out of the folder.
      if (file.empty() || file == "." || file == ".." ||
          file.find_first_of(std::string("/\\:\0", 4)) != std::string::npos) {
        detail::fail_file(path, detail::tensor_named(name), " is in file \"", detail::plain(file),
                          "\", which must be the name of a file in the same folder");
      }
      const auto [place, is_new] = opened.try_emplace(file, files_.size());
      if (is_new) files_.emplace_back(inside(file));
      const SafetensorsFile& shard = files_[place->second];
      if (!shard.tensors().contains(name)) {
        detail::fail_file(path, detail::tensor_named(name), " is listed in ", shard.path(),
                          ", which has no tensor of that name");
      }
      file_of_[name] = place->second;
    }
  }

  std::string folder_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::size_t> file_of_;
};

}  // namespace moe::io
