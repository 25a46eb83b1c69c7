#pragma once

#include <algorithm>
#include <barrier>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <stdexcept>
#include <thread>
#include <vector>

#include "moe/routing/shared_batch.hpp"

/// \file
/// A batch that several processes share, played by threads.

namespace moe::test {

/// Where the threads meet.
class Meeting {
 public:
  explicit Meeting(std::size_t count)
      : barrier_(static_cast<std::ptrdiff_t>(count)), data_(count) {}

  /// Calls f(data) with what every thread brought, in the order of their numbers; no thread goes on
  /// before all have seen it.
  template <class T, class F>
  void share(std::size_t number, std::span<T> own, F&& f) {
    data_[number] = {own.data(), own.size_bytes()};
    barrier_.arrive_and_wait();
    f([this](std::size_t other) {
      return std::span<T>(static_cast<T*>(const_cast<void*>(data_[other].begin)),
                          data_[other].bytes / sizeof(T));
    });
    barrier_.arrive_and_wait();
  }
  std::size_t count() const { return data_.size(); }

 private:
  struct Data {
    const void* begin;
    std::size_t bytes;
  };
  std::barrier<> barrier_;
  std::vector<Data> data_;
};

/// The part of one thread: rows from `first` on, of `rows`, and of the tokens among them.
class PartOfBatch : public SharedBatch {
 public:
  struct Place {
    Index first_row;
    Index rows;
    Index first_token;
    Index tokens;
  };
  PartOfBatch(Meeting& meeting, std::size_t number, const Place& place)
      : meeting_(meeting), number_(number), place_(place) {}

  mutable Index calls = 0;  ///< so far, by this thread
  mutable Index room = 0;   ///< of make_room_to_gather()

  Index processes() const override { return static_cast<Index>(meeting_.count()); }
  Index process() const override { return static_cast<Index>(number_); }
  Index rows() const override { return place_.rows; }
  Index first_row() const override { return place_.first_row; }
  Index tokens() const override { return place_.tokens; }
  Index first_token() const override { return place_.first_token; }
  void sum(std::span<float> numbers) const override { sum_of(numbers); }
  void sum(std::span<double> numbers) const override { sum_of(numbers); }
  void sum(std::span<Index> numbers) const override { sum_of(numbers); }
  void prefix(std::span<Index> numbers) const override {
    ++calls;
    std::vector<Index> before(numbers.size(), 0);
    meeting_.share(number_, numbers, [&](auto&& of) {
      for (std::size_t i = 0; i < number_; ++i) add<Index>(of(i), before);
    });
    std::copy(before.begin(), before.end(), numbers.begin());
  }
  void make_room_to_gather(Index numbers) const override { room = numbers; }
  void gather_agreed(std::span<Index> numbers) const override {
    if (static_cast<Index>(numbers.size()) > room) throw std::logic_error("no room to gather");
    ++calls;
    const std::size_t block = numbers.size() / meeting_.count();
    std::vector<Index> all(numbers.size());
    meeting_.share(number_, numbers, [&](auto&& of) {
      for (std::size_t i = 0; i < meeting_.count(); ++i) {
        std::copy_n(of(i).data() + i * block, block, all.data() + i * block);
      }
    });
    std::copy(all.begin(), all.end(), numbers.begin());
  }

 private:
  /// Adds numbers of another thread, by pointers: with sanitizers most of a test's time would be in operator[].
  template <class T>
  static void add(std::span<const T> numbers, std::vector<T>& sums) {
    T* sum = sums.data();
    for (const T *number = numbers.data(), *end = number + sums.size(); number != end; ++number) {
      *sum++ += *number;
    }
  }
  template <class T>
  void sum_of(std::span<T> numbers) const {
    ++calls;
    std::vector<T> total(numbers.size(), T{0});
    meeting_.share(number_, numbers, [&](auto&& of) {
      for (std::size_t i = 0; i < meeting_.count(); ++i) add<T>(of(i), total);
    });
    std::copy(total.begin(), total.end(), numbers.begin());
  }

  Meeting& meeting_;
  std::size_t number_;
  Place place_;
};

/// The part of the first of several processes, played by itself: all rows are its own, and all are tokens.
class FirstProcess : public SharedBatch {
 public:
  FirstProcess(Index processes, Index rows) : processes_(processes), rows_(rows) {}

  Index processes() const override { return processes_; }
  Index process() const override { return 0; }
  Index rows() const override { return rows_; }
  Index first_row() const override { return 0; }
  Index tokens() const override { return rows_; }
  Index first_token() const override { return 0; }
  void sum(std::span<float>) const override {}
  void sum(std::span<double>) const override {}
  void sum(std::span<Index>) const override {}
  void prefix(std::span<Index> numbers) const override {
    std::fill(numbers.begin(), numbers.end(), Index{0});
  }
  void gather_agreed(std::span<Index>) const override {}

 private:
  Index processes_;
  Index rows_;
};

/// Calls f(number, batch) on a thread for each part; `sizes` are their rows, `valid` the flags of all.
template <class F>
void share_batch(const std::vector<Index>& sizes, F&& f, std::span<const std::uint8_t> valid = {}) {
  Meeting meeting(sizes.size());
  Index rows = 0;
  for (const Index size : sizes) rows += size;
  const auto tokens_before = [&](Index row) {
    if (valid.empty()) return row;
    return static_cast<Index>(row -
                              std::count(valid.begin(), valid.begin() + row, std::uint8_t{0}));
  };
  std::vector<std::thread> threads;
  Index first = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    threads.emplace_back([&, i, first] {
      const PartOfBatch batch(meeting, i, {first, rows, tokens_before(first), tokens_before(rows)});
      f(i, batch);
    });
    first += sizes[i];
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace moe::test
