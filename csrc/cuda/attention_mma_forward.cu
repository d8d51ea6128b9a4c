// Attention forward of bfloat16 on tensor cores, as FlashAttention-2 has it (Dao 2023, arXiv:2307.08691): a warp holds rows of
// queries and of the result in registers, and the block's four read tiles of keys and values that are copied while it computes.
// Weights are rounded to bfloat16 for their product with the values; all sums are float32.
#include "cuda/attention_mma.cuh"

namespace portlm::cuda {
namespace {

// M * 16 queries a warp, and tiles of N * 8 keys.
template <int Width, int M, int N>
struct Plan {
  static constexpr int kQueries = kMmaWarps * M * 16, kKeys = 8 * N;
  static constexpr size_t kBytes = (kQueries + 2 * kKeys) * kMmaStride<Width> * sizeof(bfloat16);
};

// Block x of (tile of queries, last ones first, as they see most, then row and head).
template <int Width, int M, int N>
__global__ void __launch_bounds__(kMmaThreads) attend(Attention a, bfloat16* out, float* stats, int tiles, bool vectors) {
  using P = Plan<Width, M, N>;
  const int heads = a.B * a.H, tile = tiles - 1 - static_cast<int>(blockIdx.x) / heads;
  const int b = static_cast<int>(blockIdx.x) % heads / a.H, h = static_cast<int>(blockIdx.x) % a.H, kv = h / (a.H / a.K);
  const int t0 = tile * P::kQueries, queries = min(P::kQueries, a.T - t0);
  const View<bfloat16> view(a, b, h);
  const bfloat16* const q = static_cast<const bfloat16*>(a.q) + b * a.q_at.batch + t0 * a.q_at.row + h * a.q_at.head;
  const bfloat16* const k = static_cast<const bfloat16*>(a.k) + b * a.k_at.batch + kv * a.k_at.head;
  const bfloat16* const v = static_cast<const bfloat16*>(a.v) + b * a.v_at.batch + kv * a.v_at.head;
  bfloat16* const query_tile = mma_memory();
  bfloat16* const key_tile = query_tile + P::kQueries * kMmaStride<Width>;
  bfloat16* const value_tile = key_tile + P::kKeys * kMmaStride<Width>;

  const int begin = a.begin(t0) / P::kKeys * P::kKeys, end = a.end(t0 + queries);
  const int first = mma_warp() * M * 16, lane_row = t0 + first + mma_lane() / 4, lane_column = mma_lane() % 4 * 2;
  // Of a product, this times it is a score, of which 2^x is taken. A negative scale would turn the order around.
  const bool plain = a.softcap == 0.0f && !view.bias && a.scale > 0.0f;
  const float factor = plain ? a.scale * kLog2E : kLog2E;

  float sum[M][Width / 8][4] = {}, largest[M][2], total[M][2] = {};  // total: of this lane's columns alone
#pragma unroll
  for (int m = 0; m < M; ++m) largest[m][0] = largest[m][1] = -INFINITY;
  copy_tile<Width, P::kQueries>(q, a.q_at.row, queries, a.D, vectors, query_tile);
  if (begin < end)
    copy_tile<Width, P::kKeys>(k + begin * a.k_at.row, a.k_at.row, min(P::kKeys, a.S - begin), a.D, vectors, key_tile);
  commit_copies();
  for (int j0 = begin; j0 < end; j0 += P::kKeys) {
    const bool whole = all_seen(a, t0 + first, t0 + first + 16 * M, j0, j0 + P::kKeys) && all_shown(view, j0, j0 + P::kKeys);
    wait_for_copies<0>();
    __syncthreads();  // the keys are there, and the last values have been read
    copy_tile<Width, P::kKeys>(v + j0 * a.v_at.row, a.v_at.row, min(P::kKeys, a.S - j0), a.D, vectors, value_tile);
    commit_copies();
    float s[M][N][4];
    multiply_rows<Width>(query_tile, first, key_tile, s);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      if (!plain || !whole) {
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int t = lane_row + 16 * m + i / 2 * 8, key = j0 + 8 * n + lane_column + i % 2;
            if (!whole && !view.sees(t, key))
              s[m][n][i] = -INFINITY;
            else if (!plain)
              s[m][n][i] = view.score(s[m][n][i], t, key);
          }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = largest[m][half];
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
        const float shrink = largest[m][half] == -INFINITY ? 0.0f : power_of_two((largest[m][half] - top) * factor);
        const float offset = top == -INFINITY ? 0.0f : top * factor;
        largest[m][half] = top;
        total[m][half] *= shrink;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = power_of_two(fmaf(s[m][n][i], factor, -offset));  // NaN makes the total NaN, and with it the row
            total[m][half] += s[m][n][i];
          }
#pragma unroll
        for (int n = 0; n < Width / 8; ++n) sum[m][n][2 * half] *= shrink, sum[m][n][2 * half + 1] *= shrink;
      }
    }

    wait_for_copies<0>();
    __syncthreads();  // the values are there, and the keys have been read
    const int next = j0 + P::kKeys;
    if (next < end)
      copy_tile<Width, P::kKeys>(k + next * a.k_at.row, a.k_at.row, min(P::kKeys, a.S - next), a.D, vectors, key_tile);
    commit_copies();
    add_rows<Width>(s, value_tile, sum);
  }

#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float weights = total[m][half];
      weights += __shfl_xor_sync(0xffffffffu, weights, 1);
      weights += __shfl_xor_sync(0xffffffffu, weights, 2);
      const bool blind = weights == 0.0f;  // a query that sees nothing gives 0
      const float inverse = blind ? 0.0f : 1.0f / weights;
      const int t = lane_row + 16 * m + 8 * half;
      if (t >= a.T) continue;
      store_row<Width>(sum[m], half, inverse, out + ((int64_t{b} * a.T + t) * a.H + h) * a.D, a.D, vectors);
      if (!stats || mma_lane() % 4) continue;
      float* const to = stats + 2 * ((int64_t{b} * a.H + h) * a.T + t);
      to[0] = blind ? 0.0f : plain ? largest[m][half] * a.scale : largest[m][half];
      to[1] = inverse;
    }
}

template <int Width, int M, int N>
void run(const Attention& a, void* out, float* stats, uintptr_t stream) {
  using P = Plan<Width, M, N>;
  const int tiles = (a.T + P::kQueries - 1) / P::kQueries;
  const bool vectors = rows_allow(8, a, {a.q, a.k, a.v, out}, {a.q_at, a.k_at, a.v_at});
  launch(attend<Width, M, N>, tile_blocks(int64_t{tiles} * a.B * a.H), kMmaThreads, P::kBytes, stream, a,
         static_cast<bfloat16*>(out), stats, tiles, vectors);
}

}  // namespace

void attend_by_mma(const Attention& a, void* out, float* stats, uintptr_t stream) {
  // More queries a warp read keys and values from shared memory less often, where there are enough to fill a device.
  const bool many = int64_t{a.B} * a.H * ((a.T + 127) / 128) >= 256;
  if (a.D <= 64)
    many ? run<64, 2, 8>(a, out, stats, stream) : run<64, 1, 8>(a, out, stats, stream);
  else
    many ? run<128, 2, 4>(a, out, stats, stream) : run<128, 1, 8>(a, out, stats, stream);
}

}  // namespace portlm::cuda
