// Attention backward of bfloat16 on tensor cores. As in attention_backward.cu blocks that hold queries make their gradients, and
// blocks that hold keys those of keys and values; weights and the gradients of scores are rounded to bfloat16 for their products,
// and all sums are float32. The tile that comes next is copied while one is computed with.
#include "cuda/attention_mma.cuh"

namespace portlm::cuda {
namespace {

constexpr int kRows = kMmaWarps * 16;

// A block's rows, and tiles of N * 8 of what it goes through: two of each there, so that one is copied meanwhile.
template <int Width, int N>
struct Plan {
  static constexpr int kColumns = 8 * N;
  static constexpr int kHeld = kRows * kMmaStride<Width>, kPassed = kColumns * kMmaStride<Width>;
  static constexpr size_t kBytes = (2 * kHeld + 4 * kPassed) * sizeof(bfloat16);
};

// A query's largest score, the inverse of its sum, and its delta.
struct Query {
  float largest, inverse, delta;
};
__device__ inline Query query_of(const Attention& a, const Gradients& g, int b, int h, int t) {
  if (t >= a.T) return {0.0f, 0.0f, 0.0f};
  const int64_t at = (int64_t{b} * a.H + h) * a.T + t;
  return {g.stats[2 * at], g.stats[2 * at + 1], g.delta[at]};
}

// Turns the product of a query and a key that it sees into its weight, and that of the gradient and the value into the
// gradient of the score.
__device__ inline void weigh(const View<bfloat16>& view, const Query& query, bool seen, int t, int key, float& product,
                             float& gradient) {
  if (!seen) {
    product = gradient = 0.0f;
    return;
  }
  const float s = view.score(product, t, key);
  product = power_of_two((s - query.largest) * kLog2E) * query.inverse;
  gradient = product * (gradient - query.delta) * view.slope(s);
}

struct Rows {
  const bfloat16 *q, *k, *v, *dout;
  int64_t out_row;
  __device__ Rows(const Attention& a, const Gradients& g, int b, int h)
      : q(static_cast<const bfloat16*>(a.q) + b * a.q_at.batch + h * a.q_at.head),
        k(static_cast<const bfloat16*>(a.k) + b * a.k_at.batch + h / (a.H / a.K) * a.k_at.head),
        v(static_cast<const bfloat16*>(a.v) + b * a.v_at.batch + h / (a.H / a.K) * a.v_at.head),
        dout(static_cast<const bfloat16*>(g.dout) + (int64_t{b} * a.T * a.H + h) * a.D), out_row(int64_t{a.H} * a.D) {}
};

// Block x of (tile of queries, last ones first, then row and head).
template <int Width, int N>
__global__ void __launch_bounds__(kMmaThreads, 2) query_gradients(Attention a, Gradients g, int tiles, bool vectors) {
  using P = Plan<Width, N>;
  const int heads = a.B * a.H, tile = tiles - 1 - static_cast<int>(blockIdx.x) / heads;
  const int b = static_cast<int>(blockIdx.x) % heads / a.H, h = static_cast<int>(blockIdx.x) % a.H;
  const int t0 = tile * kRows, queries = min(kRows, a.T - t0);
  const View<bfloat16> view(a, b, h);
  const Rows rows(a, g, b, h);
  bfloat16* const query_tile = mma_memory();
  bfloat16* const dout_tile = query_tile + P::kHeld;
  bfloat16* const passed = dout_tile + P::kHeld;  // keys and values, twice
  const auto copy = [&](int j0, int stage) {
    const int keys = min(P::kColumns, a.S - j0);
    bfloat16* const to = passed + 2 * stage * P::kPassed;
    copy_tile<Width, P::kColumns>(rows.k + j0 * a.k_at.row, a.k_at.row, keys, a.D, vectors, to);
    copy_tile<Width, P::kColumns>(rows.v + j0 * a.v_at.row, a.v_at.row, keys, a.D, vectors, to + P::kPassed);
  };

  const int first = mma_warp() * 16, lane_row = t0 + first + mma_lane() / 4, lane_column = mma_lane() % 4 * 2;
  const Query of_row[2] = {query_of(a, g, b, h, lane_row), query_of(a, g, b, h, lane_row + 8)};
  const int begin = a.begin(t0) / P::kColumns * P::kColumns, end = a.end(t0 + queries);
  copy_tile<Width, kRows>(rows.q + t0 * a.q_at.row, a.q_at.row, queries, a.D, vectors, query_tile);
  copy_tile<Width, kRows>(rows.dout + t0 * rows.out_row, rows.out_row, queries, a.D, vectors, dout_tile);
  if (begin < end) copy(begin, 0);
  commit_copies();
  float sum[1][Width / 8][4] = {};
  for (int j0 = begin, stage = 0; j0 < end; j0 += P::kColumns, stage = 1 - stage) {
    if (j0 + P::kColumns < end) copy(j0 + P::kColumns, 1 - stage);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();  // this tile is there
    const bfloat16* const key_tile = passed + 2 * stage * P::kPassed;
    float s[1][N][4], d[1][N][4];
    multiply_rows<Width>(query_tile, first, key_tile, s);
    multiply_rows<Width>(dout_tile, first, key_tile + P::kPassed, d);
    const bool shown = all_shown(view, j0, j0 + P::kColumns);
    const bool whole = shown && all_seen(a, t0 + first, t0 + first + 16, j0, j0 + P::kColumns);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int t = lane_row + i / 2 * 8, key = j0 + 8 * n + lane_column + i % 2;
        weigh(view, of_row[i / 2], whole || view.sees(t, key), t, key, s[0][n][i], d[0][n][i]);
      }
    add_rows<Width>(d, key_tile, sum);
    __syncthreads();  // this tile has been read
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = lane_row + 8 * half;
    bfloat16* const to = static_cast<bfloat16*>(g.dq) + b * g.dq_at.batch + t * g.dq_at.row + h * g.dq_at.head;
    if (t < a.T) store_row<Width>(sum[0], half, a.scale, to, a.D, vectors);
  }
}

// Block x of (tile of keys, first ones first, then row and key/value head).
template <int Width, int N>
__global__ void __launch_bounds__(kMmaThreads) key_gradients(Attention a, Gradients g, bool vectors) {
  using P = Plan<Width, N>;
  __shared__ Query of_column[2][P::kColumns];
  const int heads = a.B * a.K, tile = static_cast<int>(blockIdx.x) / heads, group = a.H / a.K;
  const int b = static_cast<int>(blockIdx.x) % heads / a.K, kv = static_cast<int>(blockIdx.x) % a.K;
  const int j0 = tile * kRows, keys = min(kRows, a.S - j0);
  bfloat16* const key_tile = mma_memory();
  bfloat16* const value_tile = key_tile + P::kHeld;
  bfloat16* const passed = value_tile + P::kHeld;  // queries and gradients, twice
  const int begin = a.first(j0) / P::kColumns * P::kColumns, end = a.last(j0 + keys);
  const int tiles = begin < end ? (end - begin + P::kColumns - 1) / P::kColumns : 0;
  const auto copy = [&](int step, int stage) {
    const int h = kv * group + step / tiles, t0 = begin + step % tiles * P::kColumns, queries = min(P::kColumns, a.T - t0);
    const Rows rows(a, g, b, h);
    bfloat16* const to = passed + 2 * stage * P::kPassed;
    copy_tile<Width, P::kColumns>(rows.q + t0 * a.q_at.row, a.q_at.row, queries, a.D, vectors, to);
    copy_tile<Width, P::kColumns>(rows.dout + t0 * rows.out_row, rows.out_row, queries, a.D, vectors, to + P::kPassed);
    if (static_cast<int>(threadIdx.x) < P::kColumns)
      of_column[stage][threadIdx.x] = query_of(a, g, b, h, t0 + static_cast<int>(threadIdx.x));
  };

  const int first = mma_warp() * 16, lane_row = j0 + first + mma_lane() / 4, lane_column = mma_lane() % 4 * 2;
  const Rows shared(a, g, b, kv * group);
  copy_tile<Width, kRows>(shared.k + j0 * a.k_at.row, a.k_at.row, keys, a.D, vectors, key_tile);
  copy_tile<Width, kRows>(shared.v + j0 * a.v_at.row, a.v_at.row, keys, a.D, vectors, value_tile);
  const bool shown = all_shown(View<bfloat16>(a, b, kv * group), j0 + first, j0 + first + 16);
  const int steps = tiles * group;
  if (steps > 0) copy(0, 0);
  commit_copies();
  float dk[1][Width / 8][4] = {}, dv[1][Width / 8][4] = {};
  for (int step = 0, stage = 0; step < steps; ++step, stage = 1 - stage) {
    if (step + 1 < steps) copy(step + 1, 1 - stage);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();  // this tile is there
    const int h = kv * group + step / tiles, t0 = begin + step % tiles * P::kColumns;
    const View<bfloat16> view(a, b, h);
    const bfloat16* const query_tile = passed + 2 * stage * P::kPassed;
    const bfloat16* const dout_tile = query_tile + P::kPassed;
    float s[1][N][4], d[1][N][4];
    multiply_rows<Width>(key_tile, first, query_tile, s);
    multiply_rows<Width>(value_tile, first, dout_tile, d);
    const bool whole = shown && all_seen(a, t0, t0 + P::kColumns, j0 + first, j0 + first + 16);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * n + lane_column + i % 2, t = t0 + column, key = lane_row + i / 2 * 8;
        weigh(view, of_column[stage][column], whole || view.sees(t, key), t, key, s[0][n][i], d[0][n][i]);
      }
    add_rows<Width>(s, dout_tile, dv);
    add_rows<Width>(d, query_tile, dk);
    __syncthreads();  // this tile has been read
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = lane_row + 8 * half;
    if (key >= a.S) continue;
    bfloat16* const to_k = static_cast<bfloat16*>(g.dk) + b * g.dk_at.batch + key * g.dk_at.row + kv * g.dk_at.head;
    bfloat16* const to_v = static_cast<bfloat16*>(g.dv) + b * g.dv_at.batch + key * g.dv_at.row + kv * g.dv_at.head;
    store_row<Width>(dk[0], half, a.scale, to_k, a.D, vectors);
    store_row<Width>(dv[0], half, 1.0f, to_v, a.D, vectors);
  }
}

template <int Width, int N>
void run(const Attention& a, const Gradients& g, uintptr_t stream) {
  using P = Plan<Width, N>;
  const bool vectors = rows_allow(8, a, {a.q, a.k, a.v, g.dout, g.dq, g.dk, g.dv},
                                  {a.q_at, a.k_at, a.v_at, g.dq_at, g.dk_at, g.dv_at});
  const int over_queries = (a.T + kRows - 1) / kRows, over_keys = (a.S + kRows - 1) / kRows;
  if (a.B > 0 && a.T > 0)
    launch(query_gradients<Width, N>, tile_blocks(int64_t{over_queries} * a.B * a.H), kMmaThreads, P::kBytes, stream, a, g,
           over_queries, vectors);
  if (a.B > 0 && a.S > 0)
    launch(key_gradients<Width, N>, tile_blocks(int64_t{over_keys} * a.B * a.K), kMmaThreads, P::kBytes, stream, a, g, vectors);
}

}  // namespace

void differentiate_by_mma(const Attention& a, const Gradients& g, uintptr_t stream) {
  a.D <= 64 ? run<64, 8>(a, g, stream) : run<128, 4>(a, g, stream);
}

}  // namespace portlm::cuda
