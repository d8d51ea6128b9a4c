// The gradients of y = x W^T + b. (The forward pass is gemm itself.)
#include "cpu/gemm.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {

void linear_bwd(const float* dy, const float* x, const float* weight, float* dx, float* dweight, float* dbias, int64_t rows,
                int64_t N, int64_t K) {
  if (dx) multiply({dy, weight, nullptr, dx, rows, K, N, N, K, K, false, false, false});
  if (dweight) multiply({dy, x, nullptr, dweight, N, K, rows, N, K, K, true, false, false});
  if (dbias) sum_rows(dy, N, dbias, rows, N);
}

}  // namespace portlm::PORTLM_ISA
