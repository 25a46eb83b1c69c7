#pragma once

#include <algorithm>
#include <barrier>
#include <cstddef>
#include <exception>
#include <span>
#include <thread>
#include <vector>

#include "moe/routing/global_batch.hpp"

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

/// The part of one thread: `own` tokens from `first` on, of `tokens`.
template <class Scalar>
class PartOfBatch : public GlobalBatch<Scalar> {
 public:
  PartOfBatch(Meeting& meeting, std::size_t number, Index first, Index tokens)
      : meeting_(meeting), number_(number), first_(first), tokens_(tokens) {}

  Index tokens() const override { return tokens_; }
  Index first_token() const override { return first_; }
  void sum(std::span<Scalar> numbers) const override { sum_of(numbers); }
  void sum(std::span<Index> numbers) const override { sum_of(numbers); }
  void gather(std::span<const Scalar> numbers, Index, std::span<Scalar> all) const override {
    gather_of(numbers, all);
  }
  void gather(std::span<const Index> numbers, Index, std::span<Index> all) const override {
    gather_of(numbers, all);
  }

 private:
  template <class T>
  void sum_of(std::span<T> numbers) const {
    std::vector<T> total(numbers.size(), T{0});
    meeting_.share(number_, numbers, [&](auto&& of) {
      for (std::size_t i = 0; i < meeting_.count(); ++i) {
        for (std::size_t j = 0; j < total.size(); ++j) total[j] += of(i)[j];
      }
    });
    std::copy(total.begin(), total.end(), numbers.begin());
  }
  template <class T>
  void gather_of(std::span<const T> numbers, std::span<T> all) const {
    meeting_.share(number_, numbers, [&](auto&& of) {
      auto to = all.begin();
      for (std::size_t i = 0; i < meeting_.count(); ++i) {
        to = std::copy(of(i).begin(), of(i).end(), to);
      }
    });
  }

  Meeting& meeting_;
  std::size_t number_;
  Index first_, tokens_;
};

/// Calls f(number, batch) on a thread for each part; `sizes` are their tokens.
template <class Scalar, class F>
void share_batch(const std::vector<Index>& sizes, F&& f) {
  Meeting meeting(sizes.size());
  Index tokens = 0;
  for (const Index size : sizes) tokens += size;
  std::vector<std::thread> threads;
  Index first = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    threads.emplace_back([&, i, first] {
      const PartOfBatch<Scalar> batch(meeting, i, first, tokens);
      f(i, batch);
    });
    first += sizes[i];
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace moe::test
