// Layer normalisation (Ba et al. 2016) with an optional residual add in front, forward and backward.
#include "cuda/kernels.h"
#include "cuda/norm_rows.cuh"

namespace portlm::cuda {

void layer_norm_fwd(const void* x, const void* residual, const void* weight, const void* bias, float eps, void* y, void* h,
                    float* mean, float* rstd, int64_t rows, int64_t C, bool is_bfloat16, uintptr_t stream) {
  normalise<true>(x, residual, weight, bias, eps, y, h, mean, rstd, rows, C, is_bfloat16, stream);
}

void layer_norm_bwd(const void* dy, const void* dh_in, const void* h, const void* weight, const float* mean,
                    const float* rstd, void* dx, void* dweight, void* dbias, float* partial, int64_t blocks, int64_t rows,
                    int64_t C, bool is_bfloat16, uintptr_t stream) {
  differentiate_norm<true>(dy, dh_in, h, weight, mean, rstd, dx, dweight, dbias, partial, blocks, rows, C, is_bfloat16, stream);
}

}  // namespace portlm::cuda
