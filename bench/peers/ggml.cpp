#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "narrow_peer.hpp"

namespace bench {

namespace {

class GgmlPeer : public NarrowPeer {
 public:
  GgmlPeer(const std::string& type_name, const NarrowProblem& problem)
      : type_(type_of(type_name)), backend_(ggml_backend_cpu_init()) {
    ggml_backend_cpu_set_n_threads(backend_, static_cast<int>(problem.threads));
    weights_ = context();
    ggml_tensor* up =
        ggml_new_tensor_3d(weights_, type_, problem.width, problem.hidden, problem.experts);
    ggml_tensor* down =
        ggml_new_tensor_3d(weights_, type_, problem.hidden, problem.width, problem.experts);
    weight_bytes_ = static_cast<double>(ggml_nbytes(up) + ggml_nbytes(down));

    passes_ = context();
    ggml_tensor* x = ggml_new_tensor_3d(passes_, GGML_TYPE_F32, problem.width, 1, problem.tokens);
    ggml_tensor* expert = ggml_new_tensor_2d(passes_, GGML_TYPE_I32, 1, problem.tokens);
    ggml_tensor* hidden = ggml_relu(passes_, ggml_mul_mat_id(passes_, up, x, expert));
    ggml_tensor* y = ggml_mul_mat_id(passes_, down, hidden, expert);
    graph_ = ggml_new_graph(passes_);
    ggml_build_forward_expand(graph_, y);

    ggml_backend_buffer_type_t plain = ggml_backend_cpu_buffer_type();
    weight_buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(weights_, repacked(down, y));
    pass_buffer_ = ggml_backend_alloc_ctx_tensors_from_buft(passes_, plain);
    if (weight_buffer_ == nullptr || pass_buffer_ == nullptr) throw std::bad_alloc();
    fill(up);
    fill(down);
    std::vector<float> numbers = random_numbers(problem.width * problem.tokens);
    ggml_backend_tensor_set(x, numbers.data(), 0, ggml_nbytes(x));
    std::vector<std::int32_t> experts;
    for (std::ptrdiff_t t = 0; t < problem.tokens; ++t) {
      experts.push_back(static_cast<std::int32_t>(t % problem.experts));
    }
    ggml_backend_tensor_set(expert, experts.data(), 0, ggml_nbytes(expert));
  }
  ~GgmlPeer() override {
    ggml_backend_buffer_free(pass_buffer_);
    ggml_backend_buffer_free(weight_buffer_);
    ggml_free(passes_);
    ggml_free(weights_);
    ggml_backend_free(backend_);
  }
  GgmlPeer(const GgmlPeer&) = delete;
  GgmlPeer& operator=(const GgmlPeer&) = delete;

  double weight_bytes() const override { return weight_bytes_; }
  void evaluate() override { ggml_backend_graph_compute(backend_, graph_); }

 private:
  static ggml_type type_of(const std::string& name) {
    for (const ggml_type type :
         {GGML_TYPE_F32, GGML_TYPE_BF16, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
      if (name == ggml_type_name(type)) return type;
    }
    throw std::invalid_argument("ggml has no type " + name);
  }
  static ggml_context* context() {
    return ggml_init({ggml_tensor_overhead() * 16 + ggml_graph_overhead(), nullptr, true});
  }
  static std::vector<float> random_numbers(std::ptrdiff_t count) {
    std::vector<float> numbers;
    std::uint32_t state = 1;
    for (std::ptrdiff_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      numbers.push_back(static_cast<float>(state >> 8) * 0x1p-24f - 0.5f);
    }
    return numbers;
  }

  /// The memory in which ggml repacks weights of this type, if its product can use them there.
  ggml_backend_buffer_type_t repacked(ggml_tensor* weight, ggml_tensor* product) const {
    ggml_backend_dev_t device = ggml_backend_get_device(backend_);
    const auto extra =
        reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
            ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
    if (extra != nullptr) {
      for (ggml_backend_buffer_type_t* type = extra(device); type && *type; ++type) {
        weight->buffer = ggml_backend_buft_alloc_buffer(*type, 0);
        const bool usable = ggml_backend_dev_supports_op(device, product);
        ggml_backend_buffer_free(weight->buffer);
        weight->buffer = nullptr;
        if (usable) return *type;
      }
    }
    return ggml_backend_cpu_buffer_type();
  }

  void fill(ggml_tensor* weight) const {
    const std::vector<float> numbers = random_numbers(ggml_nelements(weight));
    std::vector<char> bytes(ggml_nbytes(weight));
    ggml_quantize_chunk(type_, numbers.data(), bytes.data(), 0, ggml_nrows(weight), weight->ne[0],
                        nullptr);
    ggml_backend_tensor_set(weight, bytes.data(), 0, bytes.size());
  }

  ggml_type type_;
  ggml_backend_t backend_;
  ggml_context* weights_ = nullptr;
  ggml_context* passes_ = nullptr;
  ggml_cgraph* graph_ = nullptr;
  ggml_backend_buffer_t weight_buffer_ = nullptr;
  ggml_backend_buffer_t pass_buffer_ = nullptr;
  double weight_bytes_ = 0;
};

}  // namespace

std::unique_ptr<NarrowPeer> make_ggml_peer(const std::string& type, const NarrowProblem& problem) {
  return std::make_unique<GgmlPeer>(type, problem);
}

}  // namespace bench
