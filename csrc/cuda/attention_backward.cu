// Attention backward in float32 arithmetic: weights are computed again from each query's largest score and sum.
//
// Queries' gradients come from blocks that hold a tile of queries, and those of keys and values from blocks that hold a tile of
// keys, which go through all query heads that share them: no sum is shared by blocks, so the bits are the same every time.
#include "cuda/attention_mma.cuh"
#include "cuda/attention_tiles.cuh"

namespace portlm::cuda {
namespace {

// delta (B, H, T) = dout times out, each (B, T, H, D): the sum over the keys of weight times its gradient. A warp for each.
template <typename T>
__global__ void sum_rows(const T* dout, const T* out, float* delta, int64_t rows, int queries, int heads, int D) {
  const int64_t warps = kAttentionThreads / 32;
  for (int64_t r = blockIdx.x * warps + threadIdx.x / 32; r < rows; r += gridDim.x * warps) {
    float sum = 0.0f;
    for (int64_t i = r * D + threadIdx.x % 32; i < (r + 1) * D; i += 32) sum = fmaf(to_float(dout[i]), to_float(out[i]), sum);
    sum = warp_sum(sum);
    const int64_t h = r % heads, t = r / heads % queries, b = r / heads / queries;
    if (threadIdx.x % 32 == 0) delta[(b * heads + h) * queries + t] = sum;
  }
}

// A query's largest score, the inverse of its sum, and its delta.
struct Query {
  float largest, inverse, delta;
  __device__ Query(const Attention& a, const Gradients& g, int b, int h, int t) : largest(0.0f), inverse(0.0f), delta(0.0f) {
    if (t >= a.T) return;
    const int64_t at = (int64_t{b} * a.H + h) * a.T + t;
    largest = g.stats[2 * at];
    inverse = g.stats[2 * at + 1];
    delta = g.delta[at];
  }
};

// Turns the product of a query and a key into its weight, and that of the gradient and the value into the score's gradient.
template <typename T>
__device__ inline void weigh(const View<T>& view, const Query& query, int t, int key, float& product, float& gradient) {
  if (!view.sees(t, key)) {
    product = gradient = 0.0f;
    return;
  }
  const float s = view.score(product, t, key);
  product = expf(s - query.largest) * query.inverse;
  gradient = product * (gradient - query.delta) * view.slope(s);
}

template <typename T>
struct Rows {
  const T *q, *k, *v, *dout;
  int64_t out_row;
  __device__ Rows(const Attention& a, const Gradients& g, int b, int h)
      : q(static_cast<const T*>(a.q) + b * a.q_at.batch + h * a.q_at.head),
        k(static_cast<const T*>(a.k) + b * a.k_at.batch + h / (a.H / a.K) * a.k_at.head),
        v(static_cast<const T*>(a.v) + b * a.v_at.batch + h / (a.H / a.K) * a.v_at.head),
        dout(static_cast<const T*>(g.dout) + (int64_t{b} * a.T * a.H + h) * a.D), out_row(int64_t{a.H} * a.D) {}
};

// Block x of (tile of queries, last ones first, then row and head).
template <typename T, typename G>
__global__ void __launch_bounds__(kAttentionThreads) query_gradients(Attention a, Gradients g, int tiles, bool vectors) {
  const int heads = a.B * a.H, tile = tiles - 1 - static_cast<int>(blockIdx.x) / heads;
  const int b = static_cast<int>(blockIdx.x) % heads / a.H, h = static_cast<int>(blockIdx.x) % a.H;
  const int t0 = tile * G::kRows, queries = min(G::kRows, a.T - t0);
  const View<T> view(a, b, h);
  const Rows<T> rows(a, g, b, h);
  float* const query_tile = shared_memory();
  float* const dout_tile = query_tile + G::kRows * G::kStride;
  float* const key_tile = dout_tile + G::kRows * G::kStride;
  float* const value_tile = key_tile + G::kColumns * G::kStride;
  float* const scores = value_tile + G::kColumns * G::kStride;
  load_tile<G, G::kRows>(rows.q + t0 * a.q_at.row, a.q_at.row, queries, a.D, vectors, query_tile);
  load_tile<G, G::kRows>(rows.dout + t0 * rows.out_row, rows.out_row, queries, a.D, vectors, dout_tile);

  float sum[G::R][G::N] = {};
  const int end = a.end(t0 + queries);
  for (int j0 = a.begin(t0) / G::kColumns * G::kColumns; j0 < end; j0 += G::kColumns) {
    __syncthreads();  // the last tile has been read
    load_tile<G, G::kColumns>(rows.k + j0 * a.k_at.row, a.k_at.row, min(G::kColumns, a.S - j0), a.D, vectors, key_tile);
    load_tile<G, G::kColumns>(rows.v + j0 * a.v_at.row, a.v_at.row, min(G::kColumns, a.S - j0), a.D, vectors, value_tile);
    __syncthreads();
    float s[G::R][G::C], d[G::R][G::C];
    multiply_tiles<G>(query_tile, key_tile, a.D, s);
    multiply_tiles<G>(dout_tile, value_tile, a.D, d);
#pragma unroll
    for (int i = 0; i < G::R; ++i) {
      const int t = t0 + tile_y() * G::R + i;
      const Query query(a, g, b, h, t);
#pragma unroll
      for (int j = 0; j < G::C; ++j) weigh(view, query, t, j0 + tile_x() + kAcross * j, s[i][j], d[i][j]);
    }
    keep_scores<G>(d, scores);
    __syncwarp();
    add_product<G>(scores, key_tile, sum);
  }
  store_tile<G>(sum, a.scale, static_cast<T*>(g.dq) + b * g.dq_at.batch + t0 * g.dq_at.row + h * g.dq_at.head, g.dq_at.row, queries,
                a.D, vectors);
}

// Block x of (tile of keys, first ones first, then row and key/value head).
template <typename T, typename G>
__global__ void __launch_bounds__(kAttentionThreads) key_gradients(Attention a, Gradients g, bool vectors) {
  const int heads = a.B * a.K, tile = static_cast<int>(blockIdx.x) / heads, group = a.H / a.K;
  const int b = static_cast<int>(blockIdx.x) % heads / a.K, kv = static_cast<int>(blockIdx.x) % a.K;
  const int j0 = tile * G::kRows, keys = min(G::kRows, a.S - j0);
  float* const key_tile = shared_memory();
  float* const value_tile = key_tile + G::kRows * G::kStride;
  float* const query_tile = value_tile + G::kRows * G::kStride;
  float* const dout_tile = query_tile + G::kColumns * G::kStride;
  float* const weights = dout_tile + G::kColumns * G::kStride;
  float* const scores = weights + G::kRows * G::kScoreStride;
  const Rows<T> shared(a, g, b, kv * group);
  load_tile<G, G::kRows>(shared.k + j0 * a.k_at.row, a.k_at.row, keys, a.D, vectors, key_tile);
  load_tile<G, G::kRows>(shared.v + j0 * a.v_at.row, a.v_at.row, keys, a.D, vectors, value_tile);

  float dk[G::R][G::N] = {}, dv[G::R][G::N] = {};
  const int first = a.first(j0) / G::kColumns * G::kColumns, last = a.last(j0 + keys);
  for (int h = kv * group; h < (kv + 1) * group; ++h) {
    const View<T> view(a, b, h);
    const Rows<T> rows(a, g, b, h);
    for (int t0 = first; t0 < last; t0 += G::kColumns) {
      const int queries = min(G::kColumns, a.T - t0);
      __syncthreads();  // the last tile has been read
      load_tile<G, G::kColumns>(rows.q + t0 * a.q_at.row, a.q_at.row, queries, a.D, vectors, query_tile);
      load_tile<G, G::kColumns>(rows.dout + t0 * rows.out_row, rows.out_row, queries, a.D, vectors, dout_tile);
      __syncthreads();
      float s[G::R][G::C], d[G::R][G::C];
      multiply_tiles<G>(key_tile, query_tile, a.D, s);
      multiply_tiles<G>(value_tile, dout_tile, a.D, d);
#pragma unroll
      for (int j = 0; j < G::C; ++j) {
        const int t = t0 + tile_x() + kAcross * j;
        const Query query(a, g, b, h, t);
#pragma unroll
        for (int i = 0; i < G::R; ++i) weigh(view, query, t, j0 + tile_y() * G::R + i, s[i][j], d[i][j]);
      }
      keep_scores<G>(s, weights);
      keep_scores<G>(d, scores);
      __syncwarp();
      add_product<G>(weights, dout_tile, dv);
      add_product<G>(scores, query_tile, dk);
    }
  }
  T* const to_k = static_cast<T*>(g.dk) + b * g.dk_at.batch + j0 * g.dk_at.row + kv * g.dk_at.head;
  T* const to_v = static_cast<T*>(g.dv) + b * g.dv_at.batch + j0 * g.dv_at.row + kv * g.dv_at.head;
  store_tile<G>(dk, a.scale, to_k, g.dk_at.row, keys, a.D, vectors);
  store_tile<G>(dv, 1.0f, to_v, g.dv_at.row, keys, a.D, vectors);
}

// Block (x, y, z): a tile of queries, one of keys, and a head, of one row of the batch or, if they share a bias, of all in order.
template <typename T, typename G>
__global__ void __launch_bounds__(kAttentionThreads, 2) bias_gradients(Attention a, Gradients g, bool vectors) {
  const int t0 = static_cast<int>(blockIdx.x) * G::kRows, queries = min(G::kRows, a.T - t0);
  const int j0 = static_cast<int>(blockIdx.y) * G::kColumns, keys = min(G::kColumns, a.S - j0);
  float* const query_tile = shared_memory();
  float* const dout_tile = query_tile + G::kRows * G::kStride;
  float* const key_tile = dout_tile + G::kRows * G::kStride;
  float* const value_tile = key_tile + G::kColumns * G::kStride;
  const int parts = g.dbias_batch ? a.B * a.H : a.H;
  for (int part = static_cast<int>(blockIdx.z); part < parts; part += static_cast<int>(gridDim.z)) {
    const int h = part % a.H, from = part / a.H, to = g.dbias_batch ? from + 1 : a.B;
    float sum[G::R][G::C] = {};
#pragma unroll 1
    for (int b = from; b < to; ++b) {
      const View<T> view(a, b, h);
      const Rows<T> rows(a, g, b, h);
      __syncthreads();  // the last row's tiles have been read
      load_tile<G, G::kRows>(rows.q + t0 * a.q_at.row, a.q_at.row, queries, a.D, vectors, query_tile);
      load_tile<G, G::kRows>(rows.dout + t0 * rows.out_row, rows.out_row, queries, a.D, vectors, dout_tile);
      load_tile<G, G::kColumns>(rows.k + j0 * a.k_at.row, a.k_at.row, keys, a.D, vectors, key_tile);
      load_tile<G, G::kColumns>(rows.v + j0 * a.v_at.row, a.v_at.row, keys, a.D, vectors, value_tile);
      __syncthreads();
      float s[G::R][G::C], d[G::R][G::C];
      multiply_tiles<G>(query_tile, key_tile, a.D, s);
      multiply_tiles<G>(dout_tile, value_tile, a.D, d);
#pragma unroll
      for (int i = 0; i < G::R; ++i) {
        const int t = t0 + tile_y() * G::R + i;
        const Query query(a, g, b, h, t);
#pragma unroll
        for (int j = 0; j < G::C; ++j) {
          weigh(view, query, t, j0 + tile_x() + kAcross * j, s[i][j], d[i][j]);
          sum[i][j] += d[i][j];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < G::R; ++i)
#pragma unroll
      for (int j = 0; j < G::C; ++j) {
        const int t = t0 + tile_y() * G::R + i, key = j0 + tile_x() + kAcross * j;
        if (t < a.T && key < a.S)
          g.dbias[from * g.dbias_batch + (int64_t{h} * a.T + t) * a.S + key] += sum[i][j];
      }
  }
}

template <typename T>
void run(const Attention& a, const Gradients& g, uintptr_t stream) {
  const int64_t rows = int64_t{a.B} * a.T * a.H, warps = kAttentionThreads / 32;
  if (rows > 0)
    launch(sum_rows<T>, row_blocks((rows + warps - 1) / warps), kAttentionThreads, 0, stream, static_cast<const T*>(g.dout),
           static_cast<const T*>(g.out), g.delta, rows, a.T, a.H, a.D);
  const bool by_mma = mma_serves(a);
  if (by_mma) differentiate_by_mma(a, g, stream);
  with_tiling(a.D, [&](auto tiling) {
    using G = decltype(tiling);
    const bool vectors = rows_allow(4, a, {a.q, a.k, a.v, g.dout, g.dq, g.dk, g.dv},
                                    {a.q_at, a.k_at, a.v_at, g.dq_at, g.dk_at, g.dv_at});
    constexpr size_t kTiles = 2 * (G::kRows + G::kColumns) * G::kStride * sizeof(float);
    constexpr size_t kScores = G::kRows * G::kScoreStride * sizeof(float);
    const int over_queries = (a.T + G::kRows - 1) / G::kRows, over_keys = (a.S + G::kRows - 1) / G::kRows;
    if (rows > 0 && !by_mma)
      launch(query_gradients<T, G>, tile_blocks(int64_t{over_queries} * a.B * a.H), kAttentionThreads, kTiles + kScores, stream, a, g,
             over_queries, vectors);
    if (a.S > 0 && a.B > 0 && !by_mma)
      launch(key_gradients<T, G>, tile_blocks(int64_t{over_keys} * a.B * a.K), kAttentionThreads, kTiles + 2 * kScores, stream, a, g,
             vectors);
    if (!g.dbias || rows == 0 || a.S == 0) return;
    const int64_t across = (a.S + G::kColumns - 1) / G::kColumns, parts = g.dbias_batch ? int64_t{a.B} * a.H : a.H;
    if (across > 65535) throw std::runtime_error("attention: the bias has more keys than one launch can address");
    const dim3 grid(static_cast<unsigned>(over_queries), static_cast<unsigned>(across),
                    static_cast<unsigned>(parts < 65535 ? parts : 65535));
    launch(bias_gradients<T, G>, grid, kAttentionThreads, kTiles, stream, a, g, vectors);
  });
}

}  // namespace

void differentiate_in_tiles(const Attention& a, const Gradients& g, uintptr_t stream) {
  if (a.H == 0 || a.D == 0) return;
  a.is_bfloat16 ? run<bfloat16>(a, g, stream) : run<float>(a, g, stream);
}

}  // namespace portlm::cuda
