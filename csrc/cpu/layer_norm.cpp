// Layer normalisation with an optional residual add in front, forward and backward.
//
// Memory bound: forward reads x (and the residual) once and writes y (and h) once; the row stays in L1 between the
// three passes over it (mean, variance, normalise). The two-pass variance avoids the cancellation of E[x^2] - E[x]^2.
#include <cstddef>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {
namespace {

// Rows are added up in blocks of this many, whatever the number of threads, so that weight gradients are reproducible.
constexpr int64_t kRowsPerBlock = 64;
constexpr int64_t kGrain = 1 << 14;  // floats below which a second thread costs more than it brings

float row_sum(const float* x, int64_t C) {
  Vec s(0.0f);
  float tail = 0.0f;
  for_each_vec(C, [&](int64_t i) { s += Vec::load(x + i); }, [&](int64_t i, int64_t n) { tail = sum(Vec::load(x + i, n)); });
  return sum(s) + tail;
}

}  // namespace

void layer_norm_fwd(const float* x, const float* residual, const float* weight, const float* bias, float eps, float* y,
                    float* h, float* mean, float* rstd, int64_t rows, int64_t C) {
  if (C == 0) return;
  parallel_for(rows, kGrain / C + 1, [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + r * C;
      if (residual) {
        const float* add = residual + r * C;
        float* out = h + r * C;
        for_each_vec(
            C, [&](int64_t i) { (Vec::load(row + i) + Vec::load(add + i)).store(out + i); },
            [&](int64_t i, int64_t n) { (Vec::load(row + i, n) + Vec::load(add + i, n)).store(out + i, n); });
        row = out;
      }
      const float m = row_sum(row, C) / static_cast<float>(C);
      Vec square(0.0f);
      float square_tail = 0.0f;
      for_each_vec(
          C,
          [&](int64_t i) {
            const Vec d = Vec::load(row + i) - Vec(m);
            square = fma(d, d, square);
          },
          [&](int64_t i, int64_t n) {
            for (int64_t j = i; j < i + n; ++j) square_tail += (row[j] - m) * (row[j] - m);
          });
      const float scale = 1.0f / std::sqrt((sum(square) + square_tail) / static_cast<float>(C) + eps);
      float* out = y + r * C;
      for_each_vec(
          C,
          [&](int64_t i) {
            fma((Vec::load(row + i) - Vec(m)) * Vec(scale), Vec::load(weight + i), Vec::load(bias + i)).store(out + i);
          },
          [&](int64_t i, int64_t n) {
            fma((Vec::load(row + i, n) - Vec(m)) * Vec(scale), Vec::load(weight + i, n), Vec::load(bias + i, n)).store(out + i, n);
          });
      if (mean) mean[r] = m;
      if (rstd) rstd[r] = scale;
    }
  });
}

void layer_norm_bwd(const float* dy, const float* dh_in, const float* h, const float* weight, const float* mean,
                    const float* rstd, float* dx, float* dweight, float* dbias, int64_t rows, int64_t C) {
  const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
  std::vector<float> partial(static_cast<size_t>(2 * blocks * C), 0.0f);  // (blocks, 2, C)
  parallel_for(blocks, kGrain / (kRowsPerBlock * C + 1) + 1, [&](int64_t block_begin, int64_t block_end) {
    for (int64_t b = block_begin; b < block_end; ++b) {
      float* dw = partial.data() + 2 * b * C;
      float* db = dw + C;
      const int64_t last = (b + 1) * kRowsPerBlock < rows ? (b + 1) * kRowsPerBlock : rows;
      for (int64_t r = b * kRowsPerBlock; r < last; ++r) {
        const float *g = dy + r * C, *row = h + r * C;
        const float m = mean[r], scale = rstd[r];
        // With xhat = (h - mean) rstd and a = dy * weight: dx = rstd (a - mean(a) - xhat mean(a xhat)).
        Vec a_sum(0.0f), ax_sum(0.0f);
        float a_tail = 0.0f, ax_tail = 0.0f;
        for_each_vec(
            C,
            [&](int64_t i) {
              const Vec gi = Vec::load(g + i), xhat = (Vec::load(row + i) - Vec(m)) * Vec(scale), a = gi * Vec::load(weight + i);
              a_sum += a;
              ax_sum = fma(a, xhat, ax_sum);
              fma(gi, xhat, Vec::load(dw + i)).store(dw + i);
              (Vec::load(db + i) + gi).store(db + i);
            },
            [&](int64_t i, int64_t n) {
              for (int64_t j = i; j < i + n; ++j) {
                const float xhat = (row[j] - m) * scale, a = g[j] * weight[j];
                a_tail += a;
                ax_tail += a * xhat;
                dw[j] += g[j] * xhat;
                db[j] += g[j];
              }
            });
        const float a_mean = (sum(a_sum) + a_tail) / static_cast<float>(C);
        const float ax_mean = (sum(ax_sum) + ax_tail) / static_cast<float>(C);
        const float* extra = dh_in ? dh_in + r * C : nullptr;
        float* out = dx + r * C;
        const auto part = [&](Vec gi, Vec hi, Vec wi) {
          const Vec xhat = (hi - Vec(m)) * Vec(scale);
          return (gi * wi - Vec(a_mean) - xhat * Vec(ax_mean)) * Vec(scale);
        };
        for_each_vec(
            C,
            [&](int64_t i) {
              const Vec d = part(Vec::load(g + i), Vec::load(row + i), Vec::load(weight + i));
              (extra ? d + Vec::load(extra + i) : d).store(out + i);
            },
            [&](int64_t i, int64_t n) {
              const Vec d = part(Vec::load(g + i, n), Vec::load(row + i, n), Vec::load(weight + i, n));
              (extra ? d + Vec::load(extra + i, n) : d).store(out + i, n);
            });
      }
    }
  });
  for (int64_t i = 0; i < C; ++i) {
    float w = 0.0f, b = 0.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      w += partial[static_cast<size_t>(2 * block * C + i)];
      b += partial[static_cast<size_t>((2 * block + 1) * C + i)];
    }
    dweight[i] = w;
    dbias[i] = b;
  }
}

}  // namespace portlm::PORTLM_ISA
