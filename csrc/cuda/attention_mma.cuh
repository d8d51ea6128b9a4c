// Tiles of bfloat16 rows in shared memory, and their products on tensor cores: what attention runs on where it has them.
//
// A warp holds M * 16 rows of a product. Of a result `columns` wide, lane (g, t) = (l / 4, l % 4) has in x[m][n][i] row
// 16 m + g + 8 (i / 2) and column 8 n + 2 t + i % 2.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

namespace portlm::cuda {

constexpr unsigned kMmaThreads = 128;
constexpr int kMmaWarps = 4;
constexpr float kLog2E = 1.44269504f;

// bfloat16 from row to row of a tile: 16 bytes more than a row has, so that 8 rows lie in different banks.
template <int Width>
constexpr int kMmaStride = Width + 8;

__device__ inline int mma_lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int mma_warp() { return static_cast<int>(threadIdx.x) / 32; }

// Starts to copy rows [0, present) of x, D wide, and zeros around them. It is there after wait_for_copies and a barrier.
template <int Width, int Rows>
__device__ inline void copy_tile(const bfloat16* x, int64_t row_stride, int present, int D, bool vectors, bfloat16* tile) {
  constexpr int kPieces = Width / 8, kTurns = Rows * kPieces / static_cast<int>(kMmaThreads);
  static_assert(kTurns * static_cast<int>(kMmaThreads) == Rows * kPieces, "every thread copies as many pieces");
  if (!vectors) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < Rows * Width; i += static_cast<int>(kMmaThreads)) {
      const int row = i / Width, column = i % Width;
      const bool there = row < present && column < D;
      tile[row * kMmaStride<Width> + column] = there ? x[row * row_stride + column] : from_float<bfloat16>(0.0f);
    }
    return;
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int i = static_cast<int>(threadIdx.x) + turn * static_cast<int>(kMmaThreads);
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool there = row < present && column < D;
    copy_async(tile + row * kMmaStride<Width> + column, there ? x + row * row_stride + column : x, there);
  }
}

// The 16 x 16 block of a tile that begins at (row, column), as a left operand.
template <int Width>
__device__ inline void load_left(uint32_t (&a)[4], const bfloat16* tile, int row, int column) {
  load_matrices(a, tile + (row + mma_lane() % 16) * kMmaStride<Width> + column + mma_lane() / 16 * 8);
}

// s = (rows first + 16 m ... of `rows`) times (8 * N rows of `columns`), over the width of both.
template <int Width, int M, int N>
__device__ inline void multiply_rows(const bfloat16* rows, int first, const bfloat16* columns, float (&s)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
#pragma unroll
  for (int k = 0; k < Width; k += 16) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) load_left<Width>(a[m], rows, first + 16 * m, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      const int lane = mma_lane();
      load_matrices(b, columns + (8 * n + lane / 16 * 8 + lane % 8) * kMmaStride<Width> + k + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(s[m][n], a[m], b[0], b[1]);
        multiply_add(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sum += (weights, rounded to bfloat16) times the 8 * N rows of x.
template <int Width, int M, int N>
__device__ inline void add_rows(const float (&weights)[M][N][4], const bfloat16* x, float (&sum)[M][Width / 8][4]) {
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = pack_pair(weights[m][k + i / 2][i % 2 * 2], weights[m][k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int n = 0; n < Width / 8; n += 2) {
      uint32_t b[4];
      const int lane = mma_lane();
      load_matrices_transposed(b, x + (8 * k + lane % 16) * kMmaStride<Width> + 8 * n + lane / 16 * 8);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        multiply_add(sum[m][n], a[m], b[0], b[1]);
        multiply_add(sum[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Whether the mask, if there is one, shows all of the keys [j0, j1) that there are.
__device__ inline bool all_shown(const View<bfloat16>& view, int j0, int j1) {
  if (!view.mask) return true;
  int hidden = 0;
#pragma unroll 1
  for (int j = j0 + mma_lane(); j < min(j1, view.a.S); j += 32) hidden |= view.mask[j] == 0;
#pragma unroll
  for (int offset = 16; offset; offset /= 2) hidden |= __shfl_xor_sync(0xffffffffu, hidden, offset);
  return hidden == 0;
}

// Whether each of the queries [t0, t1) sees each of the keys [j0, j1), of which the mask shows all.
__device__ inline bool all_seen(const Attention& a, int t0, int t1, int j0, int j1) {
  const int place = a.S - a.T;
  return t1 <= a.T && j1 <= a.S && !(a.causal && j1 - 1 > place + t0) && !(a.window && place + t1 - 1 - j0 >= a.window);
}

// Writes row `row` of what this lane holds, times a factor: `half` 0 or 1 says which of its rows of 16 that is.
template <int Width>
__device__ inline void store_row(const float (&sum)[Width / 8][4], int half, float factor, bfloat16* row, int D, bool vectors) {
#pragma unroll
  for (int n = 0; n < Width / 8; ++n) {
    const int column = 8 * n + mma_lane() % 4 * 2;
    const float first = sum[n][2 * half] * factor, second = sum[n][2 * half + 1] * factor;
    if (vectors && column < D) {
      store(row + column, {first, second});
    } else {
      if (column < D) row[column] = from_float<bfloat16>(first);
      if (column + 1 < D) row[column + 1] = from_float<bfloat16>(second);
    }
  }
}

// The block's dynamic shared memory.
__device__ inline bfloat16* mma_memory() { return reinterpret_cast<bfloat16*>(shared_memory()); }

// Whether a call's queries, keys and values are bfloat16 and narrow enough for this.
inline bool mma_serves(const Attention& a) { return a.is_bfloat16 && a.D <= 128; }

// attend_in_tiles and differentiate_in_tiles, without delta and dbias, of calls that it serves.
void attend_by_mma(const Attention& a, void* out, float* stats, uintptr_t stream);
void differentiate_by_mma(const Attention& a, const Gradients& g, uintptr_t stream);

}  // namespace portlm::cuda
