// The perceptron relu(x W1^T + b1)^2 W2^T + b2: its matrix products, with the square taken of each part of the hidden
// layer while the thread that computed the part still has it in its cache.
#include "cpu/gemm.h"
#include "cpu/hidden.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {
namespace {

// Arrays (rows, F) of one chunk.
struct Hidden {
  float* square;    // holds x W1^T + b1, and then relu(that)^2
  float* positive;  // receives relu(that), or is nullptr
  int64_t F;
};

void activate(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  for (int64_t i = i0; i < i1; ++i) {
    float* const square = h.square + i * h.F + j0;
    float* const positive = h.positive ? h.positive + i * h.F + j0 : nullptr;
    for_lanes(j1 - j0, [=](int64_t j, auto lanes) {
      const Vec r = max(Vec(0.0f), load(square + j, lanes));  // NaN stays NaN
      if (positive) store(r, positive + j, lanes);
      store(r * r, square + j, lanes);
    });
  }
}

}  // namespace

void relu_squared_mlp_fwd(const float* x, const float* w1, const float* b1, const float* w2, const float* b2, float* y,
                          float* positive, int out_first, int64_t rows, int64_t C, int64_t F, int64_t N) {
  thread_local Scratch scratch;
  const int64_t chunk = chunk_rows(F);
  float* const square = scratch.floats((rows < chunk ? rows : chunk) * F);
  const bool transposed = out_first != 0;
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t n = rows - i < chunk ? rows - i : chunk;
    Hidden h{square, positive ? positive + i * F : nullptr, F};
    multiply({x + i * C, w1, b1, square, n, F, C, C, transposed ? C : F, F, false, transposed, false}, activate, &h);
    multiply({square, w2, b2, y + i * N, n, N, F, F, transposed ? F : N, N, false, transposed, false});
  }
}

}  // namespace portlm::PORTLM_ISA
