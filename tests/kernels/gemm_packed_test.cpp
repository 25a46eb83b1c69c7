#include "moe/kernels/gemm_packed.hpp"

#include <cstdint>
#include <vector>

#include "../support.hpp"
#include "moe/kernels/gemm.hpp"

using namespace moe;
using namespace moe::detail;  // NOLINT(google-build-using-namespace)

namespace {

/// B of whole numbers of a byte each, which only pack() knows.
template <class Scalar>
struct BytePackets {
  const std::int8_t* data;
  Index stride;

  Panel<Scalar> pack(const Strip& strip, Scalar* buffer) const {
    const Index width = strip.packets * packet_size<Scalar>;
    for (Index k = 0; k < strip.depth; ++k) {
      const std::int8_t* row = data + (strip.k + k) * stride + strip.column;
      for (Index j = 0; j < width; ++j) {
        buffer[k * width + j] = j < strip.width ? static_cast<Scalar>(row[j]) : Scalar{0};
      }
    }
    return {buffer, width};
  }
  /// Any place will do for what is only prefetched.
  Prefetch<Scalar> prefetch(const Strip&, Index first, Index count) const {
    CHECK(count > 0);
    CHECK(first >= 0);
    return {reinterpret_cast<const Scalar*>(data), 0, count};
  }
};

}  // namespace

TEMPLATE_TEST_CASE("packed gemm: B may be any source of packets", "[kernels][gemm]", float,
                   double) {
  using S = TestType;
  STATIC_REQUIRE(PacketSource<BytePackets<S>, S>);
  STATIC_REQUIRE_FALSE(PacketSource<MatrixOperand<S>, S>);
  for (const Index rows : {Index{1}, tile_rows, 3 * tile_rows + 1, Index{70}}) {
    for (const Index columns : {Index{1}, tile_columns<S>, 2 * panel_columns<S> + 5}) {
      for (const Index depth : {Index{0}, Index{1}, panel_depth, panel_depth + 9}) {
        CAPTURE(rows, columns, depth);
        std::vector<std::int8_t> bytes(to_size(depth * columns));
        Matrix<S> b(depth, columns);
        for (Index i = 0; i < b.size(); ++i) {
          bytes[to_size(i)] = static_cast<std::int8_t>((i * 37 + 11) % 255 - 127);
          b.data()[i] = static_cast<S>(bytes[to_size(i)]);
        }
        const Matrix<S> a = test::random_matrix<S>(rows, depth, 1);
        const Matrix<S> before = test::random_matrix<S>(rows, columns, 2);
        Matrix<S> expected = before;
        gemm(GemmNN<S>{.a = a, .b = b, .c = expected, .start = Start::accumulate});
        const BytePackets<S> source{bytes.data(), columns};
        Matrix<S> c = before;
        gemm_packed(
            GemmNN<S, BytePackets<S>>{.a = a, .b = source, .c = c, .start = Start::accumulate});
        CHECK(test::same_bits(c, expected));
        const Matrix<double> exact =
            before.template cast<double>() + a.template cast<double>() * b.template cast<double>();
        CHECK(test::relative_error(Matrix<double>(expected.template cast<double>()), exact) <
              test::tolerance<S>);
      }
    }
  }
}
