// Root-mean-square normalisation with an optional residual add in front, forward and backward.
//
// Memory bound like layer_norm, and simpler: there is no mean to subtract.
#include <cmath>

#include "cpu/column_sums.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

// Adds the weight gradient of R rows and writes their input gradients; see layer_norm.cpp for why four at once.
//
// With xhat = h rstd and a = dy * weight: dx = rstd (a - xhat mean(a xhat)).
template <int R>
void backward_rows(const float* dy, const float* dh_in, const float* h, const float* weight, const float* rstd, float* dx,
                   float* dweight, int64_t C) {
  constexpr int64_t kChunk = 32 * Vec::N;  // sums are closed this often, which bounds their rounding error
  Vec total[R];
  for (int r = 0; r < R; ++r) total[r] = Vec(0.0f);
  for (int64_t c = 0; c < C; c += kChunk) {
    Vec ax_sum[R];
    for (int r = 0; r < R; ++r) ax_sum[r] = Vec(0.0f);
    for_lanes(C - c < kChunk ? C - c : kChunk, [&](int64_t j, auto lanes) {
      const int64_t i = c + j;
      const Vec w = load(weight + i, lanes);
      Vec dw = load(dweight + i, lanes);
      for (int r = 0; r < R; ++r) {
        const Vec g = load(dy + r * C + i, lanes), xhat = load(h + r * C + i, lanes) * Vec(rstd[r]), gx = g * xhat;
        ax_sum[r] = fma(gx, w, ax_sum[r]);
        dw += gx;
      }
      store(dw, dweight + i, lanes);
    });
    for (int r = 0; r < R; ++r) total[r] += ax_sum[r];
  }
  for (int r = 0; r < R; ++r) {
    const Vec scale(rstd[r]), pull(sum(total[r]) / static_cast<float>(C));
    const float *g = dy + r * C, *row = h + r * C, *extra = dh_in ? dh_in + r * C : nullptr;
    float* out = dx + r * C;
    for_lanes(C, [=](int64_t i, auto lanes) {
      const Vec xhat = load(row + i, lanes) * scale;
      const Vec d = (load(g + i, lanes) * load(weight + i, lanes) - xhat * pull) * scale;
      store(extra ? d + load(extra + i, lanes) : d, out + i, lanes);
    });
  }
}

}  // namespace

void rms_norm_fwd(const float* x, const float* residual, const float* weight, float eps, float* y, float* h, float* rstd,
                  int64_t rows, int64_t C) {
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
          return Sums<1>{{s * s}};
        });
        row = out;
      } else {
        row_sums<1>(C, total, [=](int64_t i, auto lanes) {
          const Vec s = load(row + i, lanes);
          return Sums<1>{{s * s}};
        });
      }
      const float scale = 1.0f / std::sqrt(total[0] / static_cast<float>(C) + eps);
      float* out = y + r * C;
      for_lanes(C, [=](int64_t i, auto lanes) {
        store(load(row + i, lanes) * Vec(scale) * load(weight + i, lanes), out + i, lanes);
      });
      if (rstd) rstd[r] = scale;
    }
  });
}

void rms_norm_bwd(const float* dy, const float* dh_in, const float* h, const float* weight, const float* rstd, float* dx,
                  float* dweight, int64_t rows, int64_t C) {
  float* const outs[1] = {dweight};
  column_sums<1>(rows, C, outs, [=](int64_t first, int64_t last, float* const(&partial)[1]) {
    const auto at = [=](const float* p, int64_t r) { return p ? p + r * C : nullptr; };
    int64_t r = first;
    for (; r + 4 <= last; r += 4)
      backward_rows<4>(at(dy, r), at(dh_in, r), at(h, r), weight, rstd + r, dx + r * C, partial[0], C);
    for (; r < last; ++r)
      backward_rows<1>(at(dy, r), at(dh_in, r), at(h, r), weight, rstd + r, dx + r * C, partial[0], C);
  });
}

}  // namespace portlm::PORTLM_ISA
