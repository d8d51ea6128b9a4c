// Matrices of 16 bits in panels, as half_panels writes them, as TVM-FFI functions, outputs last (destination passing).
#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "tvm/matrix_call.h"

using portlm::kernels;
using portlm::tvm::Call;
using portlm::tvm::guarded;
using portlm::tvm::product;
using portlm::tvm::Product;
using portlm::tvm::rows_at_ids;
using portlm::tvm::Tensor;

namespace {

constexpr int64_t kPanel = 64;
constexpr int64_t kMostRows = int64_t{1} << 31;  // of a matrix, or columns: so that no product of sizes overflows

// The numbers behind a matrix in panels: rows, columns, bfloat16.
struct Sizes {
  int64_t rows, K;
  int bfloat16;
};

// Checked, so that a kernel that trusts them reads inside of the matrix.
Sizes sizes(const Call& call, const Tensor& panels, int32_t first) {
  const Sizes found{call.integer(first, "rows"), call.integer(first + 1, "columns"), call.integer(first + 2, "bfloat16") != 0};
  if (found.rows < 0 || found.rows > kMostRows || found.K < 0 || found.K > kMostRows)
    call.fail("no matrix has " + std::to_string(found.rows) + " rows and " + std::to_string(found.K) + " columns");
  const int64_t padded = (found.rows + kPanel - 1) / kPanel * kPanel;
  if (panels.size(0) / 2 != padded * found.K || panels.size(0) % 2)
    call.fail("panels must have " + std::to_string(padded * found.K) + " elements of 2 bytes, got " +
              std::to_string(panels.size(0)) + " bytes");
  if (reinterpret_cast<uintptr_t>(panels.data<uint8_t>()) % sizeof(uint16_t))
    call.fail("panels must begin at a multiple of 2 bytes");
  return found;
}

// y = activation(x W^T + bias), with every shape checked; bias may be nullptr.
void apply(const Call& call, const Tensor* bias, int32_t first) {
  const auto panels = call.u8(1, "panels", 1);
  const Sizes s = sizes(call, panels, first);
  const Product p = product(call, bias, first + 3, s.rows, s.K);
  kernels().half_linear(p.x, panels.data<uint16_t>(), p.bias, p.y, p.rows, s.rows, s.K, s.bfloat16, p.activation);
}

}  // namespace

// (x (..., K), panels (bytes), bias (N), N, K, bfloat16, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(half_linear) {
  return guarded("half_linear", args, count, [](const Call& call) {
    call.expect_count(8);
    const auto bias = call.f32(2, "bias", 1);
    apply(call, &bias, 3);
  });
}

// (x (..., K), panels (bytes), N, K, bfloat16, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(half_linear_no_bias) {
  return guarded("half_linear_no_bias", args, count, [](const Call& call) {
    call.expect_count(7);
    apply(call, nullptr, 2);
  });
}

// (ids (B, T) int64, panels (bytes), V, K, bfloat16) -> y (B, T, K)
PORTLM_TVM_FUNCTION(half_rows) {
  return guarded("half_rows", args, count, [](const Call& call) {
    call.expect_count(6);
    const auto panels = call.u8(1, "panels", 1);
    const Sizes s = sizes(call, panels, 2);
    rows_at_ids(call, 5, s.rows, s.K, [&](const int64_t* ids, float* y, int64_t count) {
      return kernels().half_rows(ids, panels.data<uint16_t>(), y, count, s.rows, s.K, s.bfloat16);
    });
  });
}
