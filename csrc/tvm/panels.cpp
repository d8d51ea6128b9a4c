// float32 matrices in panels of 64 rows, as TVM-FFI functions, outputs last (destination passing).
#include <cstdint>
#include <string>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Call;
using portlm::tvm::guarded;
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
  const auto x = call.f32(0, "x"), panels = call.f32(1, "panels", 3), y = call.f32(first + 3, "y");
  const int64_t N = call.integer(first, "rows"), K = call.integer(first + 1, "columns");
  const int64_t activation = call.integer(first + 2, "activation");
  if (activation < 0 || activation > 3) call.fail("activation must be 0 to 3, got " + std::to_string(activation));
  expect_matrix(call, panels, N, K);
  call.expect_last(x, K);
  call.expect_last(y, N);
  if (bias) call.expect_shape(*bias, {N});
  if (x.rows() != y.rows()) call.fail("x and y must have the same number of rows");
  kernels().panel_linear(x.data<float>(), panels.data<float>(), bias ? bias->data<float>() : nullptr, y.data<float>(),
                         x.rows(), N, K, static_cast<int>(activation));
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
    const auto ids = call.i64(0, "ids", 2);
    const auto panels = call.f32(1, "panels", 3), y = call.f32(4, "y", 3);
    const int64_t V = call.integer(2, "rows"), K = call.integer(3, "columns");
    expect_matrix(call, panels, V, K);
    call.expect_shape(y, {ids.size(0), ids.size(1), K});
    const int64_t wrong = kernels().panel_rows(ids.data<int64_t>(), panels.data<float>(), y.data<float>(), ids.elements(), V, K);
    if (wrong >= 0)
      call.fail("ids must be from 0 to " + std::to_string(V - 1) + ", got " + std::to_string(ids.data<int64_t>()[wrong]));
  });
}
