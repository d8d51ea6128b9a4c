// Root-mean-square normalisation (Zhang and Sennrich 2019) with an optional residual add in front, forward and backward.
#include "cuda/kernels.h"
#include "cuda/norm_rows.cuh"

namespace portlm::cuda {

void rms_norm_fwd(const void* x, const void* residual, const void* weight, float eps, void* y, void* h, float* rstd,
                  int64_t rows, int64_t C, bool is_bfloat16, uintptr_t stream) {
  normalise<false>(x, residual, weight, nullptr, eps, y, h, nullptr, rstd, rows, C, is_bfloat16, stream);
}

void rms_norm_bwd(const void* dy, const void* dh_in, const void* h, const void* weight, const float* rstd, void* dx,
                  void* dweight, float* partial, int64_t blocks, int64_t rows, int64_t C, bool is_bfloat16,
                  uintptr_t stream) {
  differentiate_norm<false>(dy, dh_in, h, weight, nullptr, rstd, dx, dweight, nullptr, partial, blocks, rows, C, is_bfloat16,
                            stream);
}

}  // namespace portlm::cuda
