// SwiGLU gate, y = silu(gate) * up, forward and backward. Memory bound: each array is read or written once.
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

void swiglu_fwd(const float* gate, const float* up, float* y, int64_t n) {
  parallel_for(n, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t j, auto lanes) {
      const int64_t i = begin + j;
      store(silu(load(gate + i, lanes)) * load(up + i, lanes), y + i, lanes);
    });
  });
}

void swiglu_halves(const float* x, float* y, int64_t rows, int64_t F) {
  parallel_for(rows, kElementwiseGrain / (F + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float *gate = x + 2 * r * F, *up = gate + F;
      for_lanes(F, [=](int64_t i, auto lanes) {
        store(silu(load(gate + i, lanes)) * load(up + i, lanes), y + r * F + i, lanes);
      });
    }
  });
}

void swiglu_bwd(const float* dy, const float* gate, const float* up, float* dgate, float* dup, int64_t n) {
  parallel_for(n, kElementwiseGrain, [=](int64_t begin, int64_t end) {
    for_lanes(end - begin, [=](int64_t j, auto lanes) {
      const int64_t i = begin + j;
      const Vec d = load(dy + i, lanes), g = load(gate + i, lanes);
      // silu'(g) = s (1 + g (1 - s)) for s = 1 / (1 + e), where 1 - s = e s does not cancel
      const Vec e = exp(Vec(0.0f) - g), s = Vec(1.0f) / (Vec(1.0f) + e), rest = min(Vec(3e38f), e) * s;
      store(d * load(up + i, lanes) * s * fma(g, rest, Vec(1.0f)), dgate + i, lanes);
      store(d * g * s, dup + i, lanes);
    });
  });
}

}  // namespace portlm::PORTLM_ISA
