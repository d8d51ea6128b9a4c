// What recurrent layers share: the order of the steps, who computes what of one, and the product of a state with packed
// weights.
//
// A step needs the whole state before it, so a layer is T products of B rows each: small ones, whose weights are read
// again in every step. They are packed once per call, in panels as wide as the accumulators of a few rows, so that what
// follows a product finds all gates of a unit in registers.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace portlm::PORTLM_ISA {

// Sizes of one layer of one direction: B rows, T tokens, H units.
struct Layer {
  int64_t B, T, H;
  bool reverse;
  // The token that step s reads, and whether there is a step before it.
  int64_t token(int64_t s) const { return reverse ? T - 1 - s : s; }
  int64_t vectors() const { return (H + Vec::N - 1) / Vec::N; }
};

constexpr int64_t kStepGrain = 1 << 17;              // multiply-adds of one step for which a thread is worth waking
constexpr int64_t kPrivateWeights = int64_t{4} << 20;  // bytes that each thread may read for itself in every step

// How many rows a product takes at once, with G vectors each: what fits into the registers.
#if defined(PORTLM_ISA_AVX2)
template <int G>
constexpr int kRowsAtOnce = G == 4 ? 3 : G == 3 ? 4 : G == 2 ? 5 : 8;
#else
template <int G>
constexpr int kRowsAtOnce = G == 4 ? 6 : 8;
#endif

// sum[r][g] = the product of row r of x (R, K), rows x_stride floats apart, with vector g of a panel (K, G * N).
template <int G, int R>
inline void panel_product(const float* x, int64_t x_stride, const float* panel, int64_t K, Vec (&sum)[R][G]) {
  for (int r = 0; r < R; ++r)
    for (int g = 0; g < G; ++g) sum[r][g] = Vec(0.0f);
  for (int64_t k = 0; k < K; ++k) {
    Vec w[G];
    for (int g = 0; g < G; ++g) w[g] = Vec::load(panel + (k * G + g) * Vec::N);
    for (int r = 0; r < R; ++r) {
      const Vec a(x[r * x_stride + k]);
      for (int g = 0; g < G; ++g) sum[r][g] = fma(a, w[g], sum[r][g]);
    }
  }
}

// Calls done(first + r, sum of row r) for `rows` rows, at most kRowsAtOnce<G>.
template <int G, int R = kRowsAtOnce<G>, typename Done>
inline void few_rows(int64_t rows, const float* x, int64_t x_stride, const float* panel, int64_t K, int64_t first, Done done) {
  if constexpr (R > 1)
    if (rows < R) return few_rows<G, R - 1>(rows, x, x_stride, panel, K, first, done);
  Vec sum[R][G];
  panel_product<G, R>(x, x_stride, panel, K, sum);
  for (int r = 0; r < R; ++r) done(first + r, sum[r]);
}

// The same for rows [begin, end), in parts of about equal size.
template <int G, typename Done>
inline void all_rows(int64_t begin, int64_t end, const float* x, int64_t x_stride, const float* panel, int64_t K, Done done) {
  constexpr int64_t kMost = kRowsAtOnce<G>;
  const int64_t rows = end - begin, parts = (rows + kMost - 1) / kMost;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t b = begin + rows * p / parts, e = begin + rows * (p + 1) / parts;
    few_rows<G>(e - b, x + b * x_stride, x_stride, panel, K, b, done);
  }
}

// Packs weight (G * H, H), gate by gate, as panels (vectors of H, H, G, N), with zeros beyond H.
template <int G>
inline void pack_gates(const float* weight, int64_t H, float* panels) {
  const int64_t vectors = (H + Vec::N - 1) / Vec::N;
  parallel_for(vectors, kElementwiseGrain / (H * G * Vec::N + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      float* const panel = panels + v * H * G * Vec::N;
      for (int g = 0; g < G; ++g)
        for (int64_t lane = 0; lane < Vec::N; ++lane) {
          const int64_t unit = v * Vec::N + lane;
          float* const column = panel + g * Vec::N + lane;
          if (unit < H)
            for (int64_t k = 0; k < H; ++k) column[k * G * Vec::N] = weight[(g * H + unit) * H + k];
          else
            for (int64_t k = 0; k < H; ++k) column[k * G * Vec::N] = 0.0f;
        }
    }
  });
}

constexpr int kColumns = 2;  // vectors of a panel of the transposed product

// Packs weight (K, H) as panels of columns (pairs of vectors of H, K, 2 * N), with zeros beyond H.
inline void pack_columns(const float* weight, int64_t K, int64_t H, float* panels) {
  constexpr int64_t kWidth = kColumns * Vec::N;
  parallel_for((H + kWidth - 1) / kWidth, kElementwiseGrain / (K * kWidth + 1) + 1, [=](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t k = 0; k < K; ++k)
        for (int64_t j = 0; j < kWidth; ++j) {
          const int64_t unit = p * kWidth + j;
          panels[(p * K + k) * kWidth + j] = unit < H ? weight[k * H + unit] : 0.0f;
        }
  });
}

// Whether each thread takes some rows through all steps, without waiting for others in between. Otherwise the threads
// share the units of every step, and each reads its part of the weights only.
inline bool by_rows(const Layer& layer, int64_t weights) {
  return layer.B >= threads_here() && weights * static_cast<int64_t>(sizeof(float)) <= kPrivateWeights;
}

// For every step and row: done(b, t, unit, lanes, sums, before), where sums holds weight (G * H, H) times the state before
// for one vector of units, gate by gate, and `before` points to this row's state before. done writes the state y (B, T, H).
template <int G, typename Done>
inline void forward_steps(const Layer& layer, const float* weight, const float* h0, const float* y, Done done) {
  const int64_t B = layer.B, T = layer.T, H = layer.H, vectors = layer.vectors();
  if (B <= 0 || T <= 0 || H <= 0) return;
  thread_local Scratch scratch;
  float* const panels = scratch.floats(vectors * Vec::N * H * G);
  pack_gates<G>(weight, H, panels);
  const auto step = [=](int64_t s, int64_t b0, int64_t b1, int64_t v0, int64_t v1) {
    const int64_t t = layer.token(s);
    const float* const before = s == 0 ? h0 : y + layer.token(s - 1) * H;
    const int64_t stride = s == 0 ? H : T * H;
    for (int64_t v = v0; v < v1; ++v)
      all_rows<G>(b0, b1, before, stride, panels + v * H * G * Vec::N, H, [=](int64_t b, const Vec(&sums)[G]) {
        const int64_t unit = v * Vec::N;
        if (unit + Vec::N <= H)
          done(b, t, unit, Whole{}, sums, before + b * stride);
        else
          done(b, t, unit, First{H - unit}, sums, before + b * stride);
      });
  };
  const int64_t work = G * H * H;  // of one row in one step
  if (by_rows(layer, work)) {
    parallel_for(B, kStepGrain / (work * T) + 1, [=](int64_t b0, int64_t b1) {
      for (int64_t s = 0; s < T; ++s) step(s, b0, b1, 0, vectors);
    });
  } else {
    for (int64_t s = 0; s < T; ++s)
      parallel_for(vectors, kStepGrain / (B * G * H * Vec::N) + 1, [=](int64_t v0, int64_t v1) { step(s, 0, B, v0, v1); });
  }
}

// The steps backwards. For each row of one, first(b, t, s) turns the gradient of the state after it, in dh (B, H), into that
// of the sums, grads (B, T, K), and into what reaches the state before past the product, in dh again; then grads times weight
// (K, H) is added to dh.
template <typename First>
inline void backward_steps(const Layer& layer, const float* weight, int64_t K, const float* grads, float* dh, First first) {
  const int64_t B = layer.B, T = layer.T, H = layer.H;
  constexpr int64_t kWidth = kColumns * Vec::N;
  const int64_t count = (H + kWidth - 1) / kWidth;
  if (B <= 0 || T <= 0 || H <= 0) return;
  thread_local Scratch scratch;
  float* const panels = scratch.floats(count * kWidth * K);
  pack_columns(weight, K, H, panels);
  const auto product = [=](int64_t s, int64_t b0, int64_t b1, int64_t p0, int64_t p1) {
    const float* const x = grads + layer.token(s) * K;
    for (int64_t p = p0; p < p1; ++p)
      all_rows<kColumns>(b0, b1, x, T * K, panels + p * K * kWidth, K, [=](int64_t b, const Vec(&sums)[kColumns]) {
        for (int g = 0; g < kColumns; ++g) {
          const int64_t unit = p * kWidth + g * Vec::N, left = H - unit;
          float* const out = dh + b * H + unit;
          if (left >= Vec::N)
            (Vec::load(out) + sums[g]).store(out);
          else if (left > 0)
            (Vec::load(out, left) + sums[g]).store(out, left);
        }
      });
  };
  const int64_t work = K * H;
  if (by_rows(layer, work)) {
    parallel_for(B, kStepGrain / (work * T) + 1, [=](int64_t b0, int64_t b1) {
      for (int64_t s = T - 1; s >= 0; --s) {
        for (int64_t b = b0; b < b1; ++b) first(b, layer.token(s), s);
        product(s, b0, b1, 0, count);
      }
    });
  } else {
    for (int64_t s = T - 1; s >= 0; --s) {
      parallel_for(B, kElementwiseGrain / (K + 1) + 1, [=](int64_t b0, int64_t b1) {
        for (int64_t b = b0; b < b1; ++b) first(b, layer.token(s), s);
      });
      parallel_for(count, kStepGrain / (B * K * kWidth) + 1, [=](int64_t p0, int64_t p1) { product(s, 0, B, p0, p1); });
    }
  }
}

// The state before step s of row b: y (B, T, H) holds those after each token.
inline const float* state_before(const Layer& layer, const float* h0, const float* y, int64_t b, int64_t s) {
  return s == 0 ? h0 + b * layer.H : y + (b * layer.T + layer.token(s - 1)) * layer.H;
}

// Whether the mask (B, T), or nullptr, hides a token.
inline bool hidden(const Layer& layer, const int64_t* mask, int64_t b, int64_t t) {
  return mask && mask[b * layer.T + t] == 0;
}

// Writes n zeros.
inline void clear(float* x, int64_t n) {
  for_lanes(n, [=](int64_t i, auto lanes) { store(Vec(0.0f), x + i, lanes); });
}

}  // namespace portlm::PORTLM_ISA
