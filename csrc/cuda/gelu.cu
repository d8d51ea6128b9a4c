// GELU (Hendrycks and Gimpel 2016) of x + bias, exact and in its tanh approximation; csrc/cpu/gelu.h has the formulas.
#include "cuda/bias_activation.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

__device__ inline float reciprocal(float x) { return __fdividef(1.0f, x); }  // 0 for very large x

// e^(t^2) (1 - erf t) for t >= 0, as csrc/cpu/vecmath.h has it.
__device__ inline float erfcx_of(float t) {
  const float k = reciprocal(fmaf(0.4f, t, 1.0f));
  float p = 4.005387143e-02f;
  p = fmaf(p, k, -1.344166449e-01f);
  p = fmaf(p, k, 7.162686109e-02f);
  p = fmaf(p, k, 1.023105987e-01f);
  p = fmaf(p, k, 6.968896525e-02f);
  p = fmaf(p, k, 1.977554755e-01f);
  p = fmaf(p, k, 2.007508168e-01f);
  p = fmaf(p, k, 2.266056221e-01f);
  p = fmaf(p, k, 2.256244907e-01f);
  return k * p;
}

struct GeluExact {
  // The normal distribution up to x, from its density times sqrt(2 pi).
  static __device__ float phi(float x, float gauss) {
    const float q = gauss * erfcx_of(fabsf(x) * 0.707106781f) * 0.5f;
    return x > 0.0f ? 1.0f - q : q;
  }
  static __device__ float gaussian(float x) { return expf(-0.5f * x * x); }
  static __device__ float value(float x) { return x * phi(x, gaussian(x)); }
  static __device__ float slope(float x, float& value) {
    const float gauss = gaussian(x), p = phi(x, gauss);
    value = x * p;
    return fmaf(x * gauss, 0.398942280f, p);
  }
};

struct GeluTanh {
  static constexpr float kTwoSqrtTwoOverPi = 1.59576912f, kCubic = 0.044715f;
  static __device__ float value(float x) {
    const float u2 = x * fmaf(x * x, kTwoSqrtTwoOverPi * kCubic, kTwoSqrtTwoOverPi);
    return x * reciprocal(1.0f + expf(-u2));
  }
  static __device__ float slope(float x, float& value) {
    const float c = x > 9.5f ? 9.5f : x < -9.5f ? -9.5f : x;  // the slope is 0 or 1 there; NaN stays NaN
    const float z = c * c;
    const float e = expf(c * fmaf(z, -kTwoSqrtTwoOverPi * kCubic, -kTwoSqrtTwoOverPi)), s = reciprocal(1.0f + e);
    value = x * s;
    return fmaf(c * fmaf(z, 3.0f * kTwoSqrtTwoOverPi * kCubic, kTwoSqrtTwoOverPi), s * (e * s), s);
  }
};

}  // namespace

void gelu_bias_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t F, int approximate_tanh, bool is_bfloat16,
                   uintptr_t stream) {
  (approximate_tanh ? activate<GeluTanh> : activate<GeluExact>)(x, bias, y, rows, F, is_bfloat16, stream);
}

void gelu_bias_bwd(const void* dy, const void* x, const void* bias, void* dx, void* value, void* dbias, float* partial,
                   int64_t blocks, int64_t rows, int64_t F, int approximate_tanh, bool is_bfloat16, uintptr_t stream) {
  (approximate_tanh ? differentiate<GeluTanh> : differentiate<GeluExact>)(dy, x, bias, dx, value, dbias, partial, blocks, rows, F,
                                                                          is_bfloat16, stream);
}

}  // namespace portlm::cuda
