// Attention, softmax(q k^T scale) v, forward and backward, without a T x T matrix in memory (Dao et al. 2022).
//
// A task is one key/value head of one sequence, with all the query heads that share it: its keys and values are packed
// once for the register tiles of gemm_tile.h. Forward, up to kTileRows queries at a time go through blocks of kKeys
// keys with an online softmax (Milakov and Gimelshein 2018). Backward recomputes the weights of a block of queries and
// keys from each query's largest score and the sum of its exponentials: the same bits as forward, which one saved
// logarithm of the two would not give. A causal block computes only the tiles that some query of it sees.
#include "cpu/attention.h"

#include <initializer_list>

#include "cpu/attention_parts.h"
#include "cpu/gemm.h"
#include "cpu/gemm_tile.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

// Rows 0 .. T of x (T, D) as columns of panels, for products with x^T: panel p holds rows p * kTileCols and following.
void pack_as_columns(const float* x, int64_t ld, int64_t T, int64_t D, float* panels) {
  for (int64_t t = 0; t < T; t += kTileCols)
    pack_panel_transposed(x + t * ld, ld, D, min(kTileCols, T - t), panels + t * D);
}

// Rows [from, T) of x (T, D) as rows of panels, for products with x: panel p holds columns p * kTileCols and following, and
// room for the rows before.
void pack_as_rows(const float* x, int64_t ld, int64_t from, int64_t T, int64_t D, float* panels) {
  for (int64_t d = 0; d < D; d += kTileCols)
    pack_panel(x + from * ld + d, ld, T - from, min(kTileCols, D - d), panels + d * T + from * kTileCols);
}

// C (R, columns) = A panels, or += it, where A is (R, depth) with lda floats from row to row (or from column to column if
// kTransposed) and panel p starts at panels + p * panel_size. C's columns are written up to a whole panel if `padded`.
template <bool kTransposed>
void times_panels(int64_t R, int64_t depth, const float* A, int64_t lda, const float* panels, int64_t panel_size, float* C,
                  int64_t ldc, int64_t columns, bool padded, bool accumulate) {
  const Tile tile = tile_of<kTransposed>(R);
  for (int64_t j = 0; j < columns; j += kTileCols, panels += panel_size)
    tile(depth, A, lda, panels, {C + j, ldc, padded ? kTileCols : min(kTileCols, columns - j), nullptr, accumulate});
}

// Queries [first, last) of one head. keys: columns times scale, values: rows.
void attend(const Shape& s, const float* q, int64_t q_row, const float* keys, const float* values, int64_t packed_rows,
            float* scores, float* out, int64_t out_row, float* stats, int64_t first, int64_t last) {
  const int64_t panels = ceil_div(last - first, kTileRows);
  const bool hides = s.may_hide_rows();
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t i0 = first + (last - first) * p / panels, R = first + (last - first) * (p + 1) / panels - i0;
    const int64_t end = s.end(i0 + R);
    float top[kTileRows], total[kTileRows], shrink[kTileRows];
    for (int64_t r = 0; r < R; ++r) top[r] = kHidden, total[r] = 0.0f;
    const int64_t start = s.begin(i0) / kKeys * kKeys;
    for (int64_t j0 = start; j0 < end; j0 += kKeys) {
      const int64_t n = min(kKeys, end - j0), width = round_up(n, Vec::N);
      times_panels<false>(R, s.D, q + i0 * q_row, q_row, keys + j0 * s.D, kTileCols * s.D, scores, kKeys, n, true, false);
      // Hidden scores become -inf and then weights of 0. A block that begins right of the diagonal hides whole rows.
      const HiddenKeys hidden(s.mask, j0, n);
      for (int64_t r = 0; r < R; ++r) {
        float* const row = scores + r * kKeys;
        if (s.softcap != 0.0f) cap(s.softcap, row, n);
        if (s.bias) add(s.bias + (i0 + r) * s.S + j0, row, n);
        hide(s, i0 + r, j0, n, width, kHidden, row);
        hidden.fill(kHidden, row);
      }
      int64_t r = 0;
      for (; r + 4 <= R; r += 4) exponentials<4>(scores + r * kKeys, width, hides, top + r, total + r, shrink + r);
      for (; r < R; ++r) exponentials<1>(scores + r * kKeys, width, hides, top + r, total + r, shrink + r);
      if (j0 > start)
        for (r = 0; r < R; ++r) scale_by(shrink[r], out + (i0 + r) * out_row, s.D);
      times_panels<false>(R, n, scores, kKeys, values + j0 * kTileCols, kTileCols * packed_rows, out + i0 * out_row, out_row,
                          s.D, false, j0 > start);
    }
    for (int64_t r = 0; r < R; ++r) {
      const bool blind = hides && total[r] == 0.0f;  // a query that sees nothing gives 0
      const float inverse = blind ? 0.0f : 1.0f / total[r];
      scale_by(inverse, out + (i0 + r) * out_row, s.D);
      if (!stats) continue;
      stats[2 * (i0 + r)] = blind ? 0.0f : top[r];
      stats[2 * (i0 + r) + 1] = inverse;
    }
  }
}

// The packed operands of one task's backward pass and its blocks of scores.
struct Workspace {
  float* keys_as_columns;  // times scale
  float* values_as_columns;
  float* keys_as_rows;
  float* queries;  // kBlock rows of q, as rows
  float* grads;    // kBlock rows of dout, as rows
  float* weights;  // kBlock x kBlock probabilities
  float* dscores;  // kBlock x kBlock gradients with respect to q k^T
};

void differentiate(const Shape& s, const Head& h, const Workspace& w, float scale, const BackwardPart& part) {
  const float factor = h.dbias ? 1.0f : scale;  // the bias is added behind the scale
  for (int64_t i0 = part.first_query(s.causal), stop = part.last_query(s.window); i0 < stop; i0 += kBlock) {
    const int64_t queries = min(kBlock, s.T - i0), start = first_block(s, i0, part);
    if (part.for_keys) {
      pack_as_rows(h.q + i0 * h.q_row, h.q_row, 0, queries, s.D, w.queries);
      pack_as_rows(h.dout + i0 * h.out_row, h.out_row, 0, queries, s.D, w.grads);
    }
    float delta[kBlock];  // sum over the keys of weight * its gradient
    for (int64_t i = 0; i < queries; ++i) delta[i] = dot(h.dout + (i0 + i) * h.out_row, h.out + (i0 + i) * h.out_row, s.D);
    const int64_t end = min(s.end(i0 + queries), part.keys.end);
    for (int64_t j0 = start; j0 < end; j0 += kBlock) {
      const int64_t keys = min(kBlock, end - j0), panels = ceil_div(queries, kTileRows);
      const HiddenKeys hidden(s.mask, j0, keys);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t i = queries * p / panels, R = queries * (p + 1) / panels - i;
        const int64_t n = min(keys, s.end(i0 + i + R) - j0);  // that the last of these rows sees
        if (n <= 0) continue;
        float *weights = w.weights + i * kBlock, *dscores = w.dscores + i * kBlock;
        times_panels<false>(R, s.D, h.q + (i0 + i) * h.q_row, h.q_row, w.keys_as_columns + j0 * s.D, kTileCols * s.D, weights,
                            kBlock, n, true, false);
        times_panels<false>(R, s.D, h.dout + (i0 + i) * h.out_row, h.out_row, w.values_as_columns + j0 * s.D,
                            kTileCols * s.D, dscores, kBlock, n, true, false);
        if (s.bias)
          for (int64_t r = 0; r < R; ++r) add(s.bias + (i0 + i + r) * s.S + j0, weights + r * kBlock, n);
        weigh(R, weights, dscores, n, h.stats + 2 * (i0 + i), delta + i, factor, s.softcap);
        for (int64_t r = 0; r < R; ++r) {
          for (float* const row : {weights + r * kBlock, dscores + r * kBlock}) {
            hide(s, i0 + i + r, j0, n, n, 0.0f, row);
            hidden.fill(0.0f, row);
          }
          if (!h.dbias) continue;
          if (part.for_queries) add(dscores + r * kBlock, h.dbias + (i0 + i + r) * s.S + j0, n);
          scale_by(scale, dscores + r * kBlock, n);
        }
        if (part.for_queries)
          times_panels<false>(R, n, dscores, kBlock, w.keys_as_rows + j0 * kTileCols, kTileCols * s.S,
                            h.dq + (i0 + i) * h.dq_row, h.dq_row, s.D, false, j0 > start);
      }
      const int64_t key_panels = part.for_keys ? ceil_div(keys, kTileRows) : 0;
      for (int64_t p = 0; p < key_panels; ++p) {
        const int64_t j = keys * p / key_panels, R = keys * (p + 1) / key_panels - j;
        const int64_t from = s.causal ? max(0, j0 + j - i0) : 0;  // the first query that sees key j
        const int64_t depth = queries - from, panel = kTileCols * queries;
        times_panels<true>(R, depth, w.weights + from * kBlock + j, kBlock, w.grads + from * kTileCols, panel,
                           h.dv + (j0 + j) * h.dv_row, h.dv_row, s.D, false, true);
        times_panels<true>(R, depth, w.dscores + from * kBlock + j, kBlock, w.queries + from * kTileCols, panel,
                           h.dk + (j0 + j) * h.dk_row, h.dk_row, s.D, false, true);
      }
    }
  }
}

// A whole problem. mask is (B, S); row b and head h of bias begin at bias + b * bias_batch + h * bias_head.
struct Problem {
  const float *q, *k, *v;
  Layout ql, kl, vl;
  float *out, *stats;
  int64_t B, T, S, H, K, D;
  bool causal;
  float scale;
  const int64_t* mask = nullptr;
  int64_t window = 0;
  float softcap = 0.0f;
  const float* bias = nullptr;
  int64_t bias_batch = 0, bias_head = 0;
  Shape shape(int64_t b, int64_t h) const {
    return {T, S, D, causal, mask ? mask + b * S : nullptr, window, softcap, bias ? bias + b * bias_batch + h * bias_head : nullptr};
  }
};

void forward(const Problem& p) {
  const int64_t T = p.T, S = p.S, H = p.H, K = p.K, D = p.D, group = H / K;
  if (p.B <= 0 || T <= 0 || H <= 0 || D <= 0) return;
  // Few heads are cut into chunks of queries, which pack the keys again. Two neighbours in the order 0, last, 1, last - 1,
  // ... have, in sum, as many keys to see as any other two.
  constexpr int64_t kChunk = 128, kEnoughTasks = 64;
  const int64_t chunks = p.B * K >= kEnoughTasks ? 1 : ceil_div(T, kChunk), tasks = p.B * K * chunks;
  const int64_t cycles = (T * S * D * group / 16 + S * D) / chunks + 1;
  parallel_for(tasks, (1 << 13) / cycles + 1, [=](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const int64_t rows = round_up(S, kTileCols), columns = round_up(D, kTileCols);
    float* const keys = scratch.floats(rows * D + S * columns + kTileRows * kKeys);
    float *const values = keys + rows * D, *const scores = values + S * columns;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / chunks, c = task % chunks, b = head / K, kv = head % K;
      const int64_t chunk = c % 2 ? chunks - 1 - c / 2 : c / 2;
      const int64_t first = T * chunk / chunks, last = T * (chunk + 1) / chunks;
      const Shape shape = p.shape(b, 0);
      // A window's keys alone are packed, with room for those before them, which nobody reads.
      const int64_t seen = shape.end(last), from = shape.begin(first) / kKeys * kKeys;
      pack_as_columns(p.k + b * p.kl.batch + kv * p.kl.head + from * p.kl.row, p.kl.row, seen - from, D, keys + from * D);
      scale_by(p.scale, keys + from * D, round_up(seen - from, kTileCols) * D);
      pack_as_rows(p.v + b * p.vl.batch + kv * p.vl.head, p.vl.row, from, seen, D, values);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        attend(p.shape(b, h), p.q + b * p.ql.batch + h * p.ql.head, p.ql.row, keys, values, seen, scores,
               p.out + (b * T * H + h) * D, H * D, p.stats ? p.stats + 2 * (b * H + h) * T : nullptr, first, last);
    }
  });
}

// What the gradients of a problem are made from, and where they go. dbias is nullptr, or (B or 1, H, T, S) where dbias_batch is
// H * T * S or 0; with 0 the rows of the batch are added up one after the other, by whoever has the head.
struct Gradients {
  const float *dout, *out, *stats;
  float *dq, *dk, *dv;
  Layout dql, dkl, dvl;
  float* dbias = nullptr;
  int64_t dbias_batch = 0;
};

void backward(const Problem& p, const Gradients& g) {
  const int64_t T = p.T, S = p.S, H = p.H, K = p.K, D = p.D;
  if (p.B <= 0 || T <= 0 || S <= 0 || H <= 0 || D <= 0) return;
  const int64_t together = g.dbias && g.dbias_batch == 0 ? p.B : 1, groups = p.B / together;
  const int64_t chunks = backward_chunks(groups * K, max(T, S), threads_for(INT64_MAX, 1)), parts = chunks == 1 ? 1 : 2 * chunks;
  parallel_for(groups * K * parts, 1, [=](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    const int64_t rows = round_up(S, kTileCols), columns = round_up(D, kTileCols);
    Workspace w;
    w.keys_as_columns = scratch.floats(2 * rows * D + S * columns + 2 * kBlock * columns + 2 * kBlock * kBlock);
    w.values_as_columns = w.keys_as_columns + rows * D;
    w.keys_as_rows = w.values_as_columns + rows * D;
    w.queries = w.keys_as_rows + S * columns;
    w.grads = w.queries + kBlock * columns;
    w.weights = w.grads + kBlock * columns;
    w.dscores = w.weights + kBlock * kBlock;
    for (int64_t task = begin * together; task < end * together; ++task) {
      const int64_t t = task / together, head = t / parts, kv = head % K, b = head / K * together + task % together;
      const BackwardPart part = backward_part(t % parts, chunks, T, S);
      const Shape shape = p.shape(b, 0);
      const int64_t j0 = part.keys.begin, seen = max(0, min(shape.end(part.queries.end), part.keys.end) - j0);
      const float *key = p.k + b * p.kl.batch + kv * p.kl.head, *value = p.v + b * p.vl.batch + kv * p.vl.head;
      pack_as_columns(key + j0 * p.kl.row, p.kl.row, seen, D, w.keys_as_columns + j0 * D);
      scale_by(p.scale, w.keys_as_columns + j0 * D, round_up(seen, kTileCols) * D);
      pack_as_columns(value + j0 * p.vl.row, p.vl.row, seen, D, w.values_as_columns + j0 * D);
      if (part.for_queries) pack_as_rows(key, p.kl.row, 0, S, D, w.keys_as_rows);
      float *dkey = g.dk + b * g.dkl.batch + kv * g.dkl.head, *dvalue = g.dv + b * g.dvl.batch + kv * g.dvl.head;
      for (int64_t j = part.keys.begin; part.for_keys && j < part.keys.end; ++j) {
        fill(0.0f, dkey + j * g.dkl.row, D);
        fill(0.0f, dvalue + j * g.dvl.row, D);
      }
      for (int64_t h = kv * (H / K); h < (kv + 1) * (H / K); ++h) {
        const int64_t at = (b * T * H + h) * D;
        differentiate(p.shape(b, h),
                      {p.q + b * p.ql.batch + h * p.ql.head, g.out + at, g.dout + at, g.stats + 2 * (b * H + h) * T,
                       g.dq + b * g.dql.batch + h * g.dql.head, dkey, dvalue, p.ql.row, H * D, g.dql.row, g.dkl.row, g.dvl.row,
                       g.dbias ? g.dbias + b * g.dbias_batch + h * T * S : nullptr},
                      w, p.scale, part);
      }
    }
  });
}

}  // namespace

void attention_fwd(const float* q, const float* k, const float* v, const int64_t* strides, float* out, float* stats,
                   int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window,
                   float softcap) {
  forward({q, k, v, layout(strides, 0), layout(strides, 1), layout(strides, 2), out, stats, B, T, T, H, K, D, causal != 0, scale,
           nullptr, window, softcap});
}

void attention_bwd(const float* dout, const float* q, const float* k, const float* v, const int64_t* strides, const float* out,
                   const float* stats, float* dq, float* dk, float* dv, const int64_t* grad_strides, int64_t B, int64_t T,
                   int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window, float softcap) {
  backward({q, k, v, layout(strides, 0), layout(strides, 1), layout(strides, 2), nullptr, nullptr, B, T, T, H, K, D, causal != 0,
            scale, nullptr, window, softcap},
           {dout, out, stats, dq, dk, dv, layout(grad_strides, 0), layout(grad_strides, 1), layout(grad_strides, 2)});
}

void attend_to_cache(const float* q, const float* keys, const float* values, int64_t batch_stride, int64_t head_stride,
                     const int64_t* mask, float scale, float* out, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K,
                     int64_t D, int64_t window, float softcap) {
  const Layout cache{batch_stride, D, head_stride};
  forward({q, keys, values, {T * H * D, H * D, D}, cache, cache, out, nullptr, B, T, S, H, K, D, true, scale, mask, window,
           softcap});
}

void attend_to_all(const float* q, const float* k, const float* v, const int64_t* strides, const int64_t* mask, const float* bias,
                   int64_t bias_batch, int64_t bias_head, float* out, float* stats, int64_t B, int64_t T, int64_t S, int64_t H,
                   int64_t K, int64_t D, float scale) {
  forward({q, k, v, layout(strides, 0), layout(strides, 1), layout(strides, 2), out, stats, B, T, S, H, K, D, false, scale, mask,
           0, 0.0f, bias, bias_batch, bias_head});
}

void masked_attention_bwd(const float* dout, const float* q, const float* k, const float* v, const int64_t* strides,
                          const int64_t* mask, const float* bias, int64_t bias_batch, int64_t bias_head, const float* out,
                          const float* stats, float* dq, float* dk, float* dv, const int64_t* grad_strides, float* dbias,
                          int64_t dbias_batch, int64_t B, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, float scale) {
  backward({q, k, v, layout(strides, 0), layout(strides, 1), layout(strides, 2), nullptr, nullptr, B, T, S, H, K, D, false, scale,
            mask, 0, 0.0f, bias, bias_batch, bias_head},
           {dout, out, stats, dq, dk, dv, layout(grad_strides, 0), layout(grad_strides, 1), layout(grad_strides, 2), dbias,
            dbias_batch});
}

}  // namespace portlm::PORTLM_ISA
