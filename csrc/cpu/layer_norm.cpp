// Layer normalisation with an optional residual add in front, forward and backward.
//
// Memory bound: forward reads x (and the residual) once and writes y (and h) once; the row stays in L1 between the
// three passes over it (mean, variance, normalise). The two-pass variance avoids the cancellation of E[x^2] - E[x]^2.
#include <cmath>

#include "cpu/column_sums.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

// Adds the weight gradients of R rows and writes their input gradients. Four rows at once load and store the weight
// gradients a quarter as often, and their sums overlap.
//
// With xhat = (h - mean) rstd and a = dy * weight: dx = rstd (a - mean(a) - xhat mean(a xhat)).
template <int R>
void backward_rows(const float* dy, const float* dh_in, const float* h, const float* weight, const float* mean,
                   const float* rstd, float* dx, float* dweight, float* dbias, int64_t C) {
  constexpr int64_t kChunk = 32 * Vec::N;  // sums are closed this often, which bounds their rounding error
  Vec a_total[R], ax_total[R];
  for (int r = 0; r < R; ++r) a_total[r] = ax_total[r] = Vec(0.0f);
  for (int64_t c = 0; c < C; c += kChunk) {
    Vec a_sum[R], ax_sum[R];
    for (int r = 0; r < R; ++r) a_sum[r] = ax_sum[r] = Vec(0.0f);
    for_lanes(C - c < kChunk ? C - c : kChunk, [&](int64_t j, auto lanes) {
      const int64_t i = c + j;
      const Vec w = load(weight + i, lanes);
      Vec dw = load(dweight + i, lanes), db = load(dbias + i, lanes);
      for (int r = 0; r < R; ++r) {
        const Vec g = load(dy + r * C + i, lanes), a = g * w;  // 0 in lanes that do not exist
        const Vec xhat = (load(h + r * C + i, lanes) - Vec(mean[r])) * Vec(rstd[r]);
        a_sum[r] += a;
        ax_sum[r] = fma(a, xhat, ax_sum[r]);
        dw = fma(g, xhat, dw);
        db += g;
      }
      store(dw, dweight + i, lanes);
      store(db, dbias + i, lanes);
    });
    for (int r = 0; r < R; ++r) {
      a_total[r] += a_sum[r];
      ax_total[r] += ax_sum[r];
    }
  }
  for (int r = 0; r < R; ++r) {
    const Vec a_mean(sum(a_total[r]) / static_cast<float>(C)), ax_mean(sum(ax_total[r]) / static_cast<float>(C));
    const Vec m(mean[r]), scale(rstd[r]);
    const float *g = dy + r * C, *row = h + r * C, *extra = dh_in ? dh_in + r * C : nullptr;
    float* out = dx + r * C;
    for_lanes(C, [=](int64_t i, auto lanes) {
      const Vec xhat = (load(row + i, lanes) - m) * scale;
      const Vec d = (load(g + i, lanes) * load(weight + i, lanes) - a_mean - xhat * ax_mean) * scale;
      store(extra ? d + load(extra + i, lanes) : d, out + i, lanes);
    });
  }
}

}  // namespace

void layer_norm_fwd(const float* x, const float* residual, const float* weight, const float* bias, float eps, float* y,
                    float* h, float* mean, float* rstd, int64_t rows, int64_t C) {
  if (C == 0) return;
  parallel_for(rows, kElementwiseGrain / C + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + r * C;
      float total[1];
      if (residual) {
        const float *first = row, *second = residual + r * C;
        float* out = h + r * C;
        row_sums<1>(C, total, [=](int64_t i, auto lanes) {
          const Vec s = load(first + i, lanes) + load(second + i, lanes);
          store(s, out + i, lanes);
          return Sums<1>{{s}};
        });
        row = out;
      } else {
        row_sums<1>(C, total, [=](int64_t i, auto lanes) { return Sums<1>{{load(row + i, lanes)}}; });
      }
      const float m = total[0] / static_cast<float>(C);
      row_sums<1>(C, total, [=](int64_t i, auto lanes) {
        const Vec d = keep(load(row + i, lanes) - Vec(m), lanes);
        return Sums<1>{{d * d}};
      });
      const float scale = 1.0f / std::sqrt(total[0] / static_cast<float>(C) + eps);
      float* out = y + r * C;
      for_lanes(C, [=](int64_t i, auto lanes) {
        const Vec xhat = (load(row + i, lanes) - Vec(m)) * Vec(scale);
        store(fma(xhat, load(weight + i, lanes), load(bias + i, lanes)), out + i, lanes);
      });
      if (mean) mean[r] = m;
      if (rstd) rstd[r] = scale;
    }
  });
}

void layer_norm_bwd(const float* dy, const float* dh_in, const float* h, const float* weight, const float* mean,
                    const float* rstd, float* dx, float* dweight, float* dbias, int64_t rows, int64_t C) {
  float* const outs[2] = {dweight, dbias};
  column_sums<2>(rows, C, outs, [=](int64_t first, int64_t last, float* const(&partial)[2]) {
    const auto at = [=](const float* p, int64_t r) { return p ? p + r * C : nullptr; };
    int64_t r = first;
    for (; r + 4 <= last; r += 4)
      backward_rows<4>(at(dy, r), at(dh_in, r), at(h, r), weight, mean + r, rstd + r, dx + r * C, partial[0], partial[1], C);
    for (; r < last; ++r)
      backward_rows<1>(at(dy, r), at(dh_in, r), at(h, r), weight, mean + r, rstd + r, dx + r * C, partial[0], partial[1], C);
  });
}

}  // namespace portlm::PORTLM_ISA
