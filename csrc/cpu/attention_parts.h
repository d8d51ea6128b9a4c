// What attention in float32 and with rounded products have in common: how a problem lies in memory, and the softmax.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/gemm_grid.h"
#include "cpu/vecmath.h"

namespace portlm::PORTLM_ISA {

// Scores in flight, chosen to stay in L1: kTileRows x kKeys forward, two of kBlock x kBlock backward.
constexpr int64_t kKeys = 128;
constexpr int64_t kBlock = 64;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Where an array (B, T, heads, D) lies: floats from batch to batch, from row to row and from head to head.
struct Layout {
  int64_t batch, row, head;
};
inline Layout layout(const int64_t* strides, int which) {
  return {strides[3 * which], strides[3 * which + 1], strides[3 * which + 2]};
}

inline void fill(float value, float* p, int64_t count) {
  for_lanes(count, [=](int64_t i, auto lanes) { store(Vec(value), p + i, lanes); });
}

inline void scale_by(float factor, float* p, int64_t count) {
  for_lanes(count, [=](int64_t i, auto lanes) { store(load(p + i, lanes) * Vec(factor), p + i, lanes); });
}

inline float dot(const float* a, const float* b, int64_t n) {
  float out[1];
  row_sums(n, out, [=](int64_t i, auto lanes) { return Sums<1>{{keep(load(a + i, lanes) * load(b + i, lanes), lanes)}}; });
  return out[0];
}

// Turns G rows of scores, kKeys apart, into exp(score - top), where top rises to the largest score of the row, and adds
// the row's sum to total, which is first scaled by exp(old top - new top); so is `shrink`. G rows at once, because the
// reductions of one row are a chain of dependent operations. If masked, a row may have nothing but -inf.
template <int G>
inline void exponentials(float* rows, int64_t width, bool masked, float* top, float* total, float* shrink) {
  Vec m[G], s[G];
  for (int g = 0; g < G; ++g) m[g] = Vec(top[g]), s[g] = Vec(0.0f);
  for (int64_t j = 0; j < width; j += Vec::N)
    for (int g = 0; g < G; ++g) m[g] = max(Vec::load(rows + g * kKeys + j), m[g]);
  for (int g = 0; g < G; ++g) {
    const float before = top[g];
    top[g] = hmax(m[g]);
    m[g] = Vec(top[g] == kHidden && masked ? 0.0f : top[g]);
    shrink[g] = before == kHidden ? 0.0f : std::exp(before - top[g]);
  }
  for (int64_t j = 0; j < width; j += Vec::N)
    for (int g = 0; g < G; ++g) {
      const Vec e = exp(Vec::load(rows + g * kKeys + j) - m[g]);
      e.store(rows + g * kKeys + j);
      s[g] += e;
    }
  for (int g = 0; g < G; ++g) total[g] = total[g] * shrink[g] + sum(s[g]);
}

// T queries of width D and S keys, of which the last query is the last. What a query sees of them: if causal, nothing behind
// its own place, and of that only the last `window` if there is one; nothing where mask (S) is 0, if there is one.
// softcap c, if not 0, makes a score s to c tanh(s / c), and bias, where there is one, is added to it: row t of it begins at
// bias + t * S.
struct Shape {
  int64_t T, S, D;
  bool causal;
  const int64_t* mask = nullptr;
  int64_t window = 0;
  float softcap = 0.0f;
  const float* bias = nullptr;
  int64_t end(int64_t queries) const { return causal ? S - T + queries : S; }  // keys before which so many queries see
  int64_t begin(int64_t query) const { return window ? max(0, S - T + query - window + 1) : 0; }  // the first key it sees
  bool may_hide_rows() const { return mask || window || bias; }
};

// Replaces what a query does not see among its scores of keys [j0, j0 + n), and what lies behind them up to `width`.
inline void hide(const Shape& s, int64_t query, int64_t j0, int64_t n, int64_t width, float value, float* row) {
  const int64_t visible = max(0, min(n, s.end(query + 1) - j0));
  fill(value, row + visible, width - visible);
  if (s.window) fill(value, row, max(0, min(visible, s.begin(query) - j0)));
}

// Which of the keys [j0, j0 + n) the mask hides: their number, and their places among these.
struct HiddenKeys {
  int64_t count = 0;
  int64_t places[kKeys];
  HiddenKeys(const int64_t* mask, int64_t j0, int64_t n) {
    if (mask)
      for (int64_t j = 0; j < n; ++j)
        if (mask[j0 + j] == 0) places[count++] = j;
  }
  void fill(float value, float* row) const {
    for (int64_t i = 0; i < count; ++i) row[places[i]] = value;
  }
};

// Scores of a row, n of them, with the soft cap; they are followed by room up to a whole vector.
inline void cap(float softcap, float* row, int64_t n) {
  for (int64_t j = 0; j < n; j += Vec::N) (tanh(Vec::load(row + j) * Vec(1.0f / softcap)) * Vec(softcap)).store(row + j);
}

inline void add(const float* x, float* row, int64_t n) {
  for_lanes(n, [=](int64_t j, auto lanes) { store(load(row + j, lanes) + load(x + j, lanes), row + j, lanes); });
}

// Turns G rows of scores, kBlock apart, into weights, and the gradients of the weights into those of the scores before
// the soft cap and before scaling. stats holds two numbers per row, see kernels.def, and delta the row's sum of weight times
// gradient.
template <int G, bool kCapped>
inline void weigh_rows(float* weights, float* dscores, int64_t n, const float* stats, const float* delta, float scale,
                       float softcap) {
  for (int64_t j = 0; j < n; j += Vec::N)
    for (int g = 0; g < G; ++g) {
      float *const weight = weights + g * kBlock + j, *const dscore = dscores + g * kBlock + j;
      Vec score = Vec::load(weight), factor(scale);
      if constexpr (kCapped) {
        const Vec t = tanh(score * Vec(1.0f / softcap));
        score = t * Vec(softcap);
        factor = (Vec(1.0f) - t * t) * factor;
      }
      const Vec e = exp(score - Vec(stats[2 * g])) * Vec(stats[2 * g + 1]);
      e.store(weight);
      (e * (Vec::load(dscore) - Vec(delta[g])) * factor).store(dscore);
    }
}

// The same for R rows.
template <bool kCapped>
inline void weigh_all(int64_t R, float* weights, float* dscores, int64_t n, const float* stats, const float* delta, float scale,
                      float softcap) {
  int64_t r = 0;
  for (; r + 4 <= R; r += 4)
    weigh_rows<4, kCapped>(weights + r * kBlock, dscores + r * kBlock, n, stats + 2 * r, delta + r, scale, softcap);
  for (; r < R; ++r)
    weigh_rows<1, kCapped>(weights + r * kBlock, dscores + r * kBlock, n, stats + 2 * r, delta + r, scale, softcap);
}
inline void weigh(int64_t R, float* weights, float* dscores, int64_t n, const float* stats, const float* delta, float scale,
                  float softcap) {
  if (softcap != 0.0f) return weigh_all<true>(R, weights, dscores, n, stats, delta, scale, softcap);
  weigh_all<false>(R, weights, dscores, n, stats, delta, scale, softcap);
}

// One query head's part of the gradients: dq is overwritten, dk and dv are added to. All pointers are of that head.
struct Head {
  const float *q, *out, *dout, *stats;
  float *dq, *dk, *dv;
  int64_t q_row, out_row, dq_row, dk_row, dv_row;
  float* dbias = nullptr;  // (T, S), added to
};

// What of a head's gradients a task of the backward pass makes, from the scores of these queries and keys: dq of all the
// queries, if for_queries, and dk and dv of all the keys, if for_keys. Beginnings are multiples of kBlock.
struct BackwardPart {
  Range queries, keys;
  bool for_queries, for_keys;
  int64_t first_query(bool causal) const { return causal && keys.begin > queries.begin ? keys.begin : queries.begin; }
  // Behind the last query that sees one of the keys: a window is there for causal attention alone, in which T = S.
  int64_t last_query(int64_t window) const {
    return window ? min(queries.end, keys.end - 1 + window) : queries.end;
  }
};

// The first key of those that a block of queries from i0 on sees, or the block of keys that holds it.
inline int64_t first_block(const Shape& s, int64_t i0, const BackwardPart& part) {
  return max(part.keys.begin, s.begin(i0) / kBlock * kBlock);
}

// How many chunks of queries, and as many of keys, the backward pass of each head is cut into: 1 where there are heads for
// all threads, and then one task makes all gradients of a head and computes its scores once. With more, each score is
// computed for its query and again for its key: 7 products and not 5, on more threads. Sums have the same order either way.
inline int64_t backward_chunks(int64_t heads, int64_t T, int64_t threads) {
  constexpr int64_t kEach = 4;  // tasks per thread of either kind, which evens them out
  return heads >= threads ? 1 : max(1, min(ceil_div(T, kBlock), ceil_div(kEach * threads, heads)));
}

// Task t of the 2 chunks of one head, or the only one: a chunk of queries, which sees the more keys the later it is, and then
// the same of keys, which are seen by the fewer queries.
inline BackwardPart backward_part(int64_t t, int64_t chunks, int64_t T, int64_t S) {
  if (chunks == 1) return {{0, T}, {0, S}, true, true};
  const int64_t all = t % 2 ? S : T;  // of those that are cut
  const Range blocks = share(ceil_div(all, kBlock), t / 2, chunks);
  const Range some{min(all, blocks.begin * kBlock), min(all, blocks.end * kBlock)};
  if (t % 2) return {{0, T}, some, false, true};
  return {some, {0, S}, true, false};
}

}  // namespace portlm::PORTLM_ISA
