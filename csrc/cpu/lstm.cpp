// LSTM (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000): a layer over a whole sequence, forward
// and backward, and one step of it behind its two products. Gates lie in the order input, forget, candidate, output.
#include "cpu/kernels.h"
#include "cpu/recurrent.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

void lstm_fwd(const float* projected, const float* weight, const float* h0, const float* c0, const int64_t* mask, float* y,
              float* cells, float* gates, int64_t B, int64_t T, int64_t H, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<4>(layer, weight, h0, y, [=](int64_t b, int64_t t, int64_t unit, auto lanes, const Vec(&sums)[4], const float* before) {
    const int64_t at = (b * T + t) * H + unit, gate = (b * T + t) * 4 * H + unit;
    const int64_t s = layer.reverse ? T - 1 - t : t;
    const float* const cell = state_before(layer, c0, cells, b, s) + unit;
    if (hidden(layer, mask, b, t)) {
      store(load(before + unit, lanes), y + at, lanes);
      store(load(cell, lanes), cells + at, lanes);
      for (int k = 0; gates && k < 4; ++k) store(Vec(0.0f), gates + gate + k * H, lanes);
      return;
    }
    const Vec i = sigmoid(load(projected + gate, lanes) + sums[0]);
    const Vec f = sigmoid(load(projected + gate + H, lanes) + sums[1]);
    const Vec g = tanh(load(projected + gate + 2 * H, lanes) + sums[2]);
    const Vec o = sigmoid(load(projected + gate + 3 * H, lanes) + sums[3]);
    const Vec c = fma(f, load(cell, lanes), i * g);
    store(c, cells + at, lanes);
    store(o * tanh(c), y + at, lanes);
    if (!gates) return;
    store(i, gates + gate, lanes);
    store(f, gates + gate + H, lanes);
    store(g, gates + gate + 2 * H, lanes);
    store(o, gates + gate + 3 * H, lanes);
  });
}

void lstm_bwd(const float* dy, const float* dcells, const float* weight, const float* c0, const int64_t* mask,
              const float* cells, const float* gates, float* dprojected, float* dh0, float* dc0, int64_t B, int64_t T,
              int64_t H, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  clear(dh0, B * H);
  clear(dc0, B * H);
  backward_steps(layer, weight, 4 * H, dprojected, dh0, [=](int64_t b, int64_t t, int64_t s) {
    const int64_t token = b * T + t;
    const bool skipped = hidden(layer, mask, b, t);
    float *const dh = dh0 + b * H, *const dc = dc0 + b * H, *const d = dprojected + token * 4 * H;
    const float *const gate = gates + token * 4 * H, *const cell = cells + token * H;
    const float* const before = state_before(layer, c0, cells, b, s);
    for_lanes(H, [=](int64_t j, auto lanes) {
      Vec h = load(dh + j, lanes), c = load(dc + j, lanes);
      if (dy) h += load(dy + token * H + j, lanes);
      if (dcells) c += load(dcells + token * H + j, lanes);
      const Vec one(1.0f), zero(0.0f);
      if (skipped) {
        store(h, dh + j, lanes);
        store(c, dc + j, lanes);
        for (int k = 0; k < 4; ++k) store(zero, d + k * H + j, lanes);
        return;
      }
      const Vec i = load(gate + j, lanes), f = load(gate + H + j, lanes), g = load(gate + 2 * H + j, lanes);
      const Vec o = load(gate + 3 * H + j, lanes), squashed = tanh(load(cell + j, lanes));
      c = fma(h * o, one - squashed * squashed, c);
      store(zero, dh + j, lanes);
      store(c * f, dc + j, lanes);
      store(c * g * i * (one - i), d + j, lanes);
      store(c * load(before + j, lanes) * f * (one - f), d + H + j, lanes);
      store(c * i * (one - g * g), d + 2 * H + j, lanes);
      store(h * squashed * o * (one - o), d + 3 * H + j, lanes);
    });
  });
}

void lstm_cell(const float* projected, const float* recurrent, const float* h, const float* c, const int64_t* mask, float* y,
               float* cell, int64_t rows, int64_t H) {
  parallel_for(rows, kElementwiseGrain / (4 * H + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float *const x = projected + b * 4 * H, *const r = recurrent + b * 4 * H;
      const bool skipped = mask && mask[b] == 0;
      for_lanes(H, [=](int64_t j, auto lanes) {
        const int64_t at = b * H + j;
        Vec next = load(c + at, lanes), out = load(h + at, lanes);
        if (!skipped) {
          const Vec i = sigmoid(load(x + j, lanes) + load(r + j, lanes));
          const Vec f = sigmoid(load(x + H + j, lanes) + load(r + H + j, lanes));
          const Vec g = tanh(load(x + 2 * H + j, lanes) + load(r + 2 * H + j, lanes));
          const Vec o = sigmoid(load(x + 3 * H + j, lanes) + load(r + 3 * H + j, lanes));
          next = fma(f, next, i * g);
          out = o * tanh(next);
        }
        store(next, cell + at, lanes);
        store(out, y + at, lanes);
      });
    }
  });
}

}  // namespace portlm::PORTLM_ISA
