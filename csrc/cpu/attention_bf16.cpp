// attention.cpp with the operands of every product rounded to bfloat16: queries, keys, values, weights and gradients. The
// softmax, its statistics and all sums are float32, and so is what is returned.
#include <initializer_list>

#include "cpu/attention_parts.h"
#include "cpu/gemm_bf16.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace portlm::PORTLM_ISA {
namespace {

// Panels of one operand B (K, columns), one after the other.
struct Panels {
  char* data;
  int64_t size;  // bytes of a panel
};

// x (T, D) as the columns of x^T: panel p holds rows p * tiles.columns and following.
void pack_as_columns(const Bf16Tiles& tiles, const float* x, int64_t ld, int64_t T, int64_t D, const Panels& to) {
  for (int64_t t = 0; t < T; t += tiles.columns)
    tiles.pack_panel(turned(x + t * ld, ld), min(tiles.columns, T - t), D, to.data + t / tiles.columns * to.size);
}

// x (T, D) as it is: panel p holds columns p * tiles.columns and following.
void pack_as_rows(const Bf16Tiles& tiles, const float* x, int64_t ld, int64_t T, int64_t D, const Panels& to) {
  for (int64_t d = 0; d < D; d += tiles.columns)
    tiles.pack_panel(rows_of(x + d, ld), min(tiles.columns, D - d), T, to.data + d / tiles.columns * to.size);
}

// Scores (R, columns) of a strip with the keys from j0 on, written up to whole panels.
void times_columns(const Bf16Tiles& tiles, int64_t R, int64_t D, const char* strip, const Panels& keys, int64_t j0,
                   int64_t columns, float* scores, int64_t ld) {
  for (int64_t j = 0; j < columns; j += tiles.columns)
    tiles.tile(R, D, strip, false, keys.data + (j0 + j) / tiles.columns * keys.size,
               {scores + j, ld, tiles.columns, nullptr, false});
}

// C (R, D) = strip times rows [from, from + depth) of an operand that lies as rows, or C += the same. `from` is even.
void times_rows(const Bf16Tiles& tiles, int64_t R, int64_t depth, const char* strip, bool transposed, const Panels& rows,
                int64_t from, float* C, int64_t ldc, int64_t D, bool accumulate) {
  for (int64_t d = 0; d < D; d += tiles.columns)
    tiles.tile(R, depth, strip, transposed, rows.data + d / tiles.columns * rows.size + from * tiles.panel_step,
               {C + d, ldc, min(tiles.columns, D - d), nullptr, accumulate});
}

// A strip of R rows of q times scale.
void pack_scaled(const Bf16Tiles& tiles, const float* q, int64_t ld, int64_t R, int64_t D, float scale, float* copy, char* strip) {
  for (int64_t r = 0; r < R; ++r)
    for_lanes(D, [=](int64_t i, auto lanes) { store(load(q + r * ld + i, lanes) * Vec(scale), copy + r * D + i, lanes); });
  tiles.pack_strip(rows_of(copy, D), R, D, strip);
}

// Bytes out of one piece of scratch memory, each part aligned to 64.
class Pieces {
 public:
  explicit Pieces(Scratch& scratch) : scratch_(scratch) {}
  int64_t reserve(int64_t bytes) {
    const int64_t at = size_;
    size_ += round_up(bytes, 64);
    return at;
  }
  void allocate() { memory_ = reinterpret_cast<char*>(scratch_.floats(size_ / 4 + 16)); }
  char* at(int64_t offset) const { return memory_ + offset; }
  float* floats(int64_t offset) const { return reinterpret_cast<float*>(memory_ + offset); }

 private:
  Scratch& scratch_;
  char* memory_ = nullptr;
  int64_t size_ = 0;
};

struct ForwardSpace {
  Panels keys, values;
  char *query_strip, *weight_strip;
  float *scores, *scaled;
};

// Queries [first, last) of one head.
void attend(const Bf16Tiles& tiles, const Shape& s, const float* q, int64_t q_row, float scale, const ForwardSpace& w, float* out,
            int64_t out_row, float* stats, int64_t first, int64_t last) {
  constexpr int64_t kMostRows = 32;
  const int64_t panels = ceil_div(last - first, tiles.rows);
  const bool hides = s.may_hide_rows();
  for (int64_t p = 0; p < panels; ++p) {
    const Range rows = share(last - first, p, panels);
    const int64_t i0 = first + rows.begin, R = rows.size(), end = s.end(i0 + R);
    float top[kMostRows], total[kMostRows], shrink[kMostRows];
    for (int64_t r = 0; r < R; ++r) top[r] = kHidden, total[r] = 0.0f;
    pack_scaled(tiles, q + i0 * q_row, q_row, R, s.D, scale, w.scaled, w.query_strip);
    const int64_t start = s.begin(i0) / kKeys * kKeys;
    for (int64_t j0 = start; j0 < end; j0 += kKeys) {
      const int64_t n = min(kKeys, end - j0), width = round_up(n, Vec::N);
      times_columns(tiles, R, s.D, w.query_strip, w.keys, j0, n, w.scores, kKeys);
      for (int64_t r = 0; r < R; ++r) {
        if (s.softcap != 0.0f) cap(s.softcap, w.scores + r * kKeys, n);
        hide(s, i0 + r, j0, n, width, kHidden, w.scores + r * kKeys);
      }
      int64_t r = 0;
      for (; r + 4 <= R; r += 4) exponentials<4>(w.scores + r * kKeys, width, hides, top + r, total + r, shrink + r);
      for (; r < R; ++r) exponentials<1>(w.scores + r * kKeys, width, hides, top + r, total + r, shrink + r);
      if (j0 > start)
        for (r = 0; r < R; ++r) scale_by(shrink[r], out + (i0 + r) * out_row, s.D);
      tiles.pack_strip(rows_of(w.scores, kKeys), R, n, w.weight_strip);
      times_rows(tiles, R, n, w.weight_strip, false, w.values, j0, out + i0 * out_row, out_row, s.D, j0 > start);
    }
    for (int64_t r = 0; r < R; ++r) {
      const float inverse = 1.0f / total[r];
      scale_by(inverse, out + (i0 + r) * out_row, s.D);
      stats[2 * (i0 + r)] = top[r];
      stats[2 * (i0 + r) + 1] = inverse;
    }
  }
}

// The packed operands of one task's backward pass and its blocks of scores.
struct BackwardSpace {
  Panels keys_as_columns, values_as_columns, keys_as_rows;
  Panels queries, grads;             // kBlock rows of q and of dout, as rows
  char *query_strips, *grad_strips;  // the same, as strips; queries times scale
  char* strip;
  int64_t strip_size;
  float *weights, *dscores;  // kBlock x kBlock probabilities, and gradients with respect to q k^T
  float* scaled;
};

void differentiate(const Bf16Tiles& tiles, const Shape& s, const Head& h, const BackwardSpace& w, float scale,
                   const BackwardPart& part) {
  for (int64_t i0 = part.first_query(s.causal), stop = part.last_query(s.window); i0 < stop; i0 += kBlock) {
    const int64_t queries = min(kBlock, s.T - i0), panels = ceil_div(queries, tiles.rows), start = first_block(s, i0, part);
    if (part.for_keys) {
      pack_as_rows(tiles, h.q + i0 * h.q_row, h.q_row, queries, s.D, w.queries);
      pack_as_rows(tiles, h.dout + i0 * h.out_row, h.out_row, queries, s.D, w.grads);
    }
    for (int64_t p = 0; p < panels; ++p) {
      const Range rows = share(queries, p, panels);
      const int64_t i = i0 + rows.begin;
      pack_scaled(tiles, h.q + i * h.q_row, h.q_row, rows.size(), s.D, scale, w.scaled, w.query_strips + p * w.strip_size);
      tiles.pack_strip(rows_of(h.dout + i * h.out_row, h.out_row), rows.size(), s.D, w.grad_strips + p * w.strip_size);
    }
    float delta[kBlock];  // sum over the keys of weight * its gradient
    for (int64_t i = 0; i < queries; ++i) {  // of the rounded gradient: what is taken from its products has to be their mean
      auto* const halves = reinterpret_cast<uint16_t*>(w.strip);
      tiles.round(h.dout + (i0 + i) * h.out_row, halves, s.D);
      widen(halves, w.scaled, s.D);
      delta[i] = dot(w.scaled, h.out + (i0 + i) * h.out_row, s.D);
    }
    const int64_t end = min(s.end(i0 + queries), part.keys.end);
    for (int64_t j0 = start; j0 < end; j0 += kBlock) {
      const int64_t keys = min(kBlock, end - j0);
      for (int64_t p = 0; p < panels; ++p) {
        const Range rows = share(queries, p, panels);
        const int64_t i = rows.begin, R = rows.size();
        const int64_t n = min(keys, s.end(i0 + rows.end) - j0);  // that the last of these rows sees
        float *weights = w.weights + i * kBlock, *dscores = w.dscores + i * kBlock;
        times_columns(tiles, R, s.D, w.query_strips + p * w.strip_size, w.keys_as_columns, j0, n, weights, kBlock);
        times_columns(tiles, R, s.D, w.grad_strips + p * w.strip_size, w.values_as_columns, j0, n, dscores, kBlock);
        weigh(R, weights, dscores, n, h.stats + 2 * (i0 + i), delta + i, scale, s.softcap);
        for (int64_t r = 0; r < R; ++r)  // to the end of the row, because what follows takes products in pairs
          for (float* const row : {weights + r * kBlock, dscores + r * kBlock}) hide(s, i0 + i + r, j0, n, kBlock, 0.0f, row);
        if (!part.for_queries) continue;
        tiles.pack_strip(rows_of(dscores, kBlock), R, n, w.strip);
        times_rows(tiles, R, n, w.strip, false, w.keys_as_rows, j0, h.dq + (i0 + i) * h.dq_row, h.dq_row, s.D, j0 > start);
      }
      const int64_t key_panels = part.for_keys ? ceil_div(keys, tiles.rows) : 0;
      for (int64_t p = 0; p < key_panels; ++p) {
        const Range columns = share(keys, p, key_panels);
        const int64_t j = columns.begin, R = columns.size();
        const int64_t from = s.causal ? max(0, j0 + j - i0) / 2 * 2 : 0, depth = queries - from;  // the first that sees key j
        tiles.pack_strip(turned(w.weights + from * kBlock + j, kBlock), R, depth, w.strip);
        times_rows(tiles, R, depth, w.strip, true, w.grads, from, h.dv + (j0 + j) * h.dv_row, h.dv_row, s.D, true);
        tiles.pack_strip(turned(w.dscores + from * kBlock + j, kBlock), R, depth, w.strip);
        times_rows(tiles, R, depth, w.strip, true, w.queries, from, h.dk + (j0 + j) * h.dk_row, h.dk_row, s.D, true);
      }
    }
  }
}

}  // namespace

void attention_bf16_fwd(const float* q, const float* k, const float* v, const int64_t* strides, float* out, float* stats,
                        int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window,
                        float softcap) {
  if (B <= 0 || T <= 0 || H <= 0 || D <= 0) return;
  const Layout ql = layout(strides, 0), kl = layout(strides, 1), vl = layout(strides, 2);
  const Bf16Tiles& tiles = bf16_tiles();
  const int64_t group = H / K;
  // as in attention.cpp: few heads are cut into chunks of queries, in an order that evens them out
  constexpr int64_t kChunk = 128, kEnoughTasks = 64;
  const int64_t chunks = B * K >= kEnoughTasks ? 1 : ceil_div(T, kChunk);
  const int64_t cycles = (T * T * D * group / tiles.rate + T * D) / chunks + 1;
  parallel_for(B * K * chunks, (1 << 13) / cycles + 1, [=, &tiles](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Pieces pieces(scratch);
    const Panels keys{nullptr, tiles.panel_bytes(D)}, values{nullptr, tiles.panel_bytes(T)};
    const int64_t at_keys = pieces.reserve(ceil_div(T, tiles.columns) * keys.size);
    const int64_t at_values = pieces.reserve(ceil_div(D, tiles.columns) * values.size);
    const int64_t at_query = pieces.reserve(tiles.strip_bytes(D, false));
    const int64_t at_weight = pieces.reserve(tiles.strip_bytes(kKeys, false));
    const int64_t at_scores = pieces.reserve(4 * tiles.rows * kKeys), at_scaled = pieces.reserve(4 * tiles.rows * D);
    pieces.allocate();
    const ForwardSpace w{{pieces.at(at_keys), keys.size}, {pieces.at(at_values), values.size}, pieces.at(at_query),
                         pieces.at(at_weight),            pieces.floats(at_scores),            pieces.floats(at_scaled)};
    const Shape shape{T, T, D, causal != 0, nullptr, window, softcap};
    const HeldBf16Tiles held(tiles);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / chunks, c = task % chunks, b = head / K, kv = head % K;
      const Range queries = share(T, c % 2 ? chunks - 1 - c / 2 : c / 2, chunks);
      const int64_t seen = shape.end(queries.end);
      pack_as_columns(tiles, k + b * kl.batch + kv * kl.head, kl.row, seen, D, w.keys);
      pack_as_rows(tiles, v + b * vl.batch + kv * vl.head, vl.row, seen, D, w.values);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        attend(tiles, shape, q + b * ql.batch + h * ql.head, ql.row, scale, w, out + (b * T * H + h) * D, H * D,
               stats + 2 * (b * H + h) * T, queries.begin, queries.end);
    }
  });
}

void attention_bf16_bwd(const float* dout, const float* q, const float* k, const float* v, const int64_t* strides,
                        const float* out, const float* stats, float* dq, float* dk, float* dv, const int64_t* grad_strides,
                        int64_t B, int64_t T, int64_t H, int64_t K, int64_t D, int causal, float scale, int64_t window,
                        float softcap) {
  if (B <= 0 || T <= 0 || H <= 0 || D <= 0) return;
  const Layout ql = layout(strides, 0), kl = layout(strides, 1), vl = layout(strides, 2);
  const Layout dql = layout(grad_strides, 0), dkl = layout(grad_strides, 1), dvl = layout(grad_strides, 2);
  const Bf16Tiles& tiles = bf16_tiles();
  const Shape shape{T, T, D, causal != 0, nullptr, window, softcap};
  const int64_t chunks = backward_chunks(B * K, T, threads_for(INT64_MAX, 1)), parts = chunks == 1 ? 1 : 2 * chunks;
  parallel_for(B * K * parts, 1, [=, &tiles](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    Pieces pieces(scratch);
    const int64_t columns = tiles.panel_bytes(D), rows = tiles.panel_bytes(T), block = tiles.panel_bytes(kBlock);
    const int64_t wide = ceil_div(T, tiles.columns), deep = ceil_div(D, tiles.columns), strips = ceil_div(kBlock, tiles.rows);
    const int64_t longest = max(D, kBlock);
    const int64_t strip = round_up(max(tiles.strip_bytes(longest, false), tiles.strip_bytes(longest, true)), 64);
    const int64_t at_keys = pieces.reserve(wide * columns), at_values = pieces.reserve(wide * columns);
    const int64_t at_key_rows = pieces.reserve(deep * rows);
    const int64_t at_queries = pieces.reserve(deep * block), at_grads = pieces.reserve(deep * block);
    const int64_t at_query_strips = pieces.reserve(strips * strip), at_grad_strips = pieces.reserve(strips * strip);
    const int64_t at_strip = pieces.reserve(strip), at_scaled = pieces.reserve(4 * tiles.rows * D);
    const int64_t at_weights = pieces.reserve(4 * kBlock * kBlock), at_dscores = pieces.reserve(4 * kBlock * kBlock);
    pieces.allocate();
    BackwardSpace w;
    w.keys_as_columns = {pieces.at(at_keys), columns};
    w.values_as_columns = {pieces.at(at_values), columns};
    w.keys_as_rows = {pieces.at(at_key_rows), rows};
    w.queries = {pieces.at(at_queries), block};
    w.grads = {pieces.at(at_grads), block};
    w.query_strips = pieces.at(at_query_strips);
    w.grad_strips = pieces.at(at_grad_strips);
    w.strip = pieces.at(at_strip);
    w.strip_size = strip;
    w.weights = pieces.floats(at_weights);
    w.dscores = pieces.floats(at_dscores);
    w.scaled = pieces.floats(at_scaled);
    const HeldBf16Tiles held(tiles);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, b = head / K, kv = head % K;
      const BackwardPart part = backward_part(task % parts, chunks, T, T);
      const int64_t j0 = part.keys.begin, seen = min(shape.end(part.queries.end), part.keys.end) - j0;
      const int64_t skipped = j0 / tiles.columns * columns;
      const float *key = k + b * kl.batch + kv * kl.head, *value = v + b * vl.batch + kv * vl.head;
      pack_as_columns(tiles, key + j0 * kl.row, kl.row, seen, D, {w.keys_as_columns.data + skipped, columns});
      pack_as_columns(tiles, value + j0 * vl.row, vl.row, seen, D, {w.values_as_columns.data + skipped, columns});
      if (part.for_queries) pack_as_rows(tiles, key, kl.row, T, D, w.keys_as_rows);
      float *dkey = dk + b * dkl.batch + kv * dkl.head, *dvalue = dv + b * dvl.batch + kv * dvl.head;
      for (int64_t t = part.keys.begin; part.for_keys && t < part.keys.end; ++t) {
        fill(0.0f, dkey + t * dkl.row, D);
        fill(0.0f, dvalue + t * dvl.row, D);
      }
      for (int64_t h = kv * (H / K); h < (kv + 1) * (H / K); ++h) {
        const int64_t at = (b * T * H + h) * D;
        differentiate(tiles, shape,
                      {q + b * ql.batch + h * ql.head, out + at, dout + at, stats + 2 * (b * H + h) * T,
                       dq + b * dql.batch + h * dql.head, dkey, dvalue, ql.row, H * D, dql.row, dkl.row, dvl.row},
                      w, scale, part);
      }
    }
  });
}

}  // namespace portlm::PORTLM_ISA
