// Attention forward in float32 arithmetic: a block holds a tile of queries of one head and goes through the tiles of keys that
// one of them sees, with an online softmax (Milakov and Gimelshein 2018; Dao 2023, arXiv:2307.08691).
#include "cuda/attention_mma.cuh"
#include "cuda/attention_tiles.cuh"

namespace portlm::cuda {
namespace {

// Block x of (tile of queries, last ones first, as they see most, then row and head).
template <typename T, typename G>
__global__ void __launch_bounds__(kAttentionThreads) attend(Attention a, T* out, float* stats, int tiles, bool vectors) {
  constexpr int R = G::R, C = G::C;
  const int heads = a.B * a.H, tile = tiles - 1 - static_cast<int>(blockIdx.x) / heads;
  const int b = static_cast<int>(blockIdx.x) % heads / a.H, h = static_cast<int>(blockIdx.x) % a.H, kv = h / (a.H / a.K);
  const int t0 = tile * G::kRows, queries = min(G::kRows, a.T - t0);
  const View<T> view(a, b, h);
  const T* const q = static_cast<const T*>(a.q) + b * a.q_at.batch + t0 * a.q_at.row + h * a.q_at.head;
  const T* const k = static_cast<const T*>(a.k) + b * a.k_at.batch + kv * a.k_at.head;
  const T* const v = static_cast<const T*>(a.v) + b * a.v_at.batch + kv * a.v_at.head;

  float* const query_tile = shared_memory();
  float* const key_tile = query_tile + G::kRows * G::kStride;
  float* const value_tile = key_tile + G::kColumns * G::kStride;
  float* const weights = value_tile + G::kColumns * G::kStride;
  load_tile<G, G::kRows>(q, a.q_at.row, queries, a.D, vectors, query_tile);

  float sum[R][G::N] = {}, largest[R], total[R] = {};  // total: of this thread's columns alone
#pragma unroll
  for (int i = 0; i < R; ++i) largest[i] = -INFINITY;
  const int end = a.end(t0 + queries);
  for (int j0 = a.begin(t0) / G::kColumns * G::kColumns; j0 < end; j0 += G::kColumns) {
    __syncthreads();  // the last tile has been read
    load_tile<G, G::kColumns>(k + j0 * a.k_at.row, a.k_at.row, min(G::kColumns, a.S - j0), a.D, vectors, key_tile);
    load_tile<G, G::kColumns>(v + j0 * a.v_at.row, a.v_at.row, min(G::kColumns, a.S - j0), a.D, vectors, value_tile);
    __syncthreads();
    float s[R][C];
    multiply_tiles<G>(query_tile, key_tile, a.D, s);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int t = t0 + tile_y() * R + i;
      float top = largest[i];
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const int key = j0 + tile_x() + kAcross * j;
        s[i][j] = view.sees(t, key) ? view.score(s[i][j], t, key) : -INFINITY;
        top = fmaxf(top, s[i][j]);
      }
#pragma unroll
      for (int offset = kAcross / 2; offset; offset /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
      const float shrink = shrunk(largest[i], top);
      largest[i] = top;
      total[i] *= shrink;
#pragma unroll
      for (int n = 0; n < G::N; ++n) sum[i][n] *= shrink;
#pragma unroll
      for (int j = 0; j < C; ++j) {
        s[i][j] = s[i][j] == -INFINITY ? 0.0f : expf(s[i][j] - top);  // NaN makes the total NaN, and with it the row
        total[i] += s[i][j];
      }
    }
    keep_scores<G>(s, weights);
    __syncwarp();
    add_product<G>(weights, value_tile, sum);
  }

#pragma unroll
  for (int i = 0; i < R; ++i) {
#pragma unroll
    for (int offset = kAcross / 2; offset; offset /= 2) total[i] += __shfl_xor_sync(0xffffffffu, total[i], offset);
    const bool blind = total[i] == 0.0f;  // a query that sees nothing gives 0
    const float inverse = blind ? 0.0f : 1.0f / total[i];
#pragma unroll
    for (int n = 0; n < G::N; ++n) sum[i][n] *= inverse;
    const int row = tile_y() * R + i;
    if (stats && tile_x() == 0 && row < queries) {
      float* const to = stats + 2 * ((int64_t{b} * a.H + h) * a.T + t0 + row);
      to[0] = blind ? 0.0f : largest[i];
      to[1] = inverse;
    }
  }
  const int64_t out_row = int64_t{a.H} * a.D;
  store_tile<G>(sum, 1.0f, out + (int64_t{b} * a.T + t0) * out_row + int64_t{h} * a.D, out_row, queries, a.D, vectors);
}

template <typename T>
void run(const Attention& a, void* out, float* stats, uintptr_t stream) {
  with_tiling(a.D, [&](auto tiling) {
    using G = decltype(tiling);
    const int tiles = (a.T + G::kRows - 1) / G::kRows;
    const bool vectors = rows_allow(4, a, {a.q, a.k, a.v, out}, {a.q_at, a.k_at, a.v_at});
    constexpr size_t kFloats = (G::kRows + 2 * G::kColumns) * G::kStride + G::kRows * G::kScoreStride;
    launch(attend<T, G>, tile_blocks(int64_t{tiles} * a.B * a.H), kAttentionThreads, kFloats * sizeof(float), stream, a,
           static_cast<T*>(out), stats, tiles, vectors);
  });
}

}  // namespace

void attend_in_tiles(const Attention& a, void* out, float* stats, uintptr_t stream) {
  if (a.B == 0 || a.T == 0 || a.H == 0 || a.D == 0) return;
  if (mma_serves(a))
    attend_by_mma(a, out, stats, stream);
  else
    a.is_bfloat16 ? run<bfloat16>(a, out, stats, stream) : run<float>(a, out, stats, stream);
}

}  // namespace portlm::cuda
