// Additive attention (Bahdanau et al. 2015): the score of a query and a key is a weighted sum over tanh of their sum.
#include <limits>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {
namespace {

// Rows of S keys for which a thread is worth waking; tanh costs about as much as ten multiply-adds.
int64_t grain(int64_t S, int64_t A, int64_t C) { return kElementwiseGrain / (S * (8 * A + C) + 1) + 1; }

float product(const float* a, const float* b, int64_t n) {
  float sum[1];
  row_sums<1>(n, sum, [=](int64_t i, auto lanes) {
    return Sums<1>{{keep(load(a + i, lanes) * load(b + i, lanes), lanes)}};
  });
  return sum[0];
}

void add_scaled(float scale, const float* x, float* y, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(fma(Vec(scale), load(x + i, lanes), load(y + i, lanes)), y + i, lanes); });
}

void clear_floats(float* x, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(Vec(0.0f), x + i, lanes); });
}

}  // namespace

void additive_attention_fwd(const float* query, const float* keys, const float* values, const float* v, const int64_t* mask,
                            float* context, float* weights, int64_t B, int64_t T, int64_t S, int64_t A, int64_t C) {
  parallel_for(B * T, grain(S, A, C), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / T;
      const int64_t* const real = mask ? mask + b * S : nullptr;
      const float* const q = query + row * A;
      float *const w = weights + row * S, *const y = context + row * C;
      float largest = -std::numeric_limits<float>::infinity();
      clear_floats(y, C);
      for (int64_t s = 0; s < S; ++s) {
        w[s] = 0.0f;
        if (real && real[s] == 0) continue;
        const float* const k = keys + (b * S + s) * A;
        float sum[1];
        row_sums<1>(A, sum, [=](int64_t i, auto lanes) {
          return Sums<1>{{keep(load(v + i, lanes) * tanh(load(q + i, lanes) + load(k + i, lanes)), lanes)}};
        });
        w[s] = sum[0];
        if (!(w[s] <= largest)) largest = w[s];  // NaN becomes the largest, and with it the whole row
      }
      for_lanes(S, [=](int64_t s, auto lanes) { store(exp(load(w + s, lanes) - Vec(largest)), w + s, lanes); });
      float total = 0.0f;
      for (int64_t s = 0; s < S; ++s) {
        if (real && real[s] == 0) w[s] = 0.0f;
        total += w[s];
      }
      for (int64_t s = 0; s < S; ++s) {
        if (real && real[s] == 0) continue;
        w[s] /= total;
        add_scaled(w[s], values + (b * S + s) * C, y, C);
      }
    }
  });
}

void additive_attention_bwd(const float* dcontext, const float* dweights, const float* query, const float* keys,
                            const float* values, const float* v, const int64_t* mask, const float* weights, float* dscores,
                            float* dquery, float* dkeys, float* dvalues, float* dv, int64_t B, int64_t T, int64_t S, int64_t A,
                            int64_t C) {
  parallel_for(B, grain(T * S, 2 * A, C), [=](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* const real = mask ? mask + b * S : nullptr;
      float* const dv_b = dv + b * A;
      clear_floats(dkeys + b * S * A, S * A);
      clear_floats(dvalues + b * S * C, S * C);
      clear_floats(dv_b, A);
      for (int64_t t = 0; t < T; ++t) {
        const int64_t row = b * T + t;
        const float *const w = weights + row * S, *const q = query + row * A;
        float *const d = dscores + row * S, *const dq = dquery + row * A;
        clear_floats(dq, A);
        for (int64_t s = 0; s < S; ++s) {
          d[s] = dweights ? dweights[row * S + s] : 0.0f;
          if (dcontext) d[s] += product(dcontext + row * C, values + (b * S + s) * C, C);
        }
        const float mean = product(w, d, S);
        for (int64_t s = 0; s < S; ++s) {
          d[s] = w[s] * (d[s] - mean);
          if (real && real[s] == 0) continue;
          const float* const k = keys + (b * S + s) * A;
          float* const dk = dkeys + (b * S + s) * A;
          const Vec scale(d[s]);
          for_lanes(A, [=](int64_t i, auto lanes) {
            const Vec h = tanh(load(q + i, lanes) + load(k + i, lanes));
            const Vec inner = scale * load(v + i, lanes) * (Vec(1.0f) - h * h);
            store(load(dq + i, lanes) + inner, dq + i, lanes);
            store(load(dk + i, lanes) + inner, dk + i, lanes);
            store(fma(scale, h, load(dv_b + i, lanes)), dv_b + i, lanes);
          });
          if (dcontext) add_scaled(w[s], dcontext + row * C, dvalues + (b * S + s) * C, C);
        }
      }
    }
  });
}

}  // namespace portlm::PORTLM_ISA
