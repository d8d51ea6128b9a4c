// GRU (Cho et al. 2014), with the reset gate behind the recurrent product, as cuDNN and PyTorch have it: a layer over a whole
// sequence, forward and backward, and one step of it behind its two products. Gates lie in the order reset, update, candidate.
#include "cuda/kernels.h"
#include "cuda/recurrent.cuh"

namespace portlm::cuda {
namespace {

// A unit's gates, and its state behind them.
struct Gates {
  float r, z, n, h;
  // x points to what was projected for the unit's first gate, H floats before the next one's.
  __device__ Gates(const float* x, const float (&product)[3], int64_t H, float before)
      : r(sigmoid(x[0] + product[0])),
        z(sigmoid(x[H] + product[1])),
        n(tanhf(fmaf(r, product[2], x[2 * H]))),
        h(fmaf(z, before - n, n)) {}
};

struct Forward {
  const float *projected, *bias;
  const int64_t* mask;
  float *y, *gates;
  __device__ void operator()(const Layer& layer, int64_t b, int64_t t, int64_t, int64_t unit, const float (&sum)[3],
                             const float* before) const {
    const int64_t H = layer.H, token = b * layer.T + t, at = token * H + unit;
    const float* const x = projected + token * 3 * H + unit;
    float* const kept = gates ? gates + token * 4 * H + unit : nullptr;
    const float h = before[unit];
    if (hidden(layer, mask, b, t)) {
      y[at] = h;
      for (int k = 0; kept && k < 4; ++k) kept[k * H] = 0.0f;
      return;
    }
    float product[3];
#pragma unroll
    for (int g = 0; g < 3; ++g) product[g] = bias ? sum[g] + bias[g * H + unit] : sum[g];
    const Gates now(x, product, H, h);
    y[at] = now.h;
    if (!kept) return;
    kept[0] = now.r;
    kept[H] = now.z;
    kept[2 * H] = now.n;
    kept[3 * H] = product[2];
  }
};

struct Backward {
  const float *dy, *h0;
  const int64_t* mask;
  const float *y, *gates;
  float *dprojected, *drecurrent;
  __device__ float operator()(const Layer& layer, int64_t b, int64_t t, int64_t s, int64_t unit, float h) const {
    const int64_t H = layer.H, token = b * layer.T + t;
    float *const d = dprojected + token * 3 * H + unit, *const e = drecurrent + token * 3 * H + unit;
    const float* const kept = gates + token * 4 * H + unit;
    h += dy[token * H + unit];
    if (hidden(layer, mask, b, t)) {
      for (int k = 0; k < 3; ++k) d[k * H] = e[k * H] = 0.0f;
      return h;
    }
    const float r = kept[0], z = kept[H], n = kept[2 * H];
    const float candidate = h * (1.0f - z) * (1.0f - n * n);
    const float update = h * (state_before(layer, h0, y, b, s)[unit] - n) * z * (1.0f - z);
    const float reset = candidate * kept[3 * H] * r * (1.0f - r);
    d[0] = e[0] = reset;
    d[H] = e[H] = update;
    d[2 * H] = candidate;
    e[2 * H] = candidate * r;
    return h * z;
  }
};

struct Cell {
  const float *projected, *recurrent, *h;
  const int64_t* mask;
  float* y;
  int64_t H;
  __device__ void operator()(int64_t b, int64_t unit) const {
    const int64_t at = b * H + unit, gate = b * 3 * H + unit;
    const float* const p = recurrent + gate;
    y[at] = mask && mask[b] == 0 ? h[at] : Gates(projected + gate, {p[0], p[H], p[2 * H]}, H, h[at]).h;
  }
};

}  // namespace

void gru_fwd(const float* projected, const float* weight, const float* bias, const float* h0, const int64_t* mask, float* y,
             float* gates, int64_t B, int64_t T, int64_t H, int reverse, uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<3>(layer, weight, h0, y, Forward{projected, bias, mask, y, gates}, stream);
}

void gru_bwd(const float* dy, const float* weight, const float* h0, const int64_t* mask, const float* y, const float* gates,
             float* dprojected, float* drecurrent, float* dh0, int64_t B, int64_t T, int64_t H, int reverse,
             uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  backward_steps(layer, weight, 3 * H, drecurrent, dh0, Backward{dy, h0, mask, y, gates, dprojected, drecurrent}, stream);
}

void gru_cell(const float* projected, const float* recurrent, const float* h, const int64_t* mask, float* y, int64_t rows,
              int64_t H, uintptr_t stream) {
  for_units(rows, H, Cell{projected, recurrent, h, mask, y, H}, stream);
}

}  // namespace portlm::cuda
