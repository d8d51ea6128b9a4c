// What linear maps and lookups share whose matrices lie as kernels read them: the checks of all but the matrix.
#pragma once

#include <cstdint>
#include <string>

#include "tvm/call.h"

namespace portlm::tvm {

// The arguments of y = activation(x W^T + bias), W (N, K): x is the first, the activation is number `at`, y follows it.
struct Product {
  const float *x, *bias;
  float* y;
  int64_t rows;
  int activation;
};

// With every shape checked; bias may be nullptr.
inline Product product(const Call& call, const Tensor* bias, int32_t at, int64_t N, int64_t K) {
  const auto x = call.f32(0, "x"), y = call.f32(at + 1, "y");
  const int64_t activation = call.integer(at, "activation");
  if (activation < 0 || activation > 4) call.fail("activation must be 0 to 4, got " + std::to_string(activation));
  call.expect_last(x, K);
  call.expect_last(y, N);
  if (bias) call.expect_shape(*bias, {N});
  if (x.rows() != y.rows()) call.fail("x and y must have the same number of rows");
  return {x.data<float>(), bias ? bias->data<float>() : nullptr, y.data<float>(), x.rows(), static_cast<int>(activation)};
}

// Rows of a table (V, K) at ids (B, T), the first argument, as y (B, T, K), argument `at`. look_up(ids, y, count) returns
// the place of an id that is not in the table, or -1.
template <typename LookUp>
void rows_at_ids(const Call& call, int32_t at, int64_t V, int64_t K, LookUp look_up) {
  const auto ids = call.i64(0, "ids", 2);
  const auto y = call.f32(at, "y", 3);
  call.expect_shape(y, {ids.size(0), ids.size(1), K});
  const int64_t wrong = look_up(ids.data<int64_t>(), y.data<float>(), ids.elements());
  if (wrong >= 0)
    call.fail("ids must be from 0 to " + std::to_string(V - 1) + ", got " + std::to_string(ids.data<int64_t>()[wrong]));
}

}  // namespace portlm::tvm
