// A key/value cache of bytes: what is kept of new vectors, and attention of a few queries over all slots.
//
// Attention is memory bound: each block reads a part of one head's slots once, for up to four queries that share it. A team of
// lanes takes one slot, each lane 16 of its numbers, whose queries and sums stay in its registers; the softmax is online (Milakov
// and Gimelshein 2018), and a second kernel puts the parts together (flash-decoding, Dao et al. 2023). Parts depend on the number
// of slots alone, and so does the order of every sum.
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/kernels.h"

namespace portlm::cuda {
namespace {

constexpr int kWarps = 4;
constexpr unsigned kThreads = 32 * kWarps;
constexpr int kEach = 16;    // numbers of a lane
constexpr int kAtOnce = 2;   // slots of a team whose numbers are on their way together
constexpr int64_t kMostParts = 64;

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

struct Bytes {
  int8_t* numbers;
  float* scales;
  int64_t batch_stride, head_stride, scales_batch_stride, scales_head_stride;
};

// One warp for each vector.
__global__ void append(const float* fresh, int64_t fresh_stride, Bytes cache, int64_t vectors, int64_t K, int64_t P, int64_t T,
                       int64_t D) {
  const int lane = threadIdx.x % 32;
  const int64_t turn = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; i < vectors; i += turn) {
    const int64_t k = i % K, t = i / K % T, b = i / K / T;
    const float* const x = fresh + (b * T + t) * fresh_stride + k * D;
    float top = 0.0f, none = 0.0f;  // fmaxf drops a NaN, and a sum of x * 0 keeps it
    for (int64_t d = lane; d < D; d += 32) {
      top = fmaxf(top, fabsf(x[d]));
      none += x[d] * 0.0f;
    }
    const float scale = warp_max(top) / 127.0f + warp_sum(none), divisor = fmaxf(scale, 1.17549435e-38f);
    if (cache.numbers) {
      int8_t* const to = cache.numbers + b * cache.batch_stride + k * cache.head_stride + (P + t) * D;
      for (int64_t d = lane; d < D; d += 32) to[d] = scale != scale ? int8_t{0} : static_cast<int8_t>(rintf(x[d] / divisor));
    }
    if (cache.scales && lane == 0) cache.scales[b * cache.scales_batch_stride + k * cache.scales_head_stride + P + t] = scale;
  }
}

struct Attention {
  const float* q;  // (B, T, H, D)
  const int8_t *keys, *values;
  const float *key_scales, *value_scales;
  int64_t batch_stride, head_stride, scales_batch_stride, scales_head_stride;
  const int64_t* mask;  // (B, S), or nullptr
  float* out;           // (B, T, H, D)
  float* partial;       // (B, T, H, parts, D + 2): sums, then the largest score and the sum of exponentials
  int64_t T, S, H, K, D, window, parts, part;  // part: slots of one
  float scale, softcap;
  bool aligned;  // 16 numbers at a time
};

// 16 numbers of a slot from number d on, four to a word; 0 beyond the last.
__device__ inline Pack<uint32_t, 4> numbers_at(const Attention& a, const int8_t* slot, int64_t d, bool valid) {
  Pack<uint32_t, 4> words = {};
  if (!valid || d >= a.D) return words;
  if (a.aligned) return *reinterpret_cast<const Pack<uint32_t, 4>*>(slot + d);
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    if (d + i < a.D) words.v[i / 4] |= uint32_t{static_cast<uint8_t>(slot[d + i])} << i % 4 * 8;
  return words;
}

// They become floats by being put, 128 more than they are, below the exponent of 2^23.
__device__ inline void widen(const Pack<uint32_t, 4>& words, float (&x)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    x[i] = __uint_as_float(__byte_perm(words.v[i / 4] ^ 0x80808080u, 0x4b000000u, 0x7440u + i % 4)) - (8388608.0f + 128.0f);
}

// By what sums relative to `from` are multiplied when the largest score is `to`.
__device__ inline float shrunk(float from, float to) { return from == to ? 1.0f : expf(from - to); }

// out = sums / total, 0 for a query that sees nothing; NaN stays NaN.
__device__ inline float share(float sum, float total) { return total == 0.0f ? 0.0f : sum / total; }

// L lanes to a slot, Q queries to a block.
template <int L, int Q>
__global__ void __launch_bounds__(kThreads, 2) attend(Attention a) {
  constexpr int kTeams = kThreads / L;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, team = threadIdx.x / L;
  const int64_t d = lane % L * kEach, G = a.H / a.K, queries = a.T * G, blocks = (queries + Q - 1) / Q;
  const int64_t part = blockIdx.x % a.parts, at = blockIdx.x / a.parts, first = at % blocks * Q, k = at / blocks % a.K,
                b = at / blocks / a.K;
  const int8_t* const keys = a.keys + b * a.batch_stride + k * a.head_stride;
  const int8_t* const values = a.values + b * a.batch_stride + k * a.head_stride;
  const int64_t scales = b * a.scales_batch_stride + k * a.scales_head_stride;
  float q[Q][kEach], sum[Q][kEach] = {}, largest[Q], total[Q] = {};
  int64_t row[Q], limit[Q];  // where a query lies, in vectors, and the slots before which its own is the last
#pragma unroll
  for (int r = 0; r < Q; ++r) {
    const int64_t i = first + r < queries ? first + r : queries - 1, t = i / G;
    row[r] = (b * a.T + t) * a.H + k * G + i % G;
    limit[r] = a.S - a.T + t + 1;
    largest[r] = -INFINITY;
#pragma unroll
    for (int e = 0; e < kEach; ++e) q[r][e] = d + e < a.D ? a.q[row[r] * a.D + d + e] : 0.0f;
  }
  const int64_t end = (part + 1) * a.part < limit[Q - 1] ? (part + 1) * a.part : limit[Q - 1];
  int64_t begin = part * a.part;
  if (a.window && limit[0] - a.window > begin) begin += (limit[0] - a.window - begin) / (kTeams * kAtOnce) * (kTeams * kAtOnce);
  for (; begin < end; begin += kTeams * kAtOnce) {
    Pack<uint32_t, 4> key[kAtOnce], value[kAtOnce];
    float key_scale[kAtOnce], value_scale[kAtOnce];
    bool valid[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      const int64_t j = begin + u * kTeams + team;
      valid[u] = j < end && !(a.mask && a.mask[b * a.S + j] == 0);
      key[u] = numbers_at(a, keys + j * a.D, d, valid[u]);
      value[u] = numbers_at(a, values + j * a.D, d, valid[u]);
      key_scale[u] = valid[u] ? a.scale * a.key_scales[scales + j] : 0.0f;
      value_scale[u] = valid[u] ? a.value_scales[scales + j] : 0.0f;
    }
    float weight[kAtOnce][Q];  // first the score
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kEach];
      widen(key[u], x);
#pragma unroll
      for (int r = 0; r < Q; ++r) {
        float dot = 0.0f;
#pragma unroll
        for (int e = 0; e < kEach; ++e) dot = fmaf(q[r][e], x[e], dot);
#pragma unroll
        for (int offset = L / 2; offset; offset /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, offset);
        weight[u][r] = dot * key_scale[u];
        if (a.softcap != 0.0f) weight[u][r] = a.softcap * tanhf(weight[u][r] / a.softcap);
      }
    }
#pragma unroll
    for (int r = 0; r < Q; ++r) {
      bool seen[kAtOnce];
      float top = largest[r];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t j = begin + u * kTeams + team;
        seen[u] = valid[u] && j < limit[r] && (!a.window || j >= limit[r] - a.window);
        if (seen[u]) top = fmaxf(top, weight[u][r]);
      }
      const float shrink = shrunk(largest[r], top);
      largest[r] = top;
      total[r] *= shrink;
#pragma unroll
      for (int e = 0; e < kEach; ++e) sum[r][e] *= shrink;
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        weight[u][r] = seen[u] ? expf(weight[u][r] - top) : 0.0f;
        total[r] += weight[u][r];
        weight[u][r] = seen[u] ? weight[u][r] * value_scale[u] : 0.0f;
      }
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      float x[kEach];
      widen(value[u], x);
#pragma unroll
      for (int r = 0; r < Q; ++r)
#pragma unroll
        for (int e = 0; e < kEach; ++e) sum[r][e] = fmaf(weight[u][r], x[e], sum[r][e]);
    }
  }
  // The teams of a warp, and then the warps.
  float* const memory = shared_memory();  // (kWarps, Q, D + 2)
#pragma unroll
  for (int r = 0; r < Q; ++r) {
    const float top = warp_max(largest[r]), shrink = shrunk(largest[r], top);
    float* const mine = memory + (warp * Q + r) * (a.D + 2);
    float all = total[r] * shrink;
#pragma unroll
    for (int offset = 16; offset >= L; offset /= 2) all += __shfl_xor_sync(0xffffffffu, all, offset);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      float x = sum[r][e] * shrink;
#pragma unroll
      for (int offset = 16; offset >= L; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
      if (lane < L && d + e < a.D) mine[d + e] = x;
    }
    if (lane == 0) mine[a.D] = top, mine[a.D + 1] = all;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Q; ++r) {
    if (first + r >= queries) break;
    float top = -INFINITY, all = 0.0f;
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, memory[(w * Q + r) * (a.D + 2) + a.D]);
    for (int w = 0; w < kWarps; ++w) {
      const float* const one = memory + (w * Q + r) * (a.D + 2);
      all += one[a.D + 1] * shrunk(one[a.D], top);
    }
    float* const partial = a.partial + (row[r] * a.parts + part) * (a.D + 2);
    for (int64_t i = threadIdx.x; i < a.D; i += kThreads) {
      float x = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        const float* const one = memory + (w * Q + r) * (a.D + 2);
        x += one[i] * shrunk(one[a.D], top);
      }
      if (a.parts == 1)
        a.out[row[r] * a.D + i] = share(x, all);
      else
        partial[i] = x;
    }
    if (a.parts > 1 && threadIdx.x == 0) partial[a.D] = top, partial[a.D + 1] = all;
  }
}

// One block for each query.
__global__ void join_parts(const float* partial, float* out, int64_t parts, int64_t D) {
  const float* const mine = partial + blockIdx.x * parts * (D + 2);
  float top = -INFINITY, all = 0.0f;
  for (int64_t p = 0; p < parts; ++p) top = fmaxf(top, mine[p * (D + 2) + D]);
  for (int64_t p = 0; p < parts; ++p) all += mine[p * (D + 2) + D + 1] * shrunk(mine[p * (D + 2) + D], top);
  for (int64_t d = threadIdx.x; d < D; d += blockDim.x) {
    float x = 0.0f;
    for (int64_t p = 0; p < parts; ++p) x += mine[p * (D + 2) + d] * shrunk(mine[p * (D + 2) + D], top);
    out[blockIdx.x * D + d] = share(x, all);
  }
}

template <int L, int Q>
void launch_attend(const Attention& a, int64_t B, uintptr_t stream) {
  const int64_t blocks = B * a.K * ((a.T * (a.H / a.K) + Q - 1) / Q) * a.parts;
  if (blocks >= int64_t{1} << 31) throw std::runtime_error("quantized_attention: more queries than one launch can address");
  const size_t shared = sizeof(float) * kWarps * Q * static_cast<size_t>(a.D + 2);
  launch(attend<L, Q>, static_cast<unsigned>(blocks), kThreads, shared, stream, a);
}

}  // namespace

void append_bytes(const float* fresh, int64_t fresh_stride, int8_t* cache, int64_t batch_stride, int64_t head_stride,
                  float* scales, int64_t scales_batch_stride, int64_t scales_head_stride, int64_t B, int64_t K, int64_t P,
                  int64_t T, int64_t D, uintptr_t stream) {
  const int64_t vectors = B * K * T;
  if (vectors == 0 || D == 0) return;
  const Bytes to{cache, scales, batch_stride, head_stride, scales_batch_stride, scales_head_stride};
  launch(append, row_blocks((vectors + kWarps - 1) / kWarps), kThreads, 0, stream, fresh, fresh_stride, to, vectors, K, P, T, D);
}

void quantized_attention(const float* q, const int8_t* keys, const float* key_scales, const int8_t* values,
                         const float* value_scales, int64_t batch_stride, int64_t head_stride, int64_t scales_batch_stride,
                         int64_t scales_head_stride, const int64_t* mask, float scale, float* out, float* partial, int64_t parts,
                         int64_t B, int64_t T, int64_t S, int64_t H, int64_t K, int64_t D, int64_t window, float softcap,
                         uintptr_t stream) {
  if (B == 0 || T == 0 || H == 0 || D == 0) return;
  if (D > 32 * kEach) throw std::runtime_error("quantized_attention: heads wider than 512 have no CUDA kernel");
  if (parts < 1 || parts > kMostParts) throw std::runtime_error("quantized_attention: there are 1 to 64 parts");
  bool aligned = D % 16 == 0 && batch_stride % 16 == 0 && head_stride % 16 == 0;
  for (const int8_t* p : {keys, values}) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  const Attention a{q, keys, values, key_scales, value_scales, batch_stride, head_stride, scales_batch_stride, scales_head_stride,
                    mask, out, partial, T, S, H, K, D, window, parts, (S + parts - 1) / parts, scale, softcap, aligned};
  const bool single = T * (H / K) == 1;
  const auto run = D <= 64    ? (single ? launch_attend<4, 1> : launch_attend<4, 4>)
                   : D <= 128 ? (single ? launch_attend<8, 1> : launch_attend<8, 4>)
                   : D <= 256 ? (single ? launch_attend<16, 1> : launch_attend<16, 4>)
                              : (single ? launch_attend<32, 1> : launch_attend<32, 4>);
  run(a, B, stream);
  if (parts > 1)
    launch(join_parts, static_cast<unsigned>(B * T * H), static_cast<unsigned>(D < 128 ? (D + 31) / 32 * 32 : 128), 0, stream,
           partial, out, parts, D);
}

}  // namespace portlm::cuda
