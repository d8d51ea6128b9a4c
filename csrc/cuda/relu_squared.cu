// The squared ReLU of Primer (So et al. 2021) of x + bias.
#include "cuda/bias_activation.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

struct ReluSquared {
  static __device__ float positive(float x) { return x < 0.0f ? 0.0f : x; }  // NaN stays NaN
  static __device__ float value(float x) { return positive(x) * positive(x); }
  static __device__ float slope(float x, float& value) {
    value = ReluSquared::value(x);
    return 2.0f * positive(x);
  }
};

}  // namespace

void relu_squared_bias_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t F, bool is_bfloat16,
                           uintptr_t stream) {
  activate<ReluSquared>(x, bias, y, rows, F, is_bfloat16, stream);
}

void relu_squared_bias_bwd(const void* dy, const void* x, const void* bias, void* dx, void* value, void* dbias, float* partial,
                           int64_t blocks, int64_t rows, int64_t F, bool is_bfloat16, uintptr_t stream) {
  differentiate<ReluSquared>(dy, x, bias, dx, value, dbias, partial, blocks, rows, F, is_bfloat16, stream);
}

}  // namespace portlm::cuda
