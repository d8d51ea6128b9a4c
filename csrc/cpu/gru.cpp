// GRU (Cho et al. 2014), with the reset gate behind the recurrent product, as cuDNN and PyTorch have it: a layer over a whole
// sequence, forward and backward, and one step of it behind its two products. Gates lie in the order reset, update, candidate.
#include "cpu/kernels.h"
#include "cpu/recurrent.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

void gru_fwd(const float* projected, const float* weight, const float* bias, const float* h0, const int64_t* mask, float* y,
             float* gates, int64_t B, int64_t T, int64_t H, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<3>(layer, weight, h0, y, [=](int64_t b, int64_t t, int64_t unit, auto lanes, const Vec(&sums)[3], const float* before) {
    const int64_t at = (b * T + t) * H + unit, gate = (b * T + t) * 3 * H + unit, kept = (b * T + t) * 4 * H + unit;
    const Vec h = load(before + unit, lanes);
    if (hidden(layer, mask, b, t)) {
      store(h, y + at, lanes);
      for (int k = 0; gates && k < 4; ++k) store(Vec(0.0f), gates + kept + k * H, lanes);
      return;
    }
    const auto sum = [=](int g) { return bias ? sums[g] + load(bias + g * H + unit, lanes) : sums[g]; };
    const Vec r = sigmoid(load(projected + gate, lanes) + sum(0));
    const Vec z = sigmoid(load(projected + gate + H, lanes) + sum(1));
    const Vec inner = sum(2);
    const Vec n = tanh(fma(r, inner, load(projected + gate + 2 * H, lanes)));
    store(fma(z, h - n, n), y + at, lanes);
    if (!gates) return;
    store(r, gates + kept, lanes);
    store(z, gates + kept + H, lanes);
    store(n, gates + kept + 2 * H, lanes);
    store(inner, gates + kept + 3 * H, lanes);
  });
}

void gru_bwd(const float* dy, const float* weight, const float* h0, const int64_t* mask, const float* y, const float* gates,
             float* dprojected, float* drecurrent, float* dh0, int64_t B, int64_t T, int64_t H, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  clear(dh0, B * H);
  backward_steps(layer, weight, 3 * H, drecurrent, dh0, [=](int64_t b, int64_t t, int64_t s) {
    const int64_t token = b * T + t;
    const bool skipped = hidden(layer, mask, b, t);
    float *const dh = dh0 + b * H, *const d = dprojected + token * 3 * H, *const e = drecurrent + token * 3 * H;
    const float *const gate = gates + token * 4 * H, *const before = state_before(layer, h0, y, b, s);
    for_lanes(H, [=](int64_t j, auto lanes) {
      const Vec h = load(dh + j, lanes) + load(dy + token * H + j, lanes), one(1.0f), zero(0.0f);
      if (skipped) {
        store(h, dh + j, lanes);
        for (int k = 0; k < 3; ++k) {
          store(zero, d + k * H + j, lanes);
          store(zero, e + k * H + j, lanes);
        }
        return;
      }
      const Vec r = load(gate + j, lanes), z = load(gate + H + j, lanes), n = load(gate + 2 * H + j, lanes);
      const Vec candidate = h * (one - z) * (one - n * n);
      const Vec update = h * (load(before + j, lanes) - n) * z * (one - z);
      const Vec reset = candidate * load(gate + 3 * H + j, lanes) * r * (one - r);
      store(h * z, dh + j, lanes);
      store(reset, d + j, lanes);
      store(update, d + H + j, lanes);
      store(candidate, d + 2 * H + j, lanes);
      store(reset, e + j, lanes);
      store(update, e + H + j, lanes);
      store(candidate * r, e + 2 * H + j, lanes);
    });
  });
}

void gru_cell(const float* projected, const float* recurrent, const float* h, const int64_t* mask, float* y, int64_t rows,
              int64_t H) {
  parallel_for(rows, kElementwiseGrain / (3 * H + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float *const x = projected + b * 3 * H, *const a = recurrent + b * 3 * H;
      const bool skipped = mask && mask[b] == 0;
      for_lanes(H, [=](int64_t j, auto lanes) {
        const int64_t at = b * H + j;
        Vec out = load(h + at, lanes);
        if (!skipped) {
          const Vec r = sigmoid(load(x + j, lanes) + load(a + j, lanes));
          const Vec z = sigmoid(load(x + H + j, lanes) + load(a + H + j, lanes));
          const Vec n = tanh(fma(r, load(a + 2 * H + j, lanes), load(x + 2 * H + j, lanes)));
          out = fma(z, out - n, n);
        }
        store(out, y + at, lanes);
      });
    }
  });
}

}  // namespace portlm::PORTLM_ISA
