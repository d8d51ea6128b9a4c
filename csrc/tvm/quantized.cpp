// Quantized matrices, packed as pack_matrix does it, as TVM-FFI functions, outputs last (destination passing).
#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Call;
using portlm::tvm::guarded;
using portlm::tvm::kAny;
using portlm::tvm::Tensor;

namespace {

constexpr int64_t kMostRows = int64_t{1} << 31;  // of a matrix, or columns: so that no product of sizes overflows
constexpr int64_t kAlignment = 64;

// The numbers behind a packed matrix: rows, columns, group, bits, has_zeros.
struct Sizes {
  int64_t rows, K, group, bits;
  bool has_zeros;
};

// Checked, so that a kernel that trusts them reads inside of the matrix.
Sizes sizes(const Call& call, const Tensor& packed, int32_t first) {
  const Sizes found{call.integer(first, "rows"), call.integer(first + 1, "columns"), call.integer(first + 2, "group"),
                    call.integer(first + 3, "bits"), call.integer(first + 4, "has_zeros") != 0};
  if (found.bits != 4 && found.bits != 8) call.fail("bits must be 4 or 8, got " + std::to_string(found.bits));
  if (found.group != 32 && found.group != 64 && found.group != 128)
    call.fail("group must be 32, 64 or 128, got " + std::to_string(found.group));
  if (found.rows < 0 || found.rows > kMostRows || found.K < 0 || found.K > kMostRows || found.K % found.group)
    call.fail("a matrix of " + std::to_string(found.rows) + " rows and " + std::to_string(found.K) +
              " columns does not have groups of " + std::to_string(found.group));
  const int64_t wanted = kernels().packed_size(found.rows, found.K, found.group, found.bits, found.has_zeros);
  if (packed.size(0) != wanted)
    call.fail("packed must have " + std::to_string(wanted) + " bytes, got " + std::to_string(packed.size(0)));
  if (reinterpret_cast<uintptr_t>(packed.data<uint8_t>()) % kAlignment)
    call.fail("packed must begin at a multiple of 64 bytes");
  return found;
}

using Kernel = decltype(portlm::Kernels::packed_linear);

// y = activation(x W^T + bias), with every shape checked; bias may be nullptr.
void apply(const Call& call, Kernel kernel, const Tensor* bias, int32_t first) {
  const auto x = call.f32(0, "x"), y = call.f32(first + 6, "y");
  const auto packed = call.u8(1, "packed", 1);
  const Sizes s = sizes(call, packed, first);
  const int64_t activation = call.integer(first + 5, "activation");
  if (activation < 0 || activation > 3) call.fail("activation must be 0 to 3, got " + std::to_string(activation));
  call.expect_last(x, s.K);
  call.expect_last(y, s.rows);
  if (bias) call.expect_shape(*bias, {s.rows});
  if (x.rows() != y.rows()) call.fail("x and y must have the same number of rows");
  kernel(x.data<float>(), packed.data<uint8_t>(), bias ? bias->data<float>() : nullptr, y.data<float>(), x.rows(), s.rows, s.K,
         s.group, s.bits, s.has_zeros, static_cast<int>(activation));
}

void with_bias(const Call& call, Kernel kernel) {
  call.expect_count(10);
  const auto bias = call.f32(2, "bias", 1);
  apply(call, kernel, &bias, 3);
}

void without_bias(const Call& call, Kernel kernel) {
  call.expect_count(9);
  apply(call, kernel, nullptr, 2);
}

}  // namespace

// (x (..., K), packed (bytes), bias (N), N, K, group, bits, has_zeros, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(packed_linear) {
  return guarded("packed_linear", args, count, [](const Call& call) { with_bias(call, kernels().packed_linear); });
}

// (x (..., K), packed (bytes), N, K, group, bits, has_zeros, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(packed_linear_no_bias) {
  return guarded("packed_linear_no_bias", args, count, [](const Call& call) { without_bias(call, kernels().packed_linear); });
}

// Both with activations of 8 bits.
PORTLM_TVM_FUNCTION(packed_linear_a8) {
  return guarded("packed_linear_a8", args, count, [](const Call& call) { with_bias(call, kernels().packed_linear_a8); });
}

PORTLM_TVM_FUNCTION(packed_linear_a8_no_bias) {
  return guarded("packed_linear_a8_no_bias", args, count,
                 [](const Call& call) { without_bias(call, kernels().packed_linear_a8); });
}

// (ids (B, T) int64, packed (bytes), V, K, group, bits, has_zeros) -> y (B, T, K)
PORTLM_TVM_FUNCTION(packed_rows) {
  return guarded("packed_rows", args, count, [](const Call& call) {
    call.expect_count(8);
    const auto ids = call.i64(0, "ids", 2);
    const auto packed = call.u8(1, "packed", 1);
    const auto y = call.f32(7, "y", 3);
    const Sizes s = sizes(call, packed, 2);
    call.expect_shape(y, {ids.size(0), ids.size(1), s.K});
    const int64_t wrong = kernels().packed_rows(ids.data<int64_t>(), packed.data<uint8_t>(), y.data<float>(),
                                                ids.elements(), s.rows, s.K, s.group, s.bits, s.has_zeros);
    if (wrong >= 0)
      call.fail("ids must be from 0 to " + std::to_string(s.rows - 1) + ", got " +
                std::to_string(ids.data<int64_t>()[wrong]));
  });
}
