// The perceptron gelu(x W1^T + b1) W2^T + b2: its matrix products with GELU applied to each part of the hidden layer
// while the thread that computed the part still has it in its cache.
//
// Backward recomputes GELU from the input it had: that shares its exponential with the slope, and saves one of the two
// hidden layers that PyTorch keeps.
#include "cpu/gemm.h"
#include "cpu/hidden.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {
namespace {

// Arrays (rows, F) of one chunk.
struct Hidden {
  const float* pre;  // x W1^T + b1
  float* value;      // gelu(pre); may be pre
  float* grad;       // gradient of value, then of pre
  int64_t F;
};

template <typename Form>
void activate(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  for (int64_t at = i0 * h.F + j0; at < i1 * h.F; at += h.F) gelu_run<Form>(h.pre + at, h.value + at, j1 - j0);
}

template <typename Form>
void differentiate(void* context, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  for (int64_t at = i0 * h.F + j0; at < i1 * h.F; at += h.F)
    gelu_run_bwd<Form>(h.pre + at, h.value + at, h.grad + at, j1 - j0);
}

}  // namespace

void gelu_mlp_fwd(const float* x, const float* w1, const float* b1, const float* w2, const float* b2, float* pre, float* y,
                  int64_t rows, int64_t C, int64_t F, int64_t N, int approximate_tanh) {
  thread_local Scratch scratch;
  const int64_t chunk = chunk_rows(F);
  float* const value = scratch.floats((rows < chunk ? rows : chunk) * F);
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t n = rows - i < chunk ? rows - i : chunk;
    float* const to = pre ? pre + i * F : value;
    Hidden h{to, value, nullptr, F};
    multiply({x + i * C, w1, b1, to, n, F, C, C, C, F, false, true, false},
             approximate_tanh ? activate<GeluTanh> : activate<GeluExact>, &h);
    multiply({value, w2, b2, y + i * N, n, N, F, F, F, N, false, true, false});
  }
}

void gelu_mlp_bwd(const float* dy, const float* x, const float* pre, const float* w1, const float* w2, float* dx, float* dw1,
                  float* db1, float* dw2, float* db2, int64_t rows, int64_t C, int64_t F, int64_t N, int approximate_tanh) {
  thread_local Scratch scratch;
  const int64_t chunk = chunk_rows(F), most = rows < chunk ? rows : chunk;
  float* const value = scratch.floats(2 * most * F);
  float* const grad = value + most * F;
  int64_t i = 0;
  do {  // once even for no rows, which makes the weights' gradients zero
    const int64_t n = rows - i < chunk ? rows - i : chunk;
    Hidden h{pre + i * F, value, grad, F};
    multiply({dy + i * N, w2, nullptr, grad, n, F, N, N, F, F, false, false, false},
             approximate_tanh ? differentiate<GeluTanh> : differentiate<GeluExact>, &h);
    if (dw2) multiply({dy + i * N, value, nullptr, dw2, N, F, n, N, F, F, true, false, i > 0});
    if (db2) sum_rows(dy + i * N, N, db2, n, N, i > 0);
    if (dw1) multiply({grad, x + i * C, nullptr, dw1, F, C, n, F, C, C, true, false, i > 0});
    if (db1) sum_rows(grad, F, db1, n, F, i > 0);
    if (dx) multiply({grad, w1, nullptr, dx + i * C, n, C, F, F, C, C, false, false, false});
    i += n;
  } while (i < rows);
}

}  // namespace portlm::PORTLM_ISA
