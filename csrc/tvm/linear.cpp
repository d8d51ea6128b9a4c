// Linear maps as TVM-FFI functions, outputs last (destination passing).
#include <algorithm>
#include <vector>

#include "cpu/kernels.h"
#include "tvm/call.h"

using portlm::kernels;
using portlm::tvm::Any;
using portlm::tvm::Call;
using portlm::tvm::guarded;
using portlm::tvm::Tensor;

namespace {

// Rows of the MLP's hidden layer that exist at a time: enough for a full-speed product, and no memory that grows with
// the batch.
constexpr int64_t kHiddenRows = 256;

// y (rows, N) = x (rows, K) W + bias, W (K, N), or (N, K) if transposed; bias may be nullptr.
void multiply(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t N, int64_t K,
              bool transposed) {
  kernels().gemm(x, weight, bias, y, rows, N, K, K, transposed ? K : N, N, 0, transposed, 0);
}

// The same with every shape checked.
void apply(const Call& call, const Tensor& x, const Tensor& weight, const Tensor* bias, int64_t transposed,
           const Tensor& y) {
  const int64_t K = weight.size(transposed ? 1 : 0), N = weight.size(transposed ? 0 : 1);
  call.expect_last(x, K);
  call.expect_last(y, N);
  if (bias) call.expect_shape(*bias, {N});
  if (x.rows() != y.rows()) call.fail("x and y must have the same number of rows");
  multiply(x.data<float>(), weight.data<float>(), bias ? bias->data<float>() : nullptr, y.data<float>(), x.rows(), N, K,
           transposed != 0);
}

}  // namespace

// (x (..., K), weight (K, N), bias (N), transposed) -> y (..., N); the weight is (N, K) if transposed is not 0
PORTLM_TVM_FUNCTION(linear) {
  return guarded("linear", args, count, [](const Call& call) {
    call.expect_count(5);
    const auto bias = call.f32(2, "bias", 1);
    apply(call, call.f32(0, "x"), call.f32(1, "weight", 2), &bias, call.integer(3, "transposed"), call.f32(4, "y"));
  });
}

// (x (..., K), weight (K, N), transposed) -> y (..., N)
PORTLM_TVM_FUNCTION(linear_no_bias) {
  return guarded("linear_no_bias", args, count, [](const Call& call) {
    call.expect_count(4);
    apply(call, call.f32(0, "x"), call.f32(1, "weight", 2), nullptr, call.integer(2, "transposed"), call.f32(3, "y"));
  });
}

// (x (..., C), w1 (C, F), b1 (F), w2 (F, C'), b2 (C'), approximate_tanh) -> y (..., C')
PORTLM_TVM_FUNCTION(gelu_mlp) {
  return guarded("gelu_mlp", args, count, [](const Call& call) {
    call.expect_count(7);
    const auto x = call.f32(0, "x"), w1 = call.f32(1, "w1", 2), b1 = call.f32(2, "b1", 1), w2 = call.f32(3, "w2", 2),
               b2 = call.f32(4, "b2", 1), y = call.f32(6, "y");
    const int64_t rows = x.rows(), C = x.size(-1), F = w1.size(1), N = w2.size(1);
    call.expect_shape(w1, {C, F});
    call.expect_shape(b1, {F});
    call.expect_shape(w2, {F, N});
    call.expect_shape(b2, {N});
    call.expect_last(y, N);
    if (y.rows() != rows) call.fail("x and y must have the same number of rows");
    const bool tanh = call.integer(5, "approximate_tanh") != 0;
    static thread_local std::vector<float> hidden;
    hidden.resize(static_cast<size_t>(std::min(rows, kHiddenRows) * F));
    for (int64_t r = 0; r < rows; r += kHiddenRows) {
      const int64_t n = std::min(kHiddenRows, rows - r);
      multiply(x.data<float>() + r * C, w1.data<float>(), nullptr, hidden.data(), n, F, C, false);
      kernels().gelu_bias_fwd(hidden.data(), b1.data<float>(), hidden.data(), n, F, tanh);
      multiply(hidden.data(), w2.data<float>(), b2.data<float>(), y.data<float>() + r * N, n, N, F, false);
    }
  });
}
