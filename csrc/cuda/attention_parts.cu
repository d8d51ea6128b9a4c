// Attention of few queries, as generation has: bound by reading keys and values, once for all queries that share a head.
//
// The keys are cut into parts, so that one sequence fills the device, and a second kernel adds up what the parts found (Dao et
// al. 2023, Flash-Decoding). Inside a block groups of lanes share a key, whose pieces they load 16 bytes at a time; each
// group has a softmax of its own, and they meet at the end, in an order that depends on the sizes alone.
#include "cuda/attention.cuh"

namespace portlm::cuda {
namespace {

constexpr unsigned kThreads = 128;
constexpr int kWarps = kThreads / 32;

// How a head of D elements lies in `lanes` lanes, a power of two: N pieces of V in each, piece n of lane l at (n * lanes + l) * V.
// The block's rows are R queries of one head of keys: row r is head r % group of token r / group.
template <typename T, int V, int N, int R>
__global__ void __launch_bounds__(kThreads)
    part_of_keys(Attention a, T* out, float* partial, int parts, int each, int row_groups, int lanes) {
  constexpr int kAhead = V == 1 ? 1 : N > 1 || R * V > 32 ? 2 : 4;  // keys that a group loads at once
  const int part = static_cast<int>(blockIdx.x) % parts, rest = static_cast<int>(blockIdx.x) / parts;
  const int row0 = rest % row_groups * R, kv = rest / row_groups % a.K, b = rest / row_groups / a.K;
  const int group = a.H / a.K, rows = min(R, a.T * group - row0);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, place = lane % lanes;
  const int teams = kWarps * 32 / lanes, team = warp * (32 / lanes) + lane / lanes;

  float q[R][N * V], sum[R][N * V] = {}, largest[R], total[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    largest[r] = -INFINITY;
    const int h = kv * group + (row0 + r) % group, t = (row0 + r) / group;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float piece[V] = {};
      const int d = (n * lanes + place) * V;
      if (r < rows && d < a.D)
        load(static_cast<const T*>(a.q) + b * a.q_at.batch + t * a.q_at.row + h * a.q_at.head + d, piece);
#pragma unroll
      for (int e = 0; e < V; ++e) q[r][n * V + e] = piece[e];
    }
  }

  const T* const k = static_cast<const T*>(a.k) + b * a.k_at.batch + kv * a.k_at.head;
  const T* const v = static_cast<const T*>(a.v) + b * a.v_at.batch + kv * a.v_at.head;
  const int begin = a.begin(0) + part * each, end = min(a.S, begin + each);
  for (int j0 = begin; j0 < end; j0 += teams * kAhead) {
    float keys[kAhead][N * V], values[kAhead][N * V];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int j = j0 + u * teams + team;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float key[V] = {}, value[V] = {};
        const int d = (n * lanes + place) * V;
        if (j < end && d < a.D) {
          load(k + j * a.k_at.row + d, key);
          load(v + j * a.v_at.row + d, value);
        }
#pragma unroll
        for (int e = 0; e < V; ++e) keys[u][n * V + e] = key[e], values[u][n * V + e] = value[e];
      }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int h = kv * group + (row0 + r) % group, t = (row0 + r) / group;
      const View<T> view(a, b, h);
      float s[kAhead], top = largest[r];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        s[u] = 0.0f;
#pragma unroll
        for (int e = 0; e < N * V; ++e) s[u] = fmaf(q[r][e], keys[u][e], s[u]);
        for (int offset = lanes / 2; offset; offset /= 2) s[u] += __shfl_xor_sync(0xffffffffu, s[u], offset);
        const int j = j0 + u * teams + team;
        s[u] = r < rows && j < end && view.sees(t, j) ? view.score(s[u], t, j) : -INFINITY;
        top = fmaxf(top, s[u]);
      }
      const float shrink = shrunk(largest[r], top);
      largest[r] = top;
      total[r] *= shrink;
#pragma unroll
      for (int e = 0; e < N * V; ++e) sum[r][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        const float weight = s[u] == -INFINITY ? 0.0f : expf(s[u] - top);  // NaN makes the total NaN, and with it the row
        total[r] += weight;
#pragma unroll
        for (int e = 0; e < N * V; ++e) sum[r][e] = fmaf(weight, values[u][e], sum[r][e]);
      }
    }
  }

  // The teams of a warp, then the warps: each row (D + 2) of `found` holds the sum, the largest score and the total.
  const int width = a.D + 2;
  float* const found = shared_memory();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    for (int offset = lanes; offset < 32; offset *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest[r], offset), top = fmaxf(largest[r], other);
      const float mine = shrunk(largest[r], top), theirs = shrunk(other, top);
      total[r] = total[r] * mine + __shfl_xor_sync(0xffffffffu, total[r], offset) * theirs;
#pragma unroll
      for (int e = 0; e < N * V; ++e) sum[r][e] = sum[r][e] * mine + __shfl_xor_sync(0xffffffffu, sum[r][e], offset) * theirs;
      largest[r] = top;
    }
    float* const to = found + (warp * R + r) * width;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int d = (n * lanes + place) * V + e;
        if (lane < lanes && d < a.D) to[d] = sum[r][n * V + e];
      }
    if (lane == 0) to[a.D] = largest[r], to[a.D + 1] = total[r];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < rows * a.D; i += static_cast<int>(kThreads)) {
    const int r = i / a.D, d = i % a.D, h = kv * group + (row0 + r) % group, t = (row0 + r) / group;
    float top = -INFINITY, whole = 0.0f, value = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, found[(w * R + r) * width + a.D]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* const from = found + (w * R + r) * width;
      const float share = shrunk(from[a.D], top);
      whole += from[a.D + 1] * share;
      value += from[d] * share;
    }
    const int64_t row = (int64_t{b} * a.T + t) * a.H + h;
    if (parts == 1) {
      out[row * a.D + d] = from_float<T>(whole == 0.0f ? 0.0f : value / whole);
      continue;
    }
    float* const to = partial + (row * parts + part) * width;
    to[d] = value;
    if (d == 0) to[a.D] = top, to[a.D + 1] = whole;
  }
}

// A block for each row (token and head) of the result.
template <typename T>
__global__ void add_parts(const float* partial, T* out, int64_t rows, int parts, int D) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const float* const found = partial + row * parts * (D + 2);
    float top = -INFINITY, whole = 0.0f;
    for (int p = 0; p < parts; ++p) top = fmaxf(top, found[p * (D + 2) + D]);
    for (int p = 0; p < parts; ++p) whole += found[p * (D + 2) + D + 1] * shrunk(found[p * (D + 2) + D], top);
    for (int d = static_cast<int>(threadIdx.x); d < D; d += static_cast<int>(blockDim.x)) {
      float value = 0.0f;
      for (int p = 0; p < parts; ++p) value += found[p * (D + 2) + d] * shrunk(found[p * (D + 2) + D], top);
      out[row * D + d] = from_float<T>(whole == 0.0f ? 0.0f : value / whole);
    }
  }
}

template <typename T, int V, int N, int R>
void start(const Attention& a, void* out, float* partial, int parts, uintptr_t stream) {
  int lanes = 1;
  while (lanes < 32 && lanes * V < a.D) lanes *= 2;
  const int row_groups = (a.T * (a.H / a.K) + R - 1) / R, seen = a.S - a.begin(0);
  const int each = (seen + parts - 1) / parts;
  launch(part_of_keys<T, V, N, R>, tile_blocks(int64_t{parts} * row_groups * a.K * a.B), kThreads,
         static_cast<size_t>(kWarps * R * (a.D + 2)) * sizeof(float), stream, a, static_cast<T*>(out), partial, parts, each,
         row_groups, lanes);
}

template <typename T, int V, int N>
void with_rows(const Attention& a, void* out, float* partial, int parts, uintptr_t stream) {
  const int64_t rows = int64_t{a.T} * (a.H / a.K);
  constexpr int kMostRows = N > 1 ? 4 : 8;  // as many as registers hold
  if (rows > 4)
    start<T, V, N, kMostRows>(a, out, partial, parts, stream);
  else if (rows > 2)
    start<T, V, N, 4>(a, out, partial, parts, stream);
  else if (rows > 1)
    start<T, V, N, 2>(a, out, partial, parts, stream);
  else
    start<T, V, N, 1>(a, out, partial, parts, stream);
}

template <typename T>
void run(const Attention& a, void* out, float* partial, int parts, uintptr_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (!rows_allow(V, a, {a.q, a.k, a.v}, {a.q_at, a.k_at, a.v_at}))
    with_rows<T, 1, kMostHeadWidth / 32>(a, out, partial, parts, stream);
  else if (a.D <= 32 * V)
    with_rows<T, V, 1>(a, out, partial, parts, stream);
  else
    with_rows<T, V, kMostHeadWidth / (32 * V)>(a, out, partial, parts, stream);
  if (parts == 1) return;
  const int64_t rows = int64_t{a.B} * a.T * a.H;
  launch(add_parts<T>, row_blocks(rows), row_threads(a.D, 1), 0, stream, partial, static_cast<T*>(out), rows, parts, a.D);
}

}  // namespace

void attend_in_parts(const Attention& a, void* out, float* partial, int64_t parts, uintptr_t stream) {
  if (a.B == 0 || a.T == 0 || a.H == 0 || a.D == 0) return;
  if (a.D > kMostHeadWidth) throw std::runtime_error("attention: heads are wider than 256");
  if (parts < 1 || (parts > 1 && !partial)) throw std::runtime_error("attention: parts of the keys without room for them");
  a.is_bfloat16 ? run<bfloat16>(a, out, partial, size_of(parts), stream) : run<float>(a, out, partial, size_of(parts), stream);
}

}  // namespace portlm::cuda
