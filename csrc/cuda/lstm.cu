// LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000): a layer over a whole sequence, forward
// and backward, and one step of it behind its two products. Gates lie in the order input, forget, candidate, output.
#include "cuda/kernels.h"
#include "cuda/recurrent.cuh"

namespace portlm::cuda {
namespace {

// A unit's gates, and the state of its cell behind them.
struct Gates {
  float i, f, g, o, c;
  // x points to what was projected for the unit's first gate, H floats before the next one's.
  __device__ Gates(const float* x, const float (&product)[4], int64_t H, float cell)
      : i(sigmoid(x[0] + product[0])),
        f(sigmoid(x[H] + product[1])),
        g(tanhf(x[2 * H] + product[2])),
        o(sigmoid(x[3 * H] + product[3])),
        c(fmaf(f, cell, i * g)) {}
};

struct Forward {
  const float* projected;
  const float* c0;
  const int64_t* mask;
  float *y, *cells, *gates;
  __device__ void operator()(const Layer& layer, int64_t b, int64_t t, int64_t s, int64_t unit, const float (&sum)[4],
                             const float* before) const {
    const int64_t H = layer.H, at = (b * layer.T + t) * H + unit, gate = (b * layer.T + t) * 4 * H + unit;
    const float cell = state_before(layer, c0, cells, b, s)[unit];
    if (hidden(layer, mask, b, t)) {
      y[at] = before[unit];
      cells[at] = cell;
      for (int k = 0; gates && k < 4; ++k) gates[gate + k * H] = 0.0f;
      return;
    }
    const Gates now(projected + gate, sum, H, cell);
    cells[at] = now.c;
    y[at] = now.o * tanhf(now.c);
    if (!gates) return;
    gates[gate] = now.i;
    gates[gate + H] = now.f;
    gates[gate + 2 * H] = now.g;
    gates[gate + 3 * H] = now.o;
  }
};

struct Backward {
  const float *dy, *dcells, *c0;
  const int64_t* mask;
  const float *cells, *gates;
  float *dprojected, *dc0;
  __device__ float operator()(const Layer& layer, int64_t b, int64_t t, int64_t s, int64_t unit, float h) const {
    const int64_t H = layer.H, at = (b * layer.T + t) * H + unit, gate = (b * layer.T + t) * 4 * H + unit;
    float* const dc = dc0 + b * H + unit;
    float c = s + 1 < layer.T ? *dc : 0.0f;
    if (dy) h += dy[at];
    if (dcells) c += dcells[at];
    if (hidden(layer, mask, b, t)) {
      *dc = c;
      for (int k = 0; k < 4; ++k) dprojected[gate + k * H] = 0.0f;
      return h;
    }
    const float i = gates[gate], f = gates[gate + H], g = gates[gate + 2 * H], o = gates[gate + 3 * H];
    const float squashed = tanhf(cells[at]);
    c = fmaf(h * o, 1.0f - squashed * squashed, c);
    *dc = c * f;
    dprojected[gate] = c * g * i * (1.0f - i);
    dprojected[gate + H] = c * state_before(layer, c0, cells, b, s)[unit] * f * (1.0f - f);
    dprojected[gate + 2 * H] = c * i * (1.0f - g * g);
    dprojected[gate + 3 * H] = h * squashed * o * (1.0f - o);
    return 0.0f;
  }
};

struct Cell {
  const float *projected, *recurrent, *h, *c;
  const int64_t* mask;
  float *y, *cell;
  int64_t H;
  __device__ void operator()(int64_t b, int64_t unit) const {
    const int64_t at = b * H + unit, gate = b * 4 * H + unit;
    if (mask && mask[b] == 0) {
      y[at] = h[at];
      cell[at] = c[at];
      return;
    }
    const float* const r = recurrent + gate;
    const Gates now(projected + gate, {r[0], r[H], r[2 * H], r[3 * H]}, H, c[at]);
    cell[at] = now.c;
    y[at] = now.o * tanhf(now.c);
  }
};

__global__ void clear(float* x, int64_t n) {
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) x[i] = 0.0f;
}

}  // namespace

void lstm_fwd(const float* projected, const float* weight, const float* h0, const float* c0, const int64_t* mask, float* y,
              float* cells, float* gates, int64_t B, int64_t T, int64_t H, int reverse, uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<4>(layer, weight, h0, y, Forward{projected, c0, mask, y, cells, gates}, stream);
}

void lstm_bwd(const float* dy, const float* dcells, const float* weight, const float* c0, const int64_t* mask,
              const float* cells, const float* gates, float* dprojected, float* dh0, float* dc0, int64_t B, int64_t T,
              int64_t H, int reverse, uintptr_t stream) {
  const Layer layer{B, T, H, reverse != 0};
  if (T == 0 && B * H > 0) launch(clear, 1, 256, 0, stream, dc0, B * H);  // no step writes it
  backward_steps(layer, weight, 4 * H, dprojected, dh0, Backward{dy, dcells, c0, mask, cells, gates, dprojected, dc0}, stream);
}

void lstm_cell(const float* projected, const float* recurrent, const float* h, const float* c, const int64_t* mask, float* y,
               float* cell, int64_t rows, int64_t H, uintptr_t stream) {
  for_units(rows, H, Cell{projected, recurrent, h, c, mask, y, cell, H}, stream);
}

}  // namespace portlm::cuda
