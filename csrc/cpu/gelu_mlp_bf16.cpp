// The perceptron of gelu_mlp.cpp with operands rounded to bfloat16. GELU is computed in float32 on each part of the hidden
// layer while it is in the cache: what goes to memory is rounded, what backward needs and what the second product takes.
#include "cpu/gemm_bf16.h"
#include "cpu/hidden.h"
#include "cpu/kernels.h"

namespace portlm::PORTLM_ISA {
namespace {

// Arrays (rows, F) of one chunk.
struct Hidden {
  uint16_t* pre;    // x W1^T + b1: written by forward (or nullptr), read by backward
  uint16_t* value;  // receives gelu(pre)
  uint16_t* grad;   // backward: receives the gradient of pre
  int64_t F;
};

// Calls body(part, at, count) on runs of a part's columns that fit a buffer of kRun floats; `at` is where in Hidden's arrays.
constexpr int64_t kRun = 256;
template <typename Body>
void for_runs(const Hidden& h, float* part, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1, Body body) {
  for (int64_t i = i0; i < i1; ++i)
    for (int64_t j = j0; j < j1; j += kRun) body(part + (i - i0) * ld + j - j0, i * h.F + j, j1 - j < kRun ? j1 - j : kRun);
}

template <typename Form>
void activate(void* context, float* part, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  const Bf16Tiles& tiles = bf16_tiles();
  for_runs(h, part, ld, i0, i1, j0, j1, [&](float* pre, int64_t at, int64_t count) {
    if (h.pre) tiles.round(pre, h.pre + at, count);
    gelu_run<Form>(pre, pre, count);
    tiles.round(pre, h.value + at, count);
  });
}

template <typename Form>
void differentiate(void* context, float* part, int64_t ld, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const Hidden& h = *static_cast<const Hidden*>(context);
  const Bf16Tiles& tiles = bf16_tiles();
  for_runs(h, part, ld, i0, i1, j0, j1, [&](float* grad, int64_t at, int64_t count) {
    alignas(64) float pre[kRun];
    float* const value = pre;  // takes the place of pre
    widen(h.pre + at, pre, count);
    gelu_run_bwd<Form>(pre, value, grad, count);
    tiles.round(grad, h.grad + at, count);
    tiles.round(value, h.value + at, count);
  });
}

// Rows of a chunk. Where products take so little time that the hidden layer's way to memory shows, half as many, in multiples
// of a tile: in halves they are a quarter of what gelu_mlp.cpp keeps in flight. Weights are packed once for all chunks.
int64_t rows_at_a_time(int64_t F) { return bf16_tiles().rate > 128 ? (chunk_rows(F) + 63) / 64 * 32 : chunk_rows(F); }

// A weight, packed for all chunks.
char* pack(Scratch& scratch, const Bf16Operand& weight, int64_t K, int64_t N) {
  char* const packed = reinterpret_cast<char*>(scratch.floats(packed_bytes_bf16(K, N) / 4));
  pack_bf16(weight, K, N, packed);
  return packed;
}

uint16_t* halves(Scratch& scratch, int64_t count) { return reinterpret_cast<uint16_t*>(scratch.floats(count / 2 + 1)); }

// Memory for C (rows, F) of a product over K, or nullptr where its parts are enough.
float* whole(Scratch& scratch, int64_t rows, int64_t F, int64_t K) {
  return K <= bf16_tiles().depth ? nullptr : scratch.floats(rows * F);
}

}  // namespace

void gelu_mlp_bf16_fwd(const float* x, const float* w1, const float* b1, const float* w2, const float* b2, uint16_t* rounded_x,
                       uint16_t* pre, float* y, int64_t rows, int64_t C, int64_t F, int64_t N, int approximate_tanh) {
  thread_local Scratch scratch, hidden, first, second;
  const int64_t chunk = rows_at_a_time(F), most = rows < chunk ? rows : chunk;
  uint16_t* const value = halves(scratch, most * F);
  float* const sums = whole(hidden, most, F, C);
  const char *const packed1 = pack(first, turned(w1, C), C, F), *const packed2 = pack(second, turned(w2, F), F, N);
  for (int64_t i = 0; i < rows; i += chunk) {
    const int64_t n = rows - i < chunk ? rows - i : chunk;
    Hidden h{pre ? pre + i * F : nullptr, value, nullptr, F};
    multiply_bf16({rows_of(x + i * C, C), turned(w1, C), b1, sums, n, F, C, F, false, rounded_x ? rounded_x + i * C : nullptr,
                   packed1},
                  approximate_tanh ? activate<GeluTanh> : activate<GeluExact>, &h);
    multiply_bf16({rows_of(value, F), turned(w2, F), b2, y + i * N, n, N, F, N, false, nullptr, packed2});
  }
}

void gelu_mlp_bf16_bwd(const float* dy, const uint16_t* x, const uint16_t* pre, const float* w1, const float* w2, float* dx,
                       float* dw1, float* db1, float* dw2, float* db2, int64_t rows, int64_t C, int64_t F, int64_t N,
                       int approximate_tanh) {
  thread_local Scratch scratch, hidden, first, second;
  const int64_t chunk = rows_at_a_time(F), most = rows < chunk ? rows : chunk;
  uint16_t* const value = halves(scratch, 2 * most * F);
  uint16_t* const grad = value + most * F;
  float* const sums = whole(hidden, most, F, N);
  const char* const packed1 = dx ? pack(first, rows_of(w1, C), F, C) : nullptr;
  const char* const packed2 = pack(second, rows_of(w2, F), N, F);
  int64_t i = 0;
  do {  // once even for no rows, which makes the weights' gradients zero
    const int64_t n = rows - i < chunk ? rows - i : chunk;
    Hidden h{const_cast<uint16_t*>(pre) + i * F, value, grad, F};
    multiply_bf16({rows_of(dy + i * N, N), rows_of(w2, F), nullptr, sums, n, F, N, F, false, nullptr, packed2},
                  approximate_tanh ? differentiate<GeluTanh> : differentiate<GeluExact>, &h);
    if (dw2) multiply_bf16({turned(dy + i * N, N), rows_of(value, F), nullptr, dw2, N, F, n, F, i > 0});
    if (db2) sum_rows(dy + i * N, N, db2, n, N, i > 0);
    if (dw1) multiply_bf16({turned(grad, F), rows_of(x + i * C, C), nullptr, dw1, F, C, n, C, i > 0});
    if (db1) sum_rows_bf16(grad, F, db1, n, F, i > 0);
    if (dx) multiply_bf16({rows_of(grad, F), rows_of(w1, C), nullptr, dx + i * C, n, C, F, C, false, nullptr, packed1});
    i += n;
  } while (i < rows);
}

}  // namespace portlm::PORTLM_ISA
