// Elman's network (1990), h' = tanh(projected + W h) or relu of it: a layer over a whole sequence, forward and backward, and
// one step of it behind its two products.
#include "cpu/kernels.h"
#include "cpu/recurrent.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

namespace {

inline Vec activated(Vec x, int relu) { return relu ? where_lt(x, Vec(0.0f), Vec(0.0f), x) : tanh(x); }  // NaN stays NaN

}  // namespace

void rnn_fwd(const float* projected, const float* weight, const float* h0, const int64_t* mask, float* y, int64_t B, int64_t T,
             int64_t H, int relu, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  forward_steps<1>(layer, weight, h0, y, [=](int64_t b, int64_t t, int64_t unit, auto lanes, const Vec(&sums)[1], const float* before) {
    const int64_t at = (b * T + t) * H + unit;
    if (hidden(layer, mask, b, t)) return store(load(before + unit, lanes), y + at, lanes);
    store(activated(load(projected + at, lanes) + sums[0], relu), y + at, lanes);
  });
}

void rnn_bwd(const float* dy, const float* weight, const int64_t* mask, const float* y, float* dprojected, float* dh0,
             int64_t B, int64_t T, int64_t H, int relu, int reverse) {
  const Layer layer{B, T, H, reverse != 0};
  clear(dh0, B * H);
  backward_steps(layer, weight, H, dprojected, dh0, [=](int64_t b, int64_t t, int64_t) {
    const int64_t token = b * T + t;
    const bool skipped = hidden(layer, mask, b, t);
    float* const dh = dh0 + b * H;
    for_lanes(H, [=](int64_t j, auto lanes) {
      const int64_t at = token * H + j;
      const Vec h = load(dh + j, lanes) + load(dy + at, lanes), state = load(y + at, lanes), zero(0.0f);
      const Vec inner = relu ? where_lt(zero, state, h, zero) : h * (Vec(1.0f) - state * state);
      store(skipped ? h : zero, dh + j, lanes);
      store(skipped ? zero : inner, dprojected + at, lanes);
    });
  });
}

void rnn_cell(const float* projected, const float* recurrent, const float* h, const int64_t* mask, float* y, int64_t rows,
              int64_t H, int relu) {
  parallel_for(rows, kElementwiseGrain / (H + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const bool skipped = mask && mask[b] == 0;
      for_lanes(H, [=](int64_t j, auto lanes) {
        const int64_t at = b * H + j;
        const Vec sum = load(projected + at, lanes) + load(recurrent + at, lanes);
        store(skipped ? load(h + at, lanes) : activated(sum, relu), y + at, lanes);
      });
    }
  });
}

}  // namespace portlm::PORTLM_ISA
