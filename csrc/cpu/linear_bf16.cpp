// y = x W^T + b and its gradients with operands rounded to bfloat16, and x kept that way for backward.
#include "cpu/gemm_bf16.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {

void linear_bf16_fwd(const float* x, const float* weight, const float* bias, float* y, uint16_t* rounded_x, int64_t rows,
                     int64_t N, int64_t K) {
  multiply_bf16({rows_of(x, K), turned(weight, K), bias, y, rows, N, K, N, false, rounded_x});
}

void linear_bf16_bwd(const float* dy, const uint16_t* x, const float* weight, float* dx, float* dweight, float* dbias,
                     int64_t rows, int64_t N, int64_t K) {
  if (dx) multiply_bf16({rows_of(dy, N), rows_of(weight, K), nullptr, dx, rows, K, N, K, false});
  if (dweight) multiply_bf16({turned(dy, N), rows_of(x, K), nullptr, dweight, N, K, rows, K, false});
  if (dbias) sum_rows(dy, N, dbias, rows, N);
}

}  // namespace portlm::PORTLM_ISA
