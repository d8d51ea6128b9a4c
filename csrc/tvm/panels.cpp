// float32 matrices in panels of 64 rows, as TVM-FFI functions, outputs last (destination passing).
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

// The matrix (N, K) behind its panels (ceil(N / 64), K, 64), checked: a kernel that trusts its sizes reads inside of it.
void expect_matrix(const Call& call, const Tensor& panels, int64_t N, int64_t K) {
  if (N < 1) call.fail("a matrix has rows, got " + std::to_string(N));
  call.expect_shape(panels, {(N + kPanel - 1) / kPanel, K, kPanel});
}

// y = activation(x W^T + bias), with every shape checked; bias may be nullptr.
void apply(const Call& call, const Tensor* bias, int32_t first) {
  const auto panels = call.f32(1, "panels", 3);
  const int64_t N = call.integer(first, "rows"), K = call.integer(first + 1, "columns");
  expect_matrix(call, panels, N, K);
  const Product p = product(call, bias, first + 2, N, K);
  kernels().panel_linear(p.x, panels.data<float>(), p.bias, p.y, p.rows, N, K, p.activation);
}

}  // namespace

// (x (..., K), panels, bias (N), N, K, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(panel_linear) {
  return guarded("panel_linear", args, count, [](const Call& call) {
    call.expect_count(7);
    const auto bias = call.f32(2, "bias", 1);
    apply(call, &bias, 3);
  });
}

// (x (..., K), panels, N, K, activation) -> y (..., N)
PORTLM_TVM_FUNCTION(panel_linear_no_bias) {
  return guarded("panel_linear_no_bias", args, count, [](const Call& call) {
    call.expect_count(6);
    apply(call, nullptr, 2);
  });
}

// (ids (B, T) int64, panels, V, K) -> y (B, T, K)
PORTLM_TVM_FUNCTION(panel_rows) {
  return guarded("panel_rows", args, count, [](const Call& call) {
    call.expect_count(5);
    const auto panels = call.f32(1, "panels", 3);
    const int64_t V = call.integer(2, "rows"), K = call.integer(3, "columns");
    expect_matrix(call, panels, V, K);
    rows_at_ids(call, 4, V, K, [&](const int64_t* ids, float* y, int64_t count) {
      return kernels().panel_rows(ids, panels.data<float>(), y, count, V, K);
    });
  });
}
