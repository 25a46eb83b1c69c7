#include <algorithm>
#include <array>
#include <cstdint>
#include <dnnl.hpp>
#include <map>
#include <optional>
#include <unordered_map>

#include "../clock.hpp"
#include "composed.hpp"

/// \file
/// oneDNN has no layer of this kind, but all of its parts. Each product can be done in three ways,
/// and the fastest is found by trying: the matmul primitive on matrices as they are; dnnl_sgemm,
/// with bias and ReLU in a loop of our own; and matmul on weights brought into the layout that
/// oneDNN prefers, again in each step, since the weights change. The address of the weights matters
/// too, so several are tried.

namespace bench {

namespace {

using Index = std::ptrdiff_t;
using dnnl::memory;

enum Way { plain, sgemm, packed, ways };

/// C (m x n) = A (m x k)·B (k x n), each as stored or transposed. Nothing is set up twice.
class Product {
 public:
  struct Kind {
    bool a_transposed = false;
    bool b_transposed = false;
    bool bias = false;
    bool relu = false;
    bool b_is_weight = false;
  };

  Product(const dnnl::engine& engine, Index m, Index n, Index k, const Kind& kind)
      : m_(m), n_(n), k_(k), kind_(kind) {
    const auto matrix = [](Index rows, Index columns, bool transposed) {
      return memory::desc({rows, columns}, memory::data_type::f32,
                          transposed ? memory::dims{1, rows} : memory::dims{columns, 1});
    };
    const memory::desc a = matrix(m, k, kind.a_transposed);
    const memory::desc b = matrix(k, n, kind.b_transposed);
    const memory::desc c = matrix(m, n, false);
    const memory::desc bias = matrix(1, n, false);
    a_ = memory(a, engine, nullptr);
    b_ = memory(b, engine, nullptr);
    c_ = memory(c, engine, nullptr);
    bias_ = memory(bias, engine, nullptr);
    dnnl::primitive_attr attributes;
    if (kind.relu) {
      dnnl::post_ops operations;
#if DNNL_VERSION_MAJOR >= 3
      operations.append_eltwise(dnnl::algorithm::eltwise_relu, 0.0f, 0.0f);
#else
      operations.append_eltwise(1.0f, dnnl::algorithm::eltwise_relu, 0.0f, 0.0f);
#endif
      attributes.set_post_ops(operations);
    }
    const auto describe = [&](const memory::desc& weights) {
      using Description = dnnl::matmul::primitive_desc;
#if DNNL_VERSION_MAJOR >= 3
      return kind.bias ? Description(engine, a, weights, bias, c, attributes)
                       : Description(engine, a, weights, c, attributes);
#else
      const auto d =
          kind.bias ? dnnl::matmul::desc(a, weights, bias, c) : dnnl::matmul::desc(a, weights, c);
      return Description(d, attributes, engine);
#endif
    };
    plain_ = dnnl::matmul(describe(b));
    arguments_ = {{DNNL_ARG_SRC, a_}, {DNNL_ARG_WEIGHTS, b_}, {DNNL_ARG_DST, c_}};
    if (kind.bias) arguments_.insert({DNNL_ARG_BIAS, bias_});

    if (!kind.b_is_weight) return;
    const auto liked =
        describe(memory::desc({k, n}, memory::data_type::f32, memory::format_tag::any));
    if (liked.weights_desc() == b) return;
    packed_ = dnnl::matmul(liked);
    packed_b_ = memory(liked.weights_desc(), engine);
    pack_ = dnnl::reorder(b_, *packed_b_);
    packed_arguments_ = arguments_;
    packed_arguments_[DNNL_ARG_WEIGHTS] = *packed_b_;
  }

  void run(Way way, dnnl::stream& stream, const float* a, const float* b, const float* bias,
           float* c) {
    if (way == packed && !packed_) way = plain;
    if (way == sgemm) {
      dnnl_sgemm(kind_.a_transposed ? 'T' : 'N', kind_.b_transposed ? 'T' : 'N', m_, n_, k_, 1.0f,
                 a, kind_.a_transposed ? m_ : k_, b, kind_.b_transposed ? k_ : n_, 0.0f, c, n_);
      for (Index i = 0; kind_.bias && i < m_; ++i) add_bias(bias, kind_.relu, n_, c + i * n_);
      return;
    }
    // The primitives read through these handles and write to c alone.
    a_.set_data_handle(const_cast<float*>(a));
    b_.set_data_handle(const_cast<float*>(b));
    if (kind_.bias) bias_.set_data_handle(const_cast<float*>(bias));
    c_.set_data_handle(c);
    if (way == packed) {
      pack_->execute(stream, b_, *packed_b_);
      packed_->execute(stream, packed_arguments_);
    } else {
      plain_.execute(stream, arguments_);
    }
    stream.wait();
  }

 private:
  using Arguments = std::unordered_map<int, memory>;
  Index m_, n_, k_;
  Kind kind_;
  memory a_, b_, c_, bias_;
  dnnl::matmul plain_;
  Arguments arguments_;
  std::optional<dnnl::matmul> packed_;
  std::optional<memory> packed_b_;
  std::optional<dnnl::reorder> pack_;
  Arguments packed_arguments_;
};

class OnednnProducts {
 public:
  static constexpr const char* name = "onednn";
  OnednnProducts(Index width, Index hidden) : d_(width), h_(hidden) {}

  void up(Index n, const float* x, const ExpertArrays<const float*>& expert, float* a) {
    run(0, n, x, expert.up, expert.up_bias, a);
  }
  void down(Index n, const float* a, const ExpertArrays<const float*>& expert, float* y) {
    run(1, n, a, expert.down, expert.down_bias, y);
  }
  void down_input(Index n, const float* dy, const ExpertArrays<const float*>& expert, float* da) {
    run(2, n, dy, expert.down, nullptr, da);
  }
  void up_input(Index n, const float* dpre, const ExpertArrays<const float*>& expert, float* dx) {
    run(3, n, dpre, expert.up, nullptr, dx);
  }
  void down_weight(Index n, const float* a, const float* dy, float* gradient) {
    run(4, n, a, dy, nullptr, gradient);
  }
  void up_weight(Index n, const float* x, const float* dpre, float* gradient) {
    run(5, n, x, dpre, nullptr, gradient);
  }

  /// Tries a whole step in each way, and picks for each of the six products its fastest.
  template <class Step>
  void choose(Step&& step) {
    std::array<std::array<double, ways>, 6> best;
    for (auto& times : best) times.fill(1e30);
    for (int attempt = 0; attempt < 2; ++attempt) {
      for (int way = 0; way < ways; ++way) {
        way_.fill(static_cast<Way>(way));
        seconds_.fill(0);
        step();
        for (std::size_t i = 0; i < 6; ++i) {
          double& time = best[i][static_cast<std::size_t>(way)];
          time = std::min(time, seconds_[i]);
        }
      }
    }
    for (std::size_t i = 0; i < 6; ++i) {
      way_[i] =
          static_cast<Way>(std::min_element(best[i].begin(), best[i].end()) - best[i].begin());
    }
  }

 private:
  using Products = std::array<std::optional<Product>, 6>;

  void run(std::size_t which, Index rows, const float* a, const float* b, const float* bias,
           float* c) {
    std::optional<Product>& product = products_[rows][which];
    if (!product) {
      using Kind = Product::Kind;
      constexpr Kind forward{.bias = true, .b_is_weight = true};
      constexpr Kind forward_relu{.bias = true, .relu = true, .b_is_weight = true};
      constexpr Kind input{.b_transposed = true, .b_is_weight = true};
      constexpr Kind weight{.a_transposed = true};
      struct Form {
        Index m, n, k;
        Kind kind;
      };
      const std::array<Form, 6> forms{{{rows, h_, d_, forward_relu},
                                       {rows, d_, h_, forward},
                                       {rows, h_, d_, input},
                                       {rows, d_, h_, input},
                                       {h_, d_, rows, weight},
                                       {d_, h_, rows, weight}}};
      const Form& form = forms[which];
      product.emplace(engine_, form.m, form.n, form.k, form.kind);
    }
    const double start = seconds_now();
    product->run(way_[which], stream_, a, b, bias, c);
    seconds_[which] += seconds_now() - start;
  }

  Index d_;
  Index h_;
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  std::map<Index, Products> products_;
  std::array<Way, 6> way_{};
  std::array<double, 6> seconds_{};
};

/// The problem with weights of its own, `shift` floats behind a boundary of 64 bytes.
struct ShiftedProblem {
  ShiftedProblem(const Problem& original, std::size_t shift) : problem(original) {
    const auto weights = static_cast<std::size_t>(problem.width * problem.hidden);
    memory.resize(2 * weights * problem.experts.size() + 32);
    const std::size_t past_boundary = reinterpret_cast<std::uintptr_t>(memory.data()) / 4 % 16;
    float* to = memory.data() + (16 - past_boundary) + shift;
    const auto copy = [&](const float*& from) {
      std::copy_n(from, weights, to);
      from = to;
      to += weights;
    };
    for (ExpertArrays<const float*>& expert : problem.experts) {
      copy(expert.up);
      copy(expert.down);
    }
  }

  std::vector<float> memory;
  Problem problem;
};

class OnednnPeer : private ShiftedProblem, public ComposedPeer<OnednnProducts> {
 public:
  OnednnPeer(const Problem& original, std::size_t shift)
      : ShiftedProblem(original, shift), ComposedPeer(ShiftedProblem::problem) {
    step();  // sets everything up
    products().choose([&] { step(); });
  }

  double seconds_of_step() {
    double best = 1e30;
    for (int i = 0; i < 2; ++i) {
      const double start = seconds_now();
      step();
      best = std::min(best, seconds_now() - start);
    }
    return best;
  }
};

}  // namespace

std::unique_ptr<Peer> make_onednn_peer(const Problem& problem) {
  // Seen with oneDNN 2.6 on AVX2, D 512, H 2048, 128 rows: a forward pass took 1.3 to 1.8 times as
  // long where weights start at a multiple of 32 bytes as where they start 16 bytes behind one.
  auto aligned = std::make_unique<OnednnPeer>(problem, 0);
  auto shifted = std::make_unique<OnednnPeer>(problem, 4);
  if (aligned->seconds_of_step() < shifted->seconds_of_step()) return aligned;
  return shifted;
}

}  // namespace bench
