// y (rows, N) = activation(x (rows, K) W^T + bias) for a few rows of x: each warp keeps four rows of W, however those are
// stored, and reads them once, 16 bytes to a lane.
//
// Memory bound for one row, and bound by multiply-adds for eight. Float32 whatever x is. A lane's sums are in the order of the
// columns and the lanes' are added in one order, so a row of y has the same bits whatever rows are beside it.
#pragma once

#include <cuda_fp16.h>

#include <cmath>

#include "cuda/common.cuh"

namespace portlm::cuda {

__device__ inline float to_float(__half x) { return __half2float(x); }

// Element i of an array of float32, or of bfloat16.
__device__ inline float element(const void* p, int64_t i, bool is_bfloat16) {
  return is_bfloat16 ? to_float(static_cast<const bfloat16*>(p)[i]) : static_cast<const float*>(p)[i];
}

__device__ inline void put(void* p, int64_t i, float x, bool is_bfloat16) {
  if (is_bfloat16)
    static_cast<bfloat16*>(p)[i] = from_float<bfloat16>(x);
  else
    static_cast<float*>(p)[i] = x;
}

// 0 none, 1 gelu, 2 gelu_tanh, 3 relu_squared, 4 relu. NaN stays NaN.
__device__ inline float activated(float v, int activation) {
  switch (activation) {
    case 1: return 0.5f * v * erfcf(-0.70710678f * v);  // 1 + erf(v) would cancel where v is far below 0
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case 3: return v < 0.0f ? 0.0f : v * v;
    case 4: return v < 0.0f ? 0.0f : v;
    default: return v;
  }
}

// Rows of x in shared memory, as float32, in chunks of what 16 bytes of W hold. Lanes read chunks that lie beside each other,
// 4 floats at a time: 4 more behind each let eight lanes meet 32 different banks.
template <int Chunk>
constexpr int kChunkStride = Chunk > 4 ? Chunk + 4 : Chunk;

constexpr int kColumns = 4;  // rows of W that a warp multiplies, for which it reads x once
constexpr unsigned kMostSets = 528;  // blocks beyond which a block takes several sets of rows, so that x is read once for all

// What a W says of itself:
//   kChunk                  weights of one access
//   kStep                   of them that are decoded together, 4 or all
//   Raw                     what one access brings
//   load(n, c)              chunk c of row n
//   decode<S>(raw, w)       step S of a chunk, as numbers that raw.scale() multiplies, if kScaled
//   unit(k)                 by what column k of x is multiplied first: a power of two
template <typename W, int R>
struct FewRows {
  static constexpr int kStride = kChunkStride<W::kChunk>;
  static constexpr int kPass = 32 * W::kChunk;  // columns that a warp reads at once
  static constexpr int kTile = kPass > 4096 / R ? kPass : 4096 / R;  // columns of x that are staged
  static constexpr int kRowFloats = kTile / W::kChunk * kStride;
  static constexpr int kAhead = R == 1 ? 2 : 1;  // passes whose weights are on their way together
};

template <typename W, int R, int S>
__device__ inline void multiply(const typename W::Raw (&raw)[kColumns], const float* x, float (&sum)[R][kColumns]) {
  if constexpr (S * W::kStep < W::kChunk) {
    float w[kColumns][W::kStep];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) W::template decode<S>(raw[c], w[c]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      float v[W::kStep];
      load(x + r * FewRows<W, R>::kRowFloats + S * W::kStep, v);
#pragma unroll
      for (int k = 0; k < W::kStep; ++k)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sum[r][c] = fmaf(v[k], w[c][k], sum[r][c]);
    }
    multiply<W, R, S + 1>(raw, x, sum);
  }
}

template <typename W, int R>
__global__ void __launch_bounds__(256, R == 8 ? 1 : 2) few_rows(W w, const void* x, const void* bias, void* y, int64_t rows, int64_t N, int64_t K,
                                                int activation, bool is_bfloat16) {
  using Sizes = FewRows<W, R>;
  constexpr int P = Sizes::kAhead;
  float* const stage = shared_memory();
  const int lane = threadIdx.x % 32;
  const int64_t first_row = int64_t{blockIdx.y} * R, set = blockDim.x / 32 * kColumns;
  bool staged = false;
  for (int64_t begin = blockIdx.x * set; begin < N; begin += gridDim.x * set) {
    const int64_t column = begin + threadIdx.x / 32 * kColumns;
    float total[R][kColumns] = {};
    for (int64_t k0 = 0; k0 < K; k0 += Sizes::kTile) {
      const int64_t width = K - k0 < Sizes::kTile ? K - k0 : Sizes::kTile;
      if (!staged) {
        __syncthreads();  // the last tile has been read
        for (int r = 0; r < R; ++r) {
          const bool here = first_row + r < rows;
          for (int k = threadIdx.x; k < width; k += blockDim.x)
            stage[r * Sizes::kRowFloats + k / W::kChunk * Sizes::kStride + k % W::kChunk] =
                here ? element(x, (first_row + r) * K + k0 + k, is_bfloat16) * W::unit(k) : 0.0f;
        }
        __syncthreads();
        staged = K <= Sizes::kTile;
      }
      const int chunks = static_cast<int>(width / W::kChunk);
      for (int i = lane; i < chunks; i += 32 * P) {
        typename W::Raw raw[P][kColumns];
#pragma unroll
        for (int p = 0; p < P; ++p)
#pragma unroll
          for (int c = 0; c < kColumns; ++c) {
            const int64_t n = column + c < N ? column + c : N - 1;
            const int chunk = i + 32 * p < chunks ? i + 32 * p : i;
            raw[p][c] = w.load(n, k0 / W::kChunk + chunk);
          }
#pragma unroll
        for (int p = 0; p < P; ++p) {
          if (i + 32 * p >= chunks) break;
          const float* const at = stage + (i + 32 * p) * Sizes::kStride;
          if constexpr (W::kScaled) {
            float sum[R][kColumns] = {};
            multiply<W, R, 0>(raw[p], at, sum);
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
#pragma unroll
              for (int r = 0; r < R; ++r) total[r][c] = fmaf(raw[p][c].scale, sum[r][c], total[r][c]);
          } else {
            multiply<W, R, 0>(raw[p], at, total);
          }
        }
      }
    }
    float mine = 0.0f;  // of row lane / kColumns and column lane % kColumns
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float sum = warp_sum(total[r][c]);
        if (lane == r * kColumns + c) mine = sum;
      }
    const int64_t n = column + lane % kColumns, row = first_row + lane / kColumns;
    if (lane < R * kColumns && n < N && row < rows) {
      if (bias) mine += element(bias, n, is_bfloat16);
      put(y, row * N + n, activated(mine, activation), is_bfloat16);
    }
  }
}

template <typename W, int R>
void launch_rows(const W& w, const void* x, const void* bias, void* y, int64_t rows, int64_t N, int64_t K, int activation,
                 bool is_bfloat16, uintptr_t stream) {
  // More warps read x less often, fewer make more blocks: a narrow matrix has to reach all of a device.
  const unsigned warps = N >= 8192 ? 8 : N >= 2048 ? 4 : 2;
  const int64_t sets = (N + warps * kColumns - 1) / (warps * kColumns), groups = (rows + R - 1) / R;
  if (groups > 65535) throw std::runtime_error("a product of few rows was asked for more than one launch can address");
  const dim3 grid(static_cast<unsigned>(sets < kMostSets ? sets : kMostSets), static_cast<unsigned>(groups));
  launch(few_rows<W, R>, grid, warps * 32, sizeof(float) * R * FewRows<W, R>::kRowFloats, stream, w, x, bias, y, rows, N, K,
         activation, is_bfloat16);
}

template <typename W>
void launch_few_rows(const W& w, const void* x, const void* bias, void* y, int64_t rows, int64_t N, int64_t K, int activation,
                     bool is_bfloat16, uintptr_t stream) {
  if (rows == 0 || N == 0) return;
  const auto run = rows == 1 ? launch_rows<W, 1> : rows <= 4 ? launch_rows<W, 4> : launch_rows<W, 8>;
  run(w, x, bias, y, rows, N, K, activation, is_bfloat16, stream);
}

}  // namespace portlm::cuda
