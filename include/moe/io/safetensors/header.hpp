#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "moe/io/safetensors/entry.hpp"
#include "moe/io/safetensors/messages.hpp"

/// \file
/// The header of a safetensors file. Everything in it is checked.

namespace moe::detail {

inline constexpr std::uint64_t longest_header = 100'000'000;

/// Checks a header while its JSON is parsed, so that values of unknown keys are never stored, however long or
/// deep they are. Throws std::runtime_error for anything that is not allowed.
class SafetensorsHeader : public nlohmann::json_sax<nlohmann::json> {
 public:
  /// `path` is for messages and must outlive this.
  explicit SafetensorsHeader(const std::string& path) : path_(path) {}

  std::map<std::string, SafetensorsEntry> tensors;
  std::map<std::string, std::string> metadata;

  bool start_object(std::size_t) override {
    if (place_ == Place::outside) {
      place_ = Place::top;
    } else if (place_ == Place::top) {
      place_ = in_metadata_ ? Place::metadata : Place::tensor;
      seen_ = {};
      offsets_.clear();
    } else if (!skip_into()) {
      refuse("an object");
    }
    return true;
  }

  bool key(std::string& key) override {
    if (place_ == Place::top) {
      begin_entry(key);
    } else if (place_ == Place::metadata) {
      const auto [text, is_new] = metadata.try_emplace(key);
      if (!is_new) fail_file(path_, "has metadata \"", plain(key), "\" twice");
      text_ = text;
    } else if (place_ == Place::tensor) {
      key_ = std::find(keys.begin(), keys.end(), key);
      if (key_ == keys.end()) return true;
      bool& seen = seen_[key_index()];
      if (seen) fail_file(path_, "has ", this_tensor(), " with \"", *key_, "\" twice");
      seen = true;
    }
    return true;
  }

  bool end_object() override {
    if (skip_out_of()) return true;
    if (place_ == Place::tensor) finish_tensor();
    place_ = place_ == Place::top ? Place::outside : Place::top;
    return true;
  }

  bool start_array(std::size_t) override {
    if (skip_into()) return true;
    if (place_ != Place::tensor || *key_ == dtype) refuse("a list");
    place_ = Place::list;
    return true;
  }
  bool end_array() override {
    if (!skip_out_of()) place_ = Place::tensor;
    return true;
  }

  bool string(std::string& text) override {
    if (is_skipped()) return true;
    if (place_ == Place::metadata) {
      text_->second = text;
    } else if (place_ == Place::tensor && *key_ == dtype) {
      entry_->second.type = text;
    } else {
      refuse("a string");
    }
    return true;
  }

  bool number_unsigned(std::uint64_t number) override {
    if (is_skipped()) return true;
    if (place_ != Place::list) refuse(std::to_string(number));
    std::vector<std::uint64_t>& numbers = *key_ == shape ? entry_->second.shape : offsets_;
    // No tensor has more dimensions; a list of millions of them would only take memory.
    if (numbers.size() == 64) {
      fail_file(path_, this_tensor(), ": ", *key_, " has more than 64 numbers");
    }
    numbers.push_back(number);
    return true;
  }

  bool number_integer(std::int64_t number) override {
    return is_skipped() || refuse(std::to_string(number));
  }
  bool number_float(double, const std::string& text) override {
    return is_skipped() || refuse(plain(text));
  }
  bool boolean(bool) override { return is_skipped() || refuse("a boolean"); }
  bool null() override {
    return is_skipped() || (place_ == Place::top && in_metadata_) || refuse("null");
  }
  bool binary(nlohmann::json::binary_t&) override { return is_skipped() || refuse("bytes"); }

  bool parse_error(std::size_t, const std::string&,
                   const nlohmann::json::exception& error) override {
    fail_file(path_, "has a header that is not JSON: ", plain(error.what()));
  }

 private:
  enum class Place { outside, top, metadata, tensor, list };
  static constexpr std::string_view dtype = "dtype";
  static constexpr std::string_view shape = "shape";
  static constexpr std::array keys{dtype, shape, std::string_view("data_offsets")};

  /// Begins the metadata or a tensor. A name that occurs twice is refused: either could be meant.
  void begin_entry(const std::string& name) {
    in_metadata_ = name == "__metadata__";
    if (in_metadata_) {
      if (std::exchange(has_metadata_, true)) fail_file(path_, "has \"__metadata__\" twice");
      return;
    }
    const auto [entry, is_new] = tensors.try_emplace(name);
    if (!is_new) fail_file(path_, "has ", tensor_named(name), " twice");
    entry_ = entry;
  }

  /// Whether the next value is that of an unknown key, or a part of it.
  bool is_skipped() const {
    return skipped_depth_ > 0 || (place_ == Place::tensor && key_ == keys.end());
  }
  bool skip_into() {
    if (!is_skipped()) return false;
    ++skipped_depth_;
    return true;
  }
  bool skip_out_of() {
    if (skipped_depth_ == 0) return false;
    --skipped_depth_;
    return true;
  }

  /// Throws: a value of this kind is not allowed here.
  bool refuse(std::string_view what) const {
    if (place_ == Place::top) {
      if (in_metadata_) fail_file(path_, "has metadata that is not an object");
      fail_file(path_, this_tensor(), " is not an object");
    }
    if (place_ == Place::metadata) {
      fail_file(path_, "has metadata \"", plain(text_->first), "\" that is not a string");
    }
    if (place_ == Place::list) {
      fail_file(path_, this_tensor(), ": ", *key_, " has ", what,
                ", must be a whole number of at least 0");
    }
    fail_file(path_, this_tensor(), ": ", *key_,
              *key_ == dtype ? " is not a string" : " is not a list");
  }

  void finish_tensor() {
    SafetensorsEntry& entry = entry_->second;
    if (std::find(seen_.begin(), seen_.end(), false) != seen_.end()) {
      fail_file(path_, this_tensor(), " must have dtype, shape and data_offsets");
    }
    if (offsets_.size() != 2) {
      fail_file(path_, this_tensor(), ": data_offsets has ", offsets_.size(), " numbers, not 2");
    }
    entry.begin = offsets_[0];
    entry.end = offsets_[1];
    if (entry.begin > entry.end) {
      fail_file(path_, this_tensor(), ": data_offsets descends from ", entry.begin, " to ",
                entry.end);
    }
    if (const std::uint64_t bits = element_bits(entry.type); bits > 0) check_size(entry, bits);
  }

  void check_size(const SafetensorsEntry& entry, std::uint64_t element) const {
    const auto bits = tensor_bits(entry.shape, element);
    if (!bits) {
      fail_file(path_, this_tensor(), ": shape ", detail::to_string(entry.shape),
                " has too many bytes to count in 64 bits");
    }
    if (*bits % 8 != 0) {
      fail_file(path_, this_tensor(), ": shape ", detail::to_string(entry.shape), " of ",
                entry.type, " takes ", *bits, " bits, must be a multiple of 8");
    }
    if (entry.end - entry.begin != *bits / 8) {
      fail_file(path_, this_tensor(), ": shape ", detail::to_string(entry.shape), " of ",
                entry.type, " takes ", *bits / 8, " bytes, data_offsets gives ",
                entry.end - entry.begin);
    }
  }

  std::string this_tensor() const { return tensor_named(entry_->first); }
  std::size_t key_index() const { return static_cast<std::size_t>(key_ - keys.begin()); }

  const std::string& path_;
  Place place_ = Place::outside;
  bool in_metadata_ = false;  // the value at the top is the metadata's, not a tensor's
  bool has_metadata_ = false;
  std::uint64_t skipped_depth_ = 0;  // open lists and objects of a key that is not known
  std::map<std::string, SafetensorsEntry>::iterator entry_;
  std::map<std::string, std::string>::iterator text_;
  decltype(keys)::const_iterator key_ = keys.begin();
  std::array<bool, keys.size()> seen_{};
  std::vector<std::uint64_t> offsets_;
};

/// Throws unless the tensors, sorted by offset, follow each other without a gap and end with the data, which
/// has `size` bytes.
inline void check_offsets(const std::string& path,
                          const std::map<std::string, SafetensorsEntry>& tensors,
                          std::uint64_t size) {
  using Tensor = std::map<std::string, SafetensorsEntry>::value_type;
  std::vector<const Tensor*> order;
  order.reserve(tensors.size());
  for (const Tensor& tensor : tensors) order.push_back(&tensor);
  std::sort(order.begin(), order.end(), [](const Tensor* a, const Tensor* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  std::uint64_t end = 0;
  for (const Tensor* named : order) {
    const auto& [name, tensor] = *named;
    if (tensor.begin != end) {
      fail_file(path, tensor_named(name), " begins at byte ", tensor.begin,
                tensor.begin < end ? ", within another that ends at " : ", after a hole from ",
                end);
    }
    if (tensor.end > size) {
      fail_file(path, tensor_named(name), " ends at byte ", tensor.end, " of data, the file has ",
                size);
    }
    end = tensor.end;
  }
  require_file(end == size, path, "has ", size, " bytes of data, its tensors end at ", end);
}

/// Reads a header that is followed by `data` bytes of tensors. This takes the time to sort the
/// tensors and about 200 bytes of memory for each of them.
inline void parse_header(const std::string& text, std::uint64_t data, SafetensorsHeader& header,
                         const std::string& path) {
  require_file(!text.empty() && text.front() == '{', path,
               "has a header that does not begin with {");
  // The parser would take a zero byte for the end of the text. JSON has none: it writes \u0000.
  const std::size_t zero = text.find('\0');
  require_file(zero == std::string::npos, path, "has a header that is not JSON: byte ", zero,
               " is zero");
  nlohmann::json::sax_parse(text, &header);
  check_offsets(path, header.tensors, data);
}

}  // namespace moe::detail
